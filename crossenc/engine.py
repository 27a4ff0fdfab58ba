"""Token ids to scores: one model on one device. Knows no text, no file and no ranking.

Batches are packed, without padding, where the model and the device allow it (crossenc.packing), else padded; those of a
compiled model are padded to a few shapes (crossenc.compiling).

Shape letters: P pairs, B pairs of one batch, W tokens of its longest pair, L labels.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from crossenc.batching import WINDOW, token_budget_batches
from crossenc.compiling import Shapes, compile_backbone, shapes_of
from crossenc.errors import ConfigError
from crossenc.float32_layers import keep_in_float32
from crossenc.layout import read_layout
from crossenc.loading import load_parts, num_labels_of, resolve_activation
from crossenc.packing import PackedForward, answers_are_coarse, kernel_of, scoring_view, to_device, why_padded
from crossenc.precision import resolve_dtype
from crossenc.records import TokenizedPairs
from crossenc.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

#: Tokens per batch that score fastest. On the CPU (MiniLM-L6 in float32, medquad, packed, one AVX2 core) 2,048 gave
#: 3,431 tokens per second of processor time, 512 gave 3,228, 1,024 gave 3,370 and 4,096 gave 3,361.
CPU_BATCH_TOKENS = 2048
CUDA_BATCH_TOKENS = 65_536

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Budget:
    """Tokens that a batch may hold; less after a batch that did not fit the device."""

    num_tokens: int


def default_device() -> torch.device:
    """The fastest kind of device that this machine has: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_batch_tokens(device: torch.device) -> int:
    """The tokens of a batch that score fastest on a kind of device."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


def _smaller_budget(lengths: NDArray[np.int64], num_tokens: int) -> int:
    """Half of the tokens with which a batch of `lengths` did not fit."""
    budget = max(1, num_tokens // 2)
    logger.warning(
        "out of memory with %d pairs of up to %d tokens: going on with at most %d tokens a batch; "
        "set max_batch_tokens to that to avoid the retry",
        len(lengths),
        lengths.max(),
        budget,
    )
    return budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A Scorer that runs a model on length-sorted batches, packed or padded.

    `network` takes a dict of input_ids, attention_mask and perhaps token_type_ids, each int64 [B, W], and gives one
    with logits [B, L] under "scores"; `activation` maps these, in float32, to scores [B, L]. `max_batch_tokens` counts
    padding where there is any; `max_batch_pairs` caps a batch as well. Without `may_pack` every batch is padded.
    `on_out_of_memory` is called for each batch that did not fit the device and is cut smaller.
    """

    network: nn.Module
    num_labels: int
    pad_token_id: int
    padding_side: str
    activation: Activation
    device: torch.device
    max_batch_tokens: int
    max_batch_pairs: int | None = None
    window: int = WINDOW
    may_pack: bool = True
    on_out_of_memory: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_batch_pairs"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} is {limit}: set 1 or more, or leave it out")

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        tokenizer: Tokenizer,
        *,
        num_labels: int | None = None,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        activation: Activation | None = None,
        max_batch_tokens: int | None = None,
        compiles: bool = False,
    ) -> "Engine":
        """Load the model of a local folder for the pairs of `tokenizer`.

        What is None is the checkpoint's own (labels, activation) or suits the machine (device, batch size); a dtype
        "auto" does, too. With `compiles` the backbone is compiled (crossenc.compiling). Raises
        CheckpointError as `load_parts` and `resolve_activation` do, ConfigError for a dtype that is not supported.
        """
        chosen = default_device() if device is None else torch.device(device)
        layout = read_layout(folder)
        parts = load_parts(folder, layout, num_labels=num_labels, dtype=resolve_dtype(dtype, chosen))
        found = num_labels_of(parts)
        network = nn.Sequential(*parts)
        keep_in_float32(network, layout.fp32_modules)
        network.eval().to(chosen)
        if compiles:
            compile_backbone(network[0].model)
        return cls(
            network=network,
            num_labels=found,
            pad_token_id=tokenizer.pad_token_id,
            padding_side=tokenizer.padding_side,
            activation=resolve_activation(layout, found) if activation is None else activation,
            device=chosen,
            max_batch_tokens=default_batch_tokens(chosen) if max_batch_tokens is None else max_batch_tokens,
        )

    def with_limits(self, activation: Activation | None, max_batch_pairs: int | None) -> "Engine":
        """The same engine with another activation, unless that is None, and another cap on a batch's pairs."""
        return replace(self, activation=activation or self.activation, max_batch_pairs=max_batch_pairs)

    @property
    def is_packed(self) -> bool:
        """Whether batches hold no padding; `forward_kind` says why not."""
        return self._why_padded() is None

    @property
    def forward_kind(self) -> str:
        """For people: "packed" and the kernel, or "padded" and why; and what else they should know of the scores."""
        reason = self._why_padded()
        kind = f"packed, {kernel_of(self.network, self.device)}" if reason is None else f"padded: {reason}"
        return f"{kind}; yes and no are not computed in float32" if answers_are_coarse(self.network) else kind

    def _why_padded(self) -> str | None:
        return why_padded(self.network, self.device) if self.may_pack else "packing is switched off"

    def num_fed_tokens(self, lengths: NDArray[np.int64]) -> int:
        """Tokens that the model is given for pairs of these lengths [P], with padding, where memory suffices."""
        if self.is_packed:
            return int(lengths.sum())
        shapes, most = shapes_of(self.network), self.max_batch_tokens
        widths = lengths if shapes is None else shapes.widths(lengths)
        batches = token_budget_batches(widths, most, self.window, self.max_batch_pairs)
        return sum(self._padded_size(widths[batch], shapes, most) for batch in batches)

    def score(
        self, pairs: TokenizedPairs, on_batch: Callable[[int], object] | None = None, budget: Budget | None = None
    ) -> NDArray[np.float32]:
        """Score every pair: float32 [P], or [P, L] for L > 1 labels, non-finite values left as they are.

        `on_batch` is told the number of pairs of each finished batch. On a device that runs out of memory the
        batches still to do are halved and tried again, finished ones are kept; a single pair that does not
        fit raises torch.OutOfMemoryError. A `budget` goes before max_batch_tokens and keeps what was learnt for the
        next call. Without one each call begins anew, so that its scores depend on nothing that was scored before.
        """
        budget = budget or Budget(self.max_batch_tokens)
        is_packed = self.is_packed
        shapes = None if is_packed else shapes_of(self.network)
        lengths = pairs.lengths if shapes is None else shapes.widths(pairs.lengths)
        cut = partial(token_budget_batches, max_batch_pairs=self.max_batch_pairs, is_packed=is_packed)
        todo = deque(cut(lengths, budget.num_tokens, self.window))
        done: list[NDArray[np.int64]] = []
        # Scores stay on the device until the end: copying each batch back would wait for it.
        scores: list[torch.Tensor] = []
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.inference_mode():
                forward = self._forward(pairs, is_packed, shapes, budget)
                while todo:
                    # A lone pair with a copy of itself, which makes a known shape, may fit without the copy.
                    is_smallest = len(todo[0]) == 1 and (shapes is None or budget.num_tokens < 2 * lengths[todo[0][0]])
                    batch_scores = self._score_or_none(forward, todo[0], is_smallest)
                    if batch_scores is None:
                        if self.on_out_of_memory is not None:
                            self.on_out_of_memory()
                        tried = lengths[todo[0]]
                        size = int(tried.sum()) if is_packed else self._padded_size(tried, shapes, budget.num_tokens)
                        budget.num_tokens = _smaller_budget(tried, size)
                        todo = deque(batch[part] for batch in todo for part in cut(lengths[batch], budget.num_tokens))
                        continue
                    done.append(todo.popleft())
                    scores.append(batch_scores)
                    if on_batch is not None:
                        on_batch(len(done[-1]))
        finally:
            self.network.train(was_training)
        return self._in_input_order(scores, done)

    def _forward(
        self, pairs: TokenizedPairs, is_packed: bool, shapes: Shapes | None, budget: Budget
    ) -> Callable[[NDArray[np.int64]], torch.Tensor]:
        """What gives the logits [B, L] of the pairs at given positions."""
        if is_packed:
            return partial(PackedForward(self.network, self.device), pairs)
        view = scoring_view(self.network, is_packed=False)

        def padded(batch: NDArray[np.int64]) -> torch.Tensor:
            logits: torch.Tensor = view(self.batch_inputs(pairs, batch))["scores"]
            return logits

        def bucketed(batch: NDArray[np.int64]) -> torch.Tensor:
            assert shapes is not None
            widths = shapes.widths(pairs.lengths[batch])
            width = int(widths.max())
            num_more = self._padded_size(widths, shapes, budget.num_tokens) // width - len(batch)
            rows = np.pad(batch, (0, num_more), mode="edge")  # the last pair again, and again
            logits: torch.Tensor = view(self.batch_inputs(pairs, rows, width))["scores"]
            return logits[: len(batch)].clone()  # the next call may overwrite what a compiled one gave

        return padded if shapes is None else bucketed

    def _padded_size(self, lengths: NDArray[np.int64], shapes: Shapes | None, num_tokens: int) -> int:
        """Tokens of a padded batch; one of few shapes has more rows than pairs where `num_tokens` leaves room."""
        width = int(lengths.max())
        if shapes is None:
            return width * len(lengths)
        most = num_tokens // width
        return width * shapes.num_rows(len(lengths), min(most, self.max_batch_pairs or most))

    def _in_input_order(self, scores: list[torch.Tensor], batches: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        if not scores:
            return np.empty(0 if self.num_labels == 1 else (0, self.num_labels), dtype=np.float32)
        values, order = torch.cat(scores).cpu().numpy(), np.concatenate(batches)
        if len(values) != len(order):
            raise ConfigError(
                f"the activation makes {len(values)} scores of {len(order)} pairs: it must keep their number"
            )
        result = np.empty(values.shape, dtype=np.float32)
        result[order] = values
        return result[:, 0] if self.num_labels == 1 and result.ndim == 2 else result

    def _score_or_none(
        self, forward: Callable[[NDArray[np.int64]], torch.Tensor], batch: NDArray[np.int64], is_smallest: bool
    ) -> torch.Tensor | None:
        """Scores [B, L] of one batch on the device; None when it does not fit and could be cut smaller."""
        try:
            return self.activation(forward(batch).float().reshape(len(batch), self.num_labels))
        except torch.OutOfMemoryError:
            if is_smallest:
                raise
        # Outside of the handler, where the traceback no longer holds the failed batch's tensors.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def batch_inputs(
        self, pairs: TokenizedPairs, batch: NDArray[np.int64], width: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Model inputs of the pairs at `batch`, int64 [B, W] on the device, padded to `width` or to the longest."""
        lengths = pairs.lengths[batch]
        width = width or int(lengths.max())
        columns = np.arange(width)
        if self.padding_side == "left":
            columns = columns[None, :] - (width - lengths)[:, None]
        else:
            columns = np.broadcast_to(columns, (len(batch), width))
        # Column c of a row holds the pair's token number columns[c], or padding where there is no such token.
        is_token = (columns >= 0) & (columns < lengths[:, None])
        source = (pairs.offsets[batch][:, None] + columns)[is_token]
        rows = np.zeros((2 if pairs.token_type_ids is None else 3, *is_token.shape), dtype=np.int32)
        rows[0] = self.pad_token_id
        rows[0, is_token] = pairs.input_ids[source]
        rows[1] = is_token
        if pairs.token_type_ids is not None:
            rows[2, is_token] = pairs.token_type_ids[source]
        names = ("input_ids", "attention_mask", "token_type_ids")
        return dict(zip(names, to_device(rows, self.device).long(), strict=False))
