"""Losses that look at one document at a time, by its label. Tensors in, a scalar out; no model.

Letters in shapes: Q queries, N documents of a query with padding, L labels a document. A list of P separate pairs
is as welcome as a matrix: any shape will do, as long as scores, labels and mask share it. `mask` is True where there
is a document, and everywhere when None. All is computed in float32 at least.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from crossenc.errors import InputError
from crossenc.losses._shared import Terms, at_least_float32, valid_mask

Reduction = Literal["mean", "sum", "none"]


def binary_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    pos_weight: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Each document is judged alone: is it relevant?

    Formula, with p = sigmoid(s): `-(pos_weight y log p + (1 - y) log(1 - p))`, mean over documents.
    Shapes: scores (logits) and labels [Q, N] or [P]; labels are 0 or 1, or probabilities between them. `weight`
    multiplies the loss of each document and broadcasts to the shape of the scores.

    Prefer it first: with labelled pairs and mined hard negatives it is hard to beat, and its scores can be read as
    probabilities. With n negatives for a positive, `pos_weight=n` weighs both sides alike. For several classes take
    `cross_entropy`; for grades or a teacher's order take a listwise loss.
    Paper: Nogueira and Cho 2019, Passage Re-ranking with BERT, arXiv 1901.04085.
    """
    mask = valid_mask(scores, labels, mask)
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=torch.float32, device=scores.device)
    logits = at_least_float32(scores)[mask]
    if not logits.numel():
        return logits.sum()
    return functional.binary_cross_entropy_with_logits(
        logits,
        labels[mask].to(logits.dtype),
        weight=None if weight is None else weight.to(logits).expand_as(mask)[mask],
        pos_weight=pos_weight,
        reduction=reduction,
    )


def binary_cross_entropy_terms(
    scores: Tensor, labels: Tensor, mask: Tensor, *, pos_weight: float | Tensor | None = None
) -> Terms:
    """What `binary_cross_entropy` is the mean of: documents, shaped like the scores."""
    return Terms.at(mask, binary_cross_entropy(scores, labels, mask, pos_weight=pos_weight, reduction="none"))


def cross_entropy(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Each document belongs to one of L classes: which?

    Formula: `-log softmax(s)[class]`, mean over documents (weighted by `weight` [L], one weight a class, if given).
    Shapes: scores (logits) [Q, N, L] or [P, L]; labels are class numbers [Q, N] or [P], or probabilities shaped like
    the scores. Documents of class `ignore_index` do not count; `label_smoothing` moves that share of the probability
    to all classes evenly.

    Prefer it when the labels are kinds rather than degrees (entailment, duplicate or not by two outputs). For one
    yes or no take `binary_cross_entropy`; for ordered grades a listwise loss, which knows that 2 lies above 1.
    Paper: Bridle 1990, Probabilistic Interpretation of Feedforward Classification Network Outputs.
    """
    logits = at_least_float32(scores)
    if labels.shape not in (scores.shape, scores.shape[:-1]):
        raise InputError(
            f"labels {tuple(labels.shape)} do not fit scores {tuple(scores.shape)}: give a class number for each "
            "document, or a probability for each score"
        )
    mask = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device) if mask is None else mask
    target = labels[mask]
    if not len(target):
        return logits[mask].sum()
    return functional.cross_entropy(
        logits[mask],
        target.to(logits.dtype) if target.is_floating_point() else target.long(),
        weight=None if weight is None else weight.to(logits),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def cross_entropy_terms(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Terms:
    """What `cross_entropy` of class numbers is the weighted mean of: documents, shaped like the labels."""
    classes = labels.masked_fill(~mask, 0).long()
    losses = cross_entropy(
        scores,
        classes,
        mask,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    counted = mask & (classes != ignore_index)
    terms = Terms.at(mask, losses)
    if weight is None:
        return Terms(terms.values, counted)
    return Terms(terms.values, weight.to(losses)[classes.masked_fill(~counted, 0)].masked_fill(~counted, 0.0))


def mse(scores: Tensor, labels: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean") -> Tensor:
    """Each score should be the number that a teacher, or a person, gave.

    Formula: `(s - y)^2`, mean over documents. Shapes: scores and labels [Q, N] or [P].

    Prefer it to copy a teacher whose scale matters, for example to keep thresholds, or for graded similarity. Scores
    and labels must share a scale: raw logits for a teacher's logits, a sigmoid for labels between 0 and 1. Where only
    the order matters, `margin_mse` and `kl_distillation` leave the student its own offset.
    Paper: Hofstätter et al. 2020, arXiv 2010.02666.
    """
    mask = valid_mask(scores, labels, mask)
    predictions = at_least_float32(scores)[mask]
    if not predictions.numel():
        return predictions.sum()
    return functional.mse_loss(predictions, labels.detach()[mask].to(predictions.dtype), reduction=reduction)


def mse_terms(scores: Tensor, labels: Tensor, mask: Tensor) -> Terms:
    """What `mse` is the mean of: documents, shaped like the scores."""
    return Terms.at(mask, mse(scores, labels, mask, reduction="none"))
