"""Compiled models: what of a model torch.compile is given, and the few shapes that it is then called with.

A compiled backbone takes any shape. But CUDA graphs, which spare small models the time of launching their kernels, are
recorded anew for each; so batches are padded up to buckets of widths and of rows. Knows no texts and no scores.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from crossenc.modules import Transformer
from crossenc.tokenizer import position_limit

#: The widths of padded batches in tokens: powers of two, and one between two of them.
_WIDTHS = np.sort(np.concatenate([smallest << np.arange(20) for smallest in (16, 24)]))


def compile_backbone(model: PreTrainedModel, **settings: Any) -> None:
    """Let torch.compile compute the backbone, once for all shapes and on CUDA with CUDA graphs.

    `settings` are those of torch.compile and go before these. It compiles with the first call, for up to a minute.
    The head stays as it is, so that it can compute in float32. CUDA graphs belong to the thread whose call recorded
    them, and other threads must not call the model; the setting mode="default" does without them.
    """
    defaults: dict[str, Any] = {"dynamic": True}
    if model.device.type == "cuda" and not {"mode", "options", "backend"} & settings.keys():
        defaults["mode"] = "reduce-overhead"
    model.base_model.compile(**{**defaults, **settings})


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of a compiled network's batches; a row holds no more than `max_width` tokens, where that is set."""

    max_width: int | None

    def widths(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """What rows of these lengths are padded to, in tokens."""
        widths: NDArray[np.int64] = _WIDTHS[np.searchsorted(_WIDTHS, lengths)]
        return widths if self.max_width is None else np.maximum(lengths, np.minimum(widths, self.max_width))

    def num_rows(self, num_pairs: int, most: int) -> int:
        """Rows of a batch of `num_pairs` where there may be `most`: a power of two, from 2 on, or all."""
        return max(num_pairs, min(most, 1 << max(1, (num_pairs - 1).bit_length())))


def shapes_of(network: nn.Module) -> Shapes | None:
    """The shapes to call a network with where it, or a part of it, is compiled; None where any will do."""
    if not any(map(is_compiled, network.modules())):
        return None
    first = next((part for part in network.children() if isinstance(part, Transformer)), None)
    # How long an input may be is not known of other networks, so they are not given a longer one.
    return None if first is None else Shapes(position_limit(first.model.config))


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module itself is compiled."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
