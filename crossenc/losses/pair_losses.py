"""Losses of (query, document) pairs with a label each, for texts. The arithmetic is in `pointwise`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossenc.losses import pointwise
from crossenc.losses._citations import HOFSTATTER_2020
from crossenc.losses._texts import Column, ScoresPairs, TextLoss
from crossenc.losses.pointwise import Reduction


class BinaryCrossEntropyLoss(TextLoss):
    """`crossenc.losses.binary_cross_entropy` for two columns of texts and labels of 0 to 1.

    `pos_weight` multiplies the loss of positives; with n negatives for each, n is a good value.
    """

    def __init__(
        self,
        model: ScoresPairs,
        activation_fn: torch.nn.Module | None = None,
        pos_weight: float | Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(model, activation_fn)
        self.pos_weight = pos_weight
        self.weight = weight
        self.reduction = reduction

    def forward(
        self, inputs: Sequence[Column], labels: Tensor, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, [queries, documents], and `labels` [P]."""
        pairs = self._pair_columns(inputs)
        labels = self._one_label_each(labels, len(pairs))
        return self.compute(self.activation_fn(self._logits(pairs, prompt)), labels)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of scores that are there already; `activation_fn` has been applied to them."""
        return pointwise.binary_cross_entropy(
            scores, labels, mask, pos_weight=self.pos_weight, weight=self.weight, reduction=self.reduction
        )

    def get_config_dict(self) -> dict[str, Any]:
        pos_weight = self.pos_weight.tolist() if isinstance(self.pos_weight, Tensor) else self.pos_weight
        return {**super().get_config_dict(), "pos_weight": pos_weight}


class CrossEntropyLoss(TextLoss):
    """`crossenc.losses.cross_entropy` for two columns of texts and a class, or probabilities, for each pair."""

    required_num_labels = None

    def __init__(
        self,
        model: ScoresPairs,
        activation_fn: torch.nn.Module | None = None,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(model, activation_fn)
        self.weight = weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(
        self, inputs: Sequence[Column], labels: Tensor, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, [queries, documents], and `labels`: classes [P] or probabilities [P, L]."""
        pairs = self._pair_columns(inputs)
        if not labels.is_floating_point():
            labels = self._one_label_each(labels, len(pairs))
        logits = self.activation_fn(self._logits(pairs, prompt))
        return self.compute(logits, labels.to(self.model.device))

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of scores [..., L] that are there already; `activation_fn` has been applied to them."""
        return pointwise.cross_entropy(
            scores,
            labels,
            mask,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


class MSELoss(TextLoss):
    """`crossenc.losses.mse` for two columns of texts and a score for each pair, a teacher's as a rule."""

    def __init__(
        self, model: ScoresPairs, activation_fn: torch.nn.Module | None = None, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(model, activation_fn)
        self.reduction = reduction

    def forward(
        self, inputs: Sequence[Column], labels: Tensor, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, [queries, documents], and `labels` [P]."""
        pairs = self._pair_columns(inputs)
        labels = self._one_label_each(labels, len(pairs))
        return self.compute(self.activation_fn(self._logits(pairs, prompt)), labels)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of scores that are there already; `activation_fn` has been applied to them."""
        return pointwise.mse(scores, labels, mask, reduction=self.reduction)

    @property
    def citation(self) -> str:
        return HOFSTATTER_2020
