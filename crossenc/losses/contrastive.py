"""Losses that pick the relevant document out of a list of others. Tensors in, a scalar out; no model.

Letters in shapes: Q queries, N documents of a query with padding. `mask` [Q, N] is True where there is a document, and
everywhere when None. A document is positive when its label is above 0. All is computed in float32 at least.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from crossenc.losses._shared import Terms, fill_lowest, prepare


def localized_contrastive(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """A softmax over one positive and the hard negatives of its own query: the positive should win.

    Formula: `-log(e^s_p / (e^s_p + sum_n e^s_n))` for each positive p, n over the negatives of the same query; mean
    over the positives of the batch. A second positive of the query is no negative, and is left out of the sum.
    Shapes: scores (logits) and labels [Q, N]. A query without positives adds nothing; one without negatives adds 0.

    Prefer it with negatives taken from the very retriever that is to be reranked: the model then learns the
    difference between what it will be shown, rather than the easy one between topics, as with random documents of
    `multiple_negatives_ranking`. It needs several negatives a query (7 to 31 in the paper).
    Paper: Gao, Dai and Callan 2021, Rethink Training of BERT Rerankers in Multi-Stage Retrieval Pipeline,
    arXiv 2101.08751.
    """
    return localized_contrastive_terms(scores, labels, mask).mean()


def localized_contrastive_terms(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Terms:
    """What `localized_contrastive` is the mean of: documents [Q, N], of which positives count."""
    scores, labels, mask = prepare(scores, labels, mask)
    is_positive = mask & (labels > 0)
    negatives = torch.logsumexp(fill_lowest(scores, mask & ~is_positive), dim=1, keepdim=True)
    return Terms.where(is_positive, -functional.logsigmoid(scores - negatives))


def multiple_negatives_ranking(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 10.0,
    activation_fn: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Tensor:
    """A softmax over one positive and documents of other queries, for data that has positives only.

    Formula: that of `localized_contrastive` on `scale * activation_fn(s)`; with the sigmoid, no score can run away,
    and `scale` sets how sharp the choice is. Shapes: scores (logits) and labels [Q, N], each row holding a positive
    and the negatives that somebody drew for it; MultipleNegativesRankingLoss draws them from the batch.

    Prefer it when there are questions with answers and nothing else. As soon as there are hard negatives,
    `localized_contrastive` or `binary_cross_entropy` on them teaches more, pair for pair.
    Papers: Henderson et al. 2017, arXiv 1705.00652; van den Oord et al. 2018, arXiv 1807.03748 (InfoNCE).
    """
    scores, labels, mask = prepare(scores, labels, mask)
    return localized_contrastive(scale * activation_fn(scores), labels, mask)
