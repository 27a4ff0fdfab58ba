"""Losses of queries with lists of documents and a label for each, for texts. The arithmetic is elsewhere:
`pairwise`, `listwise`, `contrastive` and `distillation`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crossenc.losses import contrastive, distillation, listwise, pairwise
from crossenc.losses._citations import (
    BURGES_2005,
    CAO_2007,
    GAO_2021_RERANKERS,
    HINTON_2015,
    LAN_2014,
    SCHLATT_2025,
    WANG_2018,
    XIA_2008,
)
from crossenc.losses._texts import Labels, ListLoss, ScoresPairs, full_name
from crossenc.losses.pairwise import NDCG_LOSS2PP, ReductionLog
from crossenc.losses.weighting import BaseWeightingScheme, NoWeightingScheme


class LambdaLoss(ListLoss):
    """`crossenc.losses.lambda_loss` for queries with lists of documents; `weighting_scheme=None` weighs pairs alike."""

    def __init__(
        self,
        model: ScoresPairs,
        weighting_scheme: BaseWeightingScheme | None = NDCG_LOSS2PP,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: ReductionLog = "binary",
        activation_fn: torch.nn.Module | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size)
        pairwise.check_options(k, reduction_log)
        self.weighting_scheme = weighting_scheme or NoWeightingScheme()
        self.k = k
        self.sigma = sigma
        self.eps = eps
        self.reduction_log = reduction_log

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return pairwise.lambda_loss(
            scores,
            labels,
            mask,
            weighting_scheme=self.weighting_scheme,
            k=self.k,
            sigma=self.sigma,
            eps=self.eps,
            reduction_log=self.reduction_log,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "weighting_scheme": full_name(self.weighting_scheme),
            "k": self.k,
            "sigma": self.sigma,
            "eps": self.eps,
            "reduction_log": self.reduction_log,
            **super().get_config_dict(),
        }

    @property
    def citation(self) -> str:
        return WANG_2018


class RankNetLoss(LambdaLoss):
    """`crossenc.losses.rank_net` for queries with lists of documents."""

    def __init__(
        self,
        model: ScoresPairs,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: ReductionLog = "binary",
        activation_fn: torch.nn.Module | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, None, k, sigma, eps, reduction_log, activation_fn, mini_batch_size)

    def get_config_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().get_config_dict().items() if name != "weighting_scheme"}

    @property
    def citation(self) -> str:
        return BURGES_2005


class ListNetLoss(ListLoss):
    """`crossenc.losses.list_net` for queries with lists of documents."""

    def __init__(
        self, model: ScoresPairs, activation_fn: torch.nn.Module | None = None, mini_batch_size: int | None = None
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return listwise.list_net(scores, labels, mask)

    @property
    def citation(self) -> str:
        return CAO_2007


class PListMLELambdaWeight(torch.nn.Module):
    """The weight of each place in PListMLELoss: `rank_discount_fn(mask)`, or `position_weights` when None."""

    def __init__(self, rank_discount_fn: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.rank_discount_fn = rank_discount_fn

    def forward(self, mask: Tensor) -> Tensor:
        """Weights [Q, N] from a mask whose documents stand at the left of each row; 0 for padding."""
        return (self.rank_discount_fn or listwise.position_weights)(mask)


_POSITION_WEIGHT = PListMLELambdaWeight()


class PListMLELoss(ListLoss):
    """`crossenc.losses.plist_mle` for queries with lists of documents; `lambda_weight=None` makes ListMLE of it.

    By default the documents of a list must stand in the right order already, best first, whatever the labels say;
    `respect_input_order=False` orders them by label.
    """

    def __init__(
        self,
        model: ScoresPairs,
        lambda_weight: PListMLELambdaWeight | None = _POSITION_WEIGHT,
        activation_fn: torch.nn.Module | None = None,
        mini_batch_size: int | None = None,
        respect_input_order: bool = True,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size)
        self.lambda_weight = lambda_weight
        self.respect_input_order = respect_input_order

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return listwise.plist_mle(
            scores, labels, mask, lambda_weight=self.lambda_weight, respect_input_order=self.respect_input_order
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "lambda_weight": None if self.lambda_weight is None else full_name(self.lambda_weight),
            **super().get_config_dict(),
            "respect_input_order": self.respect_input_order,
        }

    @property
    def citation(self) -> str:
        return LAN_2014


class ListMLELoss(PListMLELoss):
    """`crossenc.losses.list_mle` for queries with lists of documents, best first unless `respect_input_order=False`."""

    def __init__(
        self,
        model: ScoresPairs,
        activation_fn: torch.nn.Module | None = None,
        mini_batch_size: int | None = None,
        respect_input_order: bool = True,
    ) -> None:
        super().__init__(model, None, activation_fn, mini_batch_size, respect_input_order)

    def get_config_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().get_config_dict().items() if name != "lambda_weight"}

    @property
    def citation(self) -> str:
        return XIA_2008


class ADRMSELoss(ListLoss):
    """`crossenc.losses.adr_mse` for queries with lists of documents."""

    def __init__(
        self,
        model: ScoresPairs,
        alpha: float = 1.0,
        activation_fn: torch.nn.Module | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size)
        self.alpha = alpha

    def approximate_ranks(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Smooth ranks [Q, N] with this loss's `alpha`."""
        return listwise.approximate_ranks(scores, mask, self.alpha)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return listwise.adr_mse(scores, labels, mask, alpha=self.alpha)

    def get_config_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        return SCHLATT_2025


class KLDistillationLoss(ListLoss):
    """`crossenc.losses.kl_distillation` for queries with lists of documents, labelled with a teacher's logits."""

    def __init__(
        self,
        model: ScoresPairs,
        temperature: float = 1.0,
        activation_fn: torch.nn.Module | None = None,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size)
        distillation.check_temperature(temperature)
        self.temperature = temperature

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return distillation.kl_distillation(scores, labels, mask, temperature=self.temperature)

    def get_config_dict(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        return HINTON_2015


class LocalizedContrastiveLoss(ListLoss):
    """`crossenc.losses.localized_contrastive` for queries with hard negatives.

    Takes lists of documents with labels, positive above 0, or columns query, positive, negative_1, ... without labels.
    """

    def __init__(
        self, model: ScoresPairs, activation_fn: torch.nn.Module | None = None, mini_batch_size: int | None = None
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size)

    def forward(
        self,
        inputs: Sequence[Sequence[Any]],
        labels: Labels | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss of [queries, lists of documents] and labels [N] a query, or of columns and no labels."""
        if labels is None:
            queries, *columns = inputs
            lists = [list(documents) for documents in zip(*columns, strict=True)]
            labels = [torch.eye(1, len(documents))[0] for documents in lists]
            inputs = [queries, lists]
        return super().forward(inputs, labels, prompt, task)

    def compute(self, scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return contrastive.localized_contrastive(scores, labels, mask)

    @property
    def citation(self) -> str:
        return GAO_2021_RERANKERS
