"""Losses over the whole list of a query's documents. Tensors in, a scalar out; no model.

Letters in shapes: Q queries, N documents of a query with padding. `mask` [Q, N] is True where there is a document, and
everywhere when None. A query without documents does not count. All is computed in float32 at least.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crossenc.losses._shared import Terms, fill_lowest, prepare

#: Keeps the weights of a list of one document, which sum to 0, from dividing by 0.
_EPS = 1e-10


def list_net(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The scores, as probabilities of standing first, should be those of the labels.

    Formula: `-sum_i softmax(y)_i log softmax(s)_i`, mean over queries. Shapes: scores (logits) and labels [Q, N];
    grades or logits, since a softmax is taken of them. A list of one document teaches nothing.

    Prefer it for graded lists with few relevant documents when `lambda_loss` is too slow for their length: it takes
    time and memory in proportion to N. To copy a teacher, `kl_distillation` has the same gradient and a value that
    ends at 0. Labels of 0 and 1 give soft targets: of a list with one relevant document among ten, that document's
    share is 0.23.
    Paper: Cao et al. 2007, Learning to Rank: From Pairwise Approach to Listwise Approach.
    """
    return list_net_terms(scores, labels, mask).mean()


def list_net_terms(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Terms:
    """What `list_net` is the mean of: queries [Q]."""
    scores, labels, mask = prepare(scores, labels, mask)
    targets = fill_lowest(labels, mask).softmax(dim=1)
    log_probabilities = fill_lowest(scores, mask).log_softmax(dim=1).masked_fill(~mask, 0.0)
    return Terms.where(mask.any(dim=1), -(targets * log_probabilities).sum(dim=1))


def list_mle(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, respect_input_order: bool = False
) -> Tensor:
    """The order of the labels should be the likeliest of all orders.

    Formula: `-sum_i (s_i - logsumexp_{j >= i} s_j)` over the places i of the right order (Plackett and Luce: draw the
    first document, then the second of those left, ...), mean over queries. The right order is that of the labels,
    high first, equal ones as they come; with `respect_input_order` the documents already stand in it, and the labels
    are not looked at. Shapes: scores (logits) and labels [Q, N].

    Prefer it for full orders of short lists. It grows with the length of the list, and the tail counts as much as the
    top: `plist_mle` is better where the top matters, `list_net` where labels tie.
    Paper: Xia et al. 2008, Listwise Approach to Learning to Rank: Theory and Algorithm.
    """
    return plist_mle(scores, labels, mask, lambda_weight=None, respect_input_order=respect_input_order)


def position_weights(mask: Tensor) -> Tensor:
    """`2^(n - rank) - 1` for each of the n documents of a row, in order and ranks from 1; 0 for padding, float32.

    Lists of more than 127 documents are scaled down as a whole, so that neither a weight nor their sum overflows.
    """
    num_documents = mask.sum(dim=1, keepdim=True)
    ranks = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    excess = (num_documents - 127).clamp(min=0)
    weights = torch.exp2((num_documents - ranks - excess).float()) - torch.exp2(-excess.float())
    return weights.masked_fill(~mask, 0.0)


def plist_mle(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    lambda_weight: Callable[[Tensor], Tensor] | None = position_weights,
    respect_input_order: bool = False,
) -> Tensor:
    """Like `list_mle`, but the first places count more than the last.

    Formula: `-sum_i w_i (s_i - logsumexp_{j >= i} s_j)`, mean over queries. `lambda_weight` gives the w of the places
    from a mask [Q, N] whose documents stand at the left of each row; they are divided by their sum. None weighs every
    place 1, without division, which is `list_mle`. The right order is found as there. Shapes: scores (logits) and
    labels [Q, N].

    Prefer it over `list_mle` for rankings, where the top matters: the default weights halve from place to place. For
    grades with many ties `lambda_loss` is better.
    Paper: Lan et al. 2014, Position-Aware ListMLE: A Sequential Learning Process for Ranking.
    """
    return plist_mle_terms(
        scores, labels, mask, lambda_weight=lambda_weight, respect_input_order=respect_input_order
    ).mean()


def plist_mle_terms(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    lambda_weight: Callable[[Tensor], Tensor] | None = position_weights,
    respect_input_order: bool = False,
) -> Terms:
    """What `plist_mle` is the mean of: queries [Q]."""
    scores, labels, mask = prepare(scores, labels, mask)
    wanted = torch.zeros_like(labels) if respect_input_order else labels
    order = fill_lowest(wanted, mask).argsort(dim=1, descending=True, stable=True)
    scores, mask = scores.gather(1, order), mask.gather(1, order)
    log_normalizers = fill_lowest(scores, mask).flip(1).logcumsumexp(dim=1).flip(1)
    log_probabilities = (scores - log_normalizers).masked_fill(~mask, 0.0)
    if lambda_weight is not None:
        weights = lambda_weight(mask)
        log_probabilities = log_probabilities * (weights / (weights.sum(dim=1, keepdim=True) + _EPS))
    return Terms.where(mask.any(dim=1), -log_probabilities.sum(dim=1))


def adr_mse(scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, alpha: float = 1.0) -> Tensor:
    """Each document's rank, made smooth, should be the rank that the labels give it; the top counts more.

    Formula: `(r_i - a_i)^2 / log2(r_i + 1)`, mean over the documents of the batch, with the rank r by label (equal
    labels share the mean of their ranks) and `approximate_ranks` a. Shapes: scores (logits) and labels [Q, N]; only
    the order of the labels counts.

    Prefer it, or `rank_net`, to learn the order that a large language model gave. Memory grows with Q N^2; a higher
    `alpha` comes closer to true ranks and has weaker gradients.
    Paper: Schlatt et al. 2025, Rank-DistiLLM, arXiv 2405.07920.
    """
    return adr_mse_terms(scores, labels, mask, alpha=alpha).mean()


def adr_mse_terms(scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, alpha: float = 1.0) -> Terms:
    """What `adr_mse` is the mean of: documents [Q, N]."""
    scores, labels, mask = prepare(scores, labels, mask)
    above = (labels[:, None, :] > labels[:, :, None]) & mask[:, None, :]
    equal = (labels[:, None, :] == labels[:, :, None]) & mask[:, None, :]
    ranks = above.sum(dim=2) + (equal.sum(dim=2) + 1).to(scores.dtype) / 2
    errors = (ranks - approximate_ranks(scores, mask, alpha)).square() / torch.log2(ranks + 1.0)
    return Terms.where(mask, errors)


def approximate_ranks(scores: Tensor, mask: Tensor, alpha: float = 1.0) -> Tensor:
    """Smooth ranks [Q, N] from 1: `1 + sum_{j != i} sigmoid(alpha (s_j - s_i))`.

    Paper: Qin, Liu and Li 2010, A General Approximation Framework for Direct Optimization of IR Measures.
    """
    scores = scores.masked_fill(~mask, 0.0)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    above = torch.sigmoid(alpha * (scores[:, None, :] - scores[:, :, None]))
    return 1.0 + above.masked_fill(itself | ~mask[:, None, :], 0.0).sum(dim=2)
