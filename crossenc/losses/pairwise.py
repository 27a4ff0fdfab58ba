"""Losses over pairs of documents of one query, of which one should stand above the other. Tensors in, a scalar out.

Letters in shapes: Q queries, N documents of a query with padding. `mask` [Q, N] is True where there is a document, and
everywhere when None. All is computed in float32 at least.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from crossenc.errors import ConfigError
from crossenc.losses._shared import Terms, prepare
from crossenc.losses.weighting import BaseWeightingScheme, NDCGLoss2PPScheme, NoWeightingScheme

ReductionLog = Literal["natural", "binary"]

#: The scheme of `lambda_loss` unless another is given.
NDCG_LOSS2PP = NDCGLoss2PPScheme()


def rank_net(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    k: int | None = None,
    sigma: float = 1.0,
    reduction_log: ReductionLog = "binary",
) -> Tensor:
    """For every two documents with different labels, the one with the higher label should have the higher score.

    Formula: `-log2 sigmoid(sigma (s_i - s_j))`, mean over all pairs (i, j) of the batch with y_i > y_j; the natural
    logarithm with `reduction_log="natural"`. With `k`, only pairs of which at least one document is among the k that
    the scores put first. Shapes: scores (logits) and labels [Q, N]; only the order of the labels counts.

    Prefer it when the labels are an order rather than grades, above all the ranking of a large language model. With
    graded labels and nDCG as the goal, `lambda_loss` weighs the pairs that matter.
    Paper: Burges et al. 2005, Learning to Rank using Gradient Descent.
    """
    return lambda_loss(scores, labels, mask, weighting_scheme=None, k=k, sigma=sigma, reduction_log=reduction_log)


def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    weighting_scheme: BaseWeightingScheme | None = NDCG_LOSS2PP,
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    reduction_log: ReductionLog = "binary",
) -> Tensor:
    """Like `rank_net`, but a pair counts by how much nDCG depends on it.

    Formula: `-w_ij log2 sigmoid(sigma (s_i - s_j))`, mean over all pairs (i, j) of the batch with y_i > y_j and, with
    `k`, i or j among the k best scores. `w` comes from a scheme of `crossenc.losses.weighting` (None is
    w = 1) and takes the present order of the scores as given: no gradient flows through it. `eps` keeps a query
    without relevant documents from dividing by 0. Shapes: scores (logits) and labels [Q, N]; labels are grades or
    probabilities, of which those below 0 gain nothing.

    Prefer it for graded lists of several documents when nDCG is the goal: the strongest of the listwise family in
    practice. Memory grows with Q N^2. With an order instead of grades take `rank_net`.
    Paper: Wang et al. 2018, The LambdaLoss Framework for Ranking Metric Optimization.
    Raises ConfigError for k below 1 or an unknown `reduction_log`.
    """
    return lambda_terms(
        scores,
        labels,
        mask,
        weighting_scheme=weighting_scheme,
        k=k,
        sigma=sigma,
        eps=eps,
        reduction_log=reduction_log,
    ).mean()


def lambda_terms(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    weighting_scheme: BaseWeightingScheme | None = NDCG_LOSS2PP,
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    reduction_log: ReductionLog = "binary",
) -> Terms:
    """What `lambda_loss` is the mean of: pairs of documents [Q, N, N] in the order of the scores, best first."""
    check_options(k, reduction_log)
    weighting_scheme = weighting_scheme or NoWeightingScheme()
    scores, labels, mask = prepare(scores, labels, mask)
    order = scores.detach().masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    scores, labels, mask = (values.gather(1, order) for values in (scores, labels, mask))

    counted = mask[:, :, None] & mask[:, None, :]
    if not weighting_scheme.uses_all_pairs:
        counted = counted & (labels[:, :, None] > labels[:, None, :])
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    if k is not None:
        counted = counted & ((ranks[:, None] <= k) | (ranks[None, :] <= k))

    discounts = torch.log2(1.0 + ranks.to(scores.dtype))[None, :]
    grades = labels.clamp(min=0.0)
    weights = weighting_scheme(_normalised_gains(grades, discounts, k, eps), discounts, grades)
    log_probabilities = functional.logsigmoid(sigma * (scores[:, :, None] - scores[:, None, :]))
    return Terms.where(counted, -weights * log_probabilities, math.log(2) if reduction_log == "binary" else 1.0)


def check_options(k: int | None, reduction_log: str) -> None:
    """Raise ConfigError for a cutoff or a logarithm that `lambda_loss` does not have."""
    if reduction_log not in ("natural", "binary"):
        raise ConfigError(f"reduction_log is {reduction_log!r}: choose natural or binary")
    if k is not None and k < 1:
        raise ConfigError(f"k is {k}: give a number of documents from 1, or None for all")


def _normalised_gains(grades: Tensor, discounts: Tensor, k: int | None, eps: float) -> Tensor:
    """`2^grade - 1` [Q, N] divided by the best DCG@k of each query."""
    if not grades.shape[1]:
        return grades
    # Divided by 2^highest on both sides, so that no grade overflows.
    highest = grades.amax(dim=1, keepdim=True)
    gains = torch.exp2(grades - highest) - torch.exp2(-highest)
    best_first = gains.sort(dim=1, descending=True).values
    return gains / (best_first / discounts)[:, :k].sum(dim=1, keepdim=True).clamp(min=eps)
