"""What every loss does first and last: checked shapes, float32, empty padding, means over what is there.

Knows tensors only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossenc.errors import InputError


def prepare(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and labels [Q, N] in at least float32, 0 where there is no document, and the mask itself.

    Whatever stands at a masked place, NaN included, touches neither value nor gradient. `mask=None` means that
    every place holds a document. Raises InputError for shapes that differ or are not two-dimensional.
    """
    if scores.ndim != 2:
        raise InputError(f"scores have shape {tuple(scores.shape)}; give [queries, documents], padded")
    mask = valid_mask(scores, labels, mask)
    scores = at_least_float32(scores).masked_fill(~mask, 0.0)
    return scores, labels.detach().to(scores.dtype).masked_fill(~mask, 0.0), mask


def valid_mask(scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """`mask`, or one that is True everywhere; raises InputError unless all three have one shape."""
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    if not scores.shape == labels.shape == mask.shape:
        raise InputError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} need one shape"
        )
    if mask.dtype != torch.bool:
        raise InputError(f"the mask has dtype {mask.dtype}; give a bool tensor, True where there is a document")
    return mask


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return values.float() if values.dtype.itemsize < 4 else values


def fill_lowest(values: Tensor, mask: Tensor) -> Tensor:
    """The lowest finite number where `mask` is False: no weight in a softmax, and no NaN in an empty row."""
    return values.masked_fill(~mask, torch.finfo(values.dtype).min)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a loss is a mean of: queries, documents or pairs of documents, Q queries first in both shapes.

    `values` are 0 where the `weights`, numbers or truth values of the same shape, are; `unit` is what one unit of the
    loss is in `values`, for logarithms of another base.
    """

    values: Tensor
    weights: Tensor
    unit: float = 1.0

    @classmethod
    def where(cls, mask: Tensor, values: Tensor, unit: float = 1.0) -> "Terms":
        """`values` where `mask` is True, each counting 1."""
        return cls(values.masked_fill(~mask, 0.0), mask, unit)

    @classmethod
    def at(cls, mask: Tensor, values: Tensor) -> "Terms":
        """As many `values` as there are places where `mask` is True, in their order, each counting 1."""
        return cls(values.new_zeros(mask.shape).masked_scatter(mask, values), mask)

    def mean(self) -> Tensor:
        """The loss, a scalar; 0, with a gradient of 0, where nothing counts."""
        total = self.weights.sum()
        return self.values.sum() / torch.where(total > 0, total, 1) / self.unit

    def sums(self) -> tuple[Tensor, Tensor]:
        """The sums [Q] of each query's values, in units of the loss, and of their weights; their quotient is `mean`."""
        values, weights = (part[..., None].flatten(1).sum(dim=1) for part in (self.values, self.weights))
        return values / self.unit, weights.to(values.dtype)
