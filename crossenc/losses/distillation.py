"""Losses that copy a teacher's scores up to what a ranking cannot see. Tensors in, a scalar out; no model.

Letters in shapes: Q queries, N documents of a query with padding. `mask` [Q, N] is True where there is a document, and
everywhere when None. Scores are raw logits: a sigmoid on them would flatten the differences that are to be learned.
All is computed in float32 at least.
"""

from typing import Literal

from torch import Tensor

from crossenc.errors import ConfigError
from crossenc.losses._shared import Terms, fill_lowest, prepare
from crossenc.losses.pointwise import mse, mse_terms


def margin_mse(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The positive should lead each negative by as much as the teacher's does.

    Formula: `((s_0 - s_i) - (y_0 - y_i))^2`, mean over the negatives i of the batch. The first document of each row
    is the positive. Shapes: scores (logits) and labels (teacher's scores) [Q, N], N at least 2.

    Prefer it to copy a cross-encoder on triplets, one or a few negatives for a positive: the offset, which differs
    from teacher to teacher and changes no ranking, is free. With lists of many scored documents `kl_distillation`
    uses all of their differences; to keep the teacher's scale take `mse`.
    Paper: Hofstätter et al. 2020, Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation, arXiv 2010.02666.
    """
    return mse(*_leads(scores, labels, mask), reduction=reduction)


def margin_mse_terms(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Terms:
    """What `margin_mse` is the mean of: negatives [Q, N - 1]."""
    return mse_terms(*_leads(scores, labels, mask))


def _leads(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """How far the first document leads each other one, by the student and by the teacher, and where both are there."""
    scores, labels, mask = prepare(scores, labels, mask)
    return scores[:, :1] - scores[:, 1:], labels[:, :1] - labels[:, 1:], mask[:, :1] & mask[:, 1:]


def kl_distillation(scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """The student should spread its probability over a query's documents as the teacher does.

    Formula: `T^2 sum_i p_i (log p_i - log q_i)`, mean over queries, with the teacher's `p = softmax(y / T)`, the
    student's `q = softmax(s / T)` and T the `temperature`; T^2 keeps the size of the gradient. Shapes: scores
    (logits) and labels (teacher's logits) [Q, N].

    Prefer it to copy a teacher that scored whole lists: it is 0 when the lists agree up to an offset, and errors
    among the best documents count most. A higher temperature lets the lower ones count more. For triplets
    `margin_mse` is enough; an order without scores needs `rank_net` or `adr_mse`.
    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    Raises ConfigError for a temperature that is not above 0.
    """
    return kl_distillation_terms(scores, labels, mask, temperature=temperature).mean()


def kl_distillation_terms(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Terms:
    """What `kl_distillation` is the mean of: queries [Q]."""
    check_temperature(temperature)
    scores, labels, mask = prepare(scores, labels, mask)
    student = fill_lowest(scores / temperature, mask).log_softmax(dim=1).masked_fill(~mask, 0.0)
    teacher = fill_lowest(labels / temperature, mask).log_softmax(dim=1)
    divergences = (teacher.exp() * (teacher.masked_fill(~mask, 0.0) - student)).sum(dim=1)
    return Terms.where(mask.any(dim=1), temperature**2 * divergences)


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for a temperature that `kl_distillation` cannot divide by."""
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}: give a number above 0, 1 for the probabilities as they are")
