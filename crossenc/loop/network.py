"""The forward pass in training: packed where that computes what padding would, padded otherwise.

Shape letters: B pairs, L labels.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from crossenc.packing import PackedForward, why_padded
from crossenc.records import TokenizedPairs

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder


class TrainingNetwork(nn.Module):
    """A cross-encoder as a module of tokenised pairs, which DistributedDataParallel can wrap.

    Its parameters are the model's own. With `recomputes` the model computes activations again in the backward pass
    (gradient checkpointing), where nothing tells it of packed batches: these are padded then.
    """

    def __init__(self, model: "CrossEncoder", *, recomputes: bool = False) -> None:
        super().__init__()
        reason = "activations are computed again" if recomputes else why_padded(model, model.device)
        #: For people: "packed", or "padded" and why.
        self.forward_kind = "packed" if reason is None else f"padded: {reason}"
        self._packed = PackedForward(model, model.device) if reason is None else None
        self.network: Any = model if self._packed is None else self._packed.view
        self._inputs = model.batch_inputs
        self.train()

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def forward(self, pairs: TokenizedPairs, batch: NDArray[np.int64]) -> Tensor:
        """Logits [B, L] of the pairs at `batch`, with gradients where they are enabled."""
        if self._packed is not None:
            return self._packed(pairs, batch)
        logits: Tensor = self.network(self._inputs(pairs, batch))["scores"]
        return logits
