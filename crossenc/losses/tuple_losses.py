"""Losses of a query, a positive and negatives, for texts. The arithmetic is in `contrastive` and `distillation`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from crossenc.errors import ConfigError, InputError
from crossenc.losses import contrastive, distillation
from crossenc.losses._citations import GAO_2021_GRADCACHE, HENDERSON_2017, HOFSTATTER_2020
from crossenc.losses._grad_cache import cached_loss
from crossenc.losses._texts import Column, Labels, Pair, ScoresPairs, TextLoss, tuple_pairs
from crossenc.losses.pointwise import Reduction

_SIGMOID = torch.nn.Sigmoid()


class MarginMSELoss(TextLoss):
    """`crossenc.losses.margin_mse` for columns query, positive, negative_1, ..., negative_n.

    A label is what the teacher gave: n + 1 scores in the order of the columns, or n leads of the positive over the
    negatives; with one negative also a single number, its lead.
    """

    def __init__(
        self, model: ScoresPairs, activation_fn: torch.nn.Module | None = None, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(model, activation_fn)
        self.reduction = reduction

    def forward(
        self, inputs: Sequence[Column], labels: Labels, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, Q texts a column, and `labels` [Q], [Q, n] or [Q, n + 1]."""
        if len(inputs) < 3:
            raise InputError(f"MarginMSELoss takes columns query, positive, negative, ...; got {len(inputs)}")
        pairs = tuple_pairs(inputs[0], inputs[1:])
        teacher = self._teacher_scores(labels, len(inputs[0]), len(inputs) - 1)
        scores = self.activation_fn(self._logits(pairs, prompt))
        return self.compute(scores.reshape(len(inputs) - 1, -1).T, teacher)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of scores [Q, N], positive first, and the teacher's; `activation_fn` has been applied to them."""
        return distillation.margin_mse(scores, labels, mask, reduction=self.reduction)

    @property
    def citation(self) -> str:
        return HOFSTATTER_2020

    def _teacher_scores(self, labels: Labels, num_queries: int, num_documents: int) -> Tensor:
        """The labels as scores [Q, N]; leads become the scores of negatives of a positive with score 0."""
        given = labels if isinstance(labels, Tensor) else torch.stack([torch.as_tensor(values) for values in labels])
        given = given.to(self.model.device)
        if given.shape == (num_queries, num_documents):
            return given
        leads = given[:, None] if given.ndim == 1 else given
        if leads.shape != (num_queries, num_documents - 1):
            raise InputError(
                f"MarginMSELoss got labels of shape {tuple(given.shape)} for {num_queries} queries with "
                f"{num_documents - 1} negatives: give the leads of the positive, one a negative, or the scores of "
                "positive and negatives"
            )
        return torch.cat([torch.zeros_like(leads[:, :1]), -leads], dim=1)


class MultipleNegativesRankingLoss(TextLoss):
    """`crossenc.losses.multiple_negatives_ranking` for columns query, positive and, if any, hard negatives.

    Each query's positive stands against its own hard negatives and `num_negatives` documents of the batch's other
    queries, drawn by torch's random numbers; all of them when None. Two queries with the same positive make a false
    negative: keep such out of one batch.
    """

    def __init__(
        self,
        model: ScoresPairs,
        num_negatives: int | None = 4,
        scale: float = 10.0,
        activation_fn: torch.nn.Module | None = _SIGMOID,
    ) -> None:
        super().__init__(model, activation_fn)
        if num_negatives is not None and num_negatives < 0:
            raise ConfigError(f"num_negatives is {num_negatives}: give a number of documents, or None for all")
        self.num_negatives = num_negatives
        self.scale = scale

    def forward(
        self, inputs: Sequence[Column], labels: Tensor | None = None, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, Q texts a column; `labels` say nothing and are not looked at."""
        return self._loss_of(self._logits(self._pairs(inputs), prompt), len(inputs[0]))

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits [Q, N] that are there already; positives have labels above 0."""
        return contrastive.multiple_negatives_ranking(
            scores, labels, mask, scale=self.scale, activation_fn=self.activation_fn
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "num_negatives": self.num_negatives, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        return HENDERSON_2017

    def _pairs(self, inputs: Sequence[Column]) -> list[Pair]:
        """Column by column: the positives, the documents drawn from the batch, the hard negatives."""
        if len(inputs) < 2:
            raise InputError(f"{self._name} takes columns query, positive, negative, ...; got {len(inputs)}")
        queries, positives, *hard_negatives = inputs
        return tuple_pairs(queries, [positives, *self._in_batch_negatives(inputs[1:]), *hard_negatives])

    def _loss_of(self, logits: Tensor, num_queries: int) -> Tensor:
        """The loss of the logits of `_pairs`."""
        logits_QN = logits.reshape(-1, num_queries).T
        labels_QN = torch.zeros_like(logits_QN, requires_grad=False)
        labels_QN[:, 0] = 1
        return self.compute(logits_QN, labels_QN)

    def _in_batch_negatives(self, columns: Sequence[Column]) -> list[list[str]]:
        """Columns of documents that belong to another query of the batch, no document twice for a query."""
        num_queries, num_columns = len(columns[0]), len(columns)
        documents = [document for column in columns for document in column]
        of_others = ~torch.eye(num_queries, dtype=torch.bool).repeat(1, num_columns)
        num_others = len(documents) - num_columns
        num_negatives = num_others if self.num_negatives is None else min(self.num_negatives, num_others)
        if num_negatives in (0, num_others):
            chosen = of_others.nonzero()[:, 1].reshape(num_queries, -1)[:, :num_negatives]
        else:
            chosen = torch.multinomial(of_others.float(), num_negatives)
        return [[documents[position] for position in column] for column in chosen.T.tolist()]


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss for batches of any size: `mini_batch_size` pairs are in memory at a time.

    Value and gradients are the same; every pair is scored twice, the second time in the backward pass. Do not
    combine it with gradient checkpointing, which would score a third time.
    """

    def __init__(
        self,
        model: ScoresPairs,
        num_negatives: int | None = 4,
        scale: float = 10.0,
        activation_fn: torch.nn.Module | None = _SIGMOID,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(model, num_negatives, scale, activation_fn)
        if mini_batch_size < 1:
            raise ConfigError(f"mini_batch_size is {mini_batch_size}: give a number of pairs from 1")
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar

    def forward(
        self, inputs: Sequence[Column], labels: Tensor | None = None, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of `inputs`, Q texts a column; `labels` say nothing and are not looked at."""
        pairs = self._pairs(inputs)
        parts: Iterable[list[Pair]] = [
            pairs[start : start + self.mini_batch_size] for start in range(0, len(pairs), self.mini_batch_size)
        ]
        if self.show_progress_bar:
            parts = track(parts, description="Scoring mini-batches")
        return cached_loss(
            parts,
            lambda part: self._logits(part, prompt),
            lambda logits: self._loss_of(logits, len(inputs[0])),
            self.model.device,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        return GAO_2021_GRADCACHE
