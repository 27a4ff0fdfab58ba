"""Attention of sequences that lie end to end without padding, each of which sees itself alone.

transformers' encoders call their attention through a registry, by the name that their configuration has for it. One
whose configuration says PACKED_ATTENTION finds this one there, and may be called inside of `packed_attention`. Knows
no model and no scores.

Shape letters: T tokens of all sequences, B sequences, N sequences of one length, W tokens of each, H heads, E width
of a head.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from crossenc.precision import is_fast_in_bfloat16, is_narrow

#: On CPUs that multiply bfloat16 in hardware, sequences up to this long take two matrix products and a softmax:
#: 16 of 128 tokens take 1.8 ms so and 5.2 ms by scaled_dot_product_attention (AVX512-BF16, 2 cores). All else
#: takes the latter. In float32 (AVX2, 1 core, 12 heads of 32, 2,048 tokens) it needs 5.2, 8.2, 11 and 20 ms for
#: sequences of 16, 64, 128 and 256 tokens, the products 5.3, 9.9, 27 and 45; in bfloat16 without hardware for it
#: 6, 7, 12 and 18 ms against 29, 81, 160 and 340.
MAX_PRODUCT_TOKENS = 256

#: What the attention of a model for packed batches is set to.
PACKED_ATTENTION = "crossenc_packed"


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where each of B sequences begins and ends. `starts` is int32 [B + 1] on the device and ends in T."""

    lengths: NDArray[np.int64]
    starts: Tensor
    _groups: list[tuple[int, int, int]] = field(init=False, default_factory=list)
    _masks: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        first = 0
        for length, same in groupby(self.lengths.tolist()):
            num_tokens = length * len(list(same))
            self._groups.append((first, first + num_tokens, length))
            first += num_tokens

    @property
    def first_tokens(self) -> Tensor:
        """The place of every sequence's first token, int64 [B] on the device."""
        return self.starts[:-1].long()

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal length: first token, the one after the last, and length of each."""
        return self._groups

    def window_mask(self, length: int, window: int) -> Tensor:
        """Which tokens of a sequence see which, bool [W, W]: those at most `window` tokens away."""
        if (length, window) not in self._masks:
            # Made in its own place: distances of 8,192 tokens as numbers would be half a gigabyte each.
            mask = torch.ones(length, length, dtype=torch.bool, device=self.starts.device)
            self._masks[length, window] = mask.tril_(window).triu_(-window)
        return self._masks[length, window]


@dataclass(frozen=True, slots=True)
class _Call:
    """A packed forward pass. Of the states of `last`, an attention module, only first tokens' are asked for."""

    sequences: Sequences
    last: torch.nn.Module | None


_current: ContextVar[_Call | None] = ContextVar("the packed forward pass of this thread", default=None)


def current_sequences() -> Sequences | None:
    """The sequences of the packed batch that this thread is computing; None outside of one."""
    call = _current.get()
    return None if call is None else call.sequences


def register() -> None:
    """Make PACKED_ATTENTION known to transformers."""
    AttentionInterface.register(PACKED_ATTENTION, _attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _mask)


@contextmanager
def packed_attention(sequences: Sequences, last: torch.nn.Module | None = None) -> Iterator[None]:
    """Let models whose attention is PACKED_ATTENTION take [1, T] tokens for `sequences`, in this thread.

    The attention module `last`, if any, gives the states of first tokens alone, and zeros for the others.
    """
    token = _current.set(_Call(sequences, last))
    try:
        yield
    finally:
        _current.reset(token)


def _mask(*_: Any, **__: Any) -> None:
    """No mask, whatever transformers asks for: sequences see themselves alone anyway."""


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: query, key and value [1, H, T, E] to states [1, T, H, E], and no weights."""
    call = _current.get()
    assert call is not None  # packed batches alone come here
    reach = settings.get("sliding_window")  # counts the token itself
    scale = query.shape[-1] ** -0.5 if settings.get("scaling") is None else settings["scaling"]
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    window = None if reach is None else reach - 1
    dropout = settings.get("dropout") or 0.0
    states = attend(q, k, v, scale, call.sequences, window, dropout=dropout, first_only=module is call.last)
    return states.unsqueeze(0), None


def attend(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sequences: Sequences,
    window: int | None = None,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    first_only: bool = False,
) -> Tensor:
    """Attention within each sequence: query, key and value [T, H, E] to states [T, H, E].

    With a `window`, a token sees those at most so many tokens away. A `bias` [H, W, W], of which shorter sequences
    take the first rows and columns, is added before the softmax; it goes without a window. `dropout` is the share of
    weights that training leaves out. With `first_only` the states of all but first tokens are zeros, and cost nothing.
    """
    asked = query[sequences.first_tokens] if first_only else query
    settings = _varlen_settings(query, scale, window)
    # The kernel would place a lone query at the end of its window, and leaves no weights out.
    by_kernel = (
        bias is None
        and not dropout
        and not (first_only and window is not None)
        and takes_varlen_kernel(query.device, query.dtype, query.shape[-1])
        and (not settings or varlen_has_settings())
    )
    if by_kernel:
        states = _varlen(asked, key, value, sequences, settings)
    else:
        states = _by_length(asked, key, value, scale, sequences, window, bias, dropout)
    return torch.zeros_like(query).index_copy(0, sequences.first_tokens, states) if first_only else states


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sequences: Sequences,
    window: int | None,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Neighbours of equal length at once; a query of all tokens [T, H, E], or of first ones [B, H, E]."""
    is_on_cpu = query.device.type == "cpu"
    by_product = is_on_cpu and is_narrow(query.dtype) and is_fast_in_bfloat16(query.device)
    is_short = len(query) < len(key)
    groups = [((end - first) // length, length) for first, end, length in sequences.groups]
    num_tokens = [num_sequences * length for num_sequences, length in groups]
    num_asked = [num_sequences for num_sequences, _ in groups] if is_short else num_tokens
    parts = []
    # By split, whose gradient is put together once; that of a slice is as large as the whole each time.
    split = zip(
        groups, torch.split(query, num_asked), torch.split(key, num_tokens), torch.split(value, num_tokens), strict=True
    )
    for (num_sequences, length), asked, keys, values in split:
        num_queries = 1 if is_short else length
        q, k, v = (states.view(num_sequences, -1, *query.shape[1:]).transpose(1, 2) for states in (asked, keys, values))
        if bias is not None:
            mask = bias[None, :, :num_queries, :length]  # three dimensions take a kernel two or three times as slow
            states = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        elif window is not None and length > window + 1:
            mask = sequences.window_mask(length, window)[:num_queries]
            states = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        elif (is_on_cpu and dropout) or (by_product and length <= MAX_PRODUCT_TOKENS):
            states = _products(q, k, v, scale, dropout)
        else:
            states = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        parts.append(states.transpose(1, 2).reshape(asked.shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _products(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """Queries [N, H, W or 1, E] to states; faster than the fused kernel where the matrix products are.

    With dropout that kernel computes them, too, since it leaves no weights out.
    """
    q, k, v = (states.flatten(0, 1) for states in (query, key, value))
    weights = torch.bmm(q * scale, k.transpose(1, 2)).softmax(dim=-1)
    if dropout:
        is_kept, factor = _drawn(weights.shape, dropout)
        # In the weights' dtype: a product with bool takes three times as long.
        return (torch.bmm(weights * is_kept.to(weights.dtype), v) * factor).view(query.shape)
    return torch.bmm(weights, v).view(query.shape)


def _drawn(shape: torch.Size, dropout: float) -> tuple[Tensor, float]:
    """Which weights dropout keeps, bool of `shape`, and the factor that keeps their mean.

    Four weights share a random number of 64 bits, of which drawing a seventh of a training step is if each has its
    own. So the share left out is a multiple of 2^-16.
    """
    num_left_out = round(dropout * 2**16)
    numbers = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    is_kept = numbers.view(torch.int16)[: shape.numel()].view(shape) < 2**15 - num_left_out
    return is_kept, 2**16 / max(1, 2**16 - num_left_out)


def takes_varlen_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's kernel for packed sequences takes heads of a width: flash attention, so 16 bits since Ampere."""
    return (
        device.type == "cuda"
        and is_narrow(dtype)
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _varlen_settings(query: Tensor, scale: float, window: int | None) -> dict[str, Any]:
    """What the kernel has to be told, since it is not what it does of its own accord."""
    settings: dict[str, Any] = {} if math.isclose(scale, query.shape[-1] ** -0.5) else {"scale": scale}
    return settings if window is None else settings | {"window_size": (window, window)}


@cache
def varlen_has_settings() -> bool:
    """Whether this version of torch lets a scale and a window be given; 2.10, the first with the kernel, does not."""
    return {"scale", "window_size"} <= signature(varlen_attn).parameters.keys()


def _varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, settings: Mapping[str, Any]) -> Tensor:
    starts, longest = sequences.starts, int(sequences.lengths.max())
    query_starts, longest_query = starts, longest
    if len(query) < len(key):  # first tokens alone
        query_starts, longest_query = torch.arange(len(starts), dtype=starts.dtype, device=starts.device), 1
    states = varlen_attn(query, key, value, query_starts, starts, longest_query, longest, **settings)
    assert isinstance(states, Tensor)  # a pair only where more was asked for
    return states
