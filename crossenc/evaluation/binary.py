"""Measures of yes-or-no and of many-class predictions, and correlations. Numbers in, numbers out; knows no model.

A score says yes when it is at or above a threshold; equal scores are never told apart.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]


class BestAccuracy(NamedTuple):
    """The highest accuracy that a threshold reaches, and the threshold."""

    accuracy: float
    threshold: float


class BestF1(NamedTuple):
    """The highest F1 that a threshold reaches, with its precision and recall, and the threshold."""

    f1: float
    precision: float
    recall: float
    threshold: float


class _Cuts(NamedTuple):
    """Every way to cut P documents in order of score into yes and no, G of them, fewest yes first.

    `last` int64 [G] is the place of the last yes, `num_yes` and `num_true` int64 [G] count yes and true among them;
    `scores` [P] is in order, high first; `num_positive` counts true among all.
    """

    scores: Scores
    last: NDArray[np.int64]
    num_yes: NDArray[np.int64]
    num_true: NDArray[np.int64]
    num_positive: int


def best_accuracy(scores: Scores, labels: NDArray[Any]) -> BestAccuracy:
    """The best accuracy for scores [P] and labels [P], of which 1 means true.

    Of equally good thresholds it is the highest, halfway between two scores; above all scores when it is best to
    say no to everything.
    """
    cuts = _cuts(scores, labels)
    num_pairs = len(scores)
    num_negative = num_pairs - cuts.num_positive
    num_right = np.concatenate([[num_negative], cuts.num_true + num_negative - (cuts.num_yes - cuts.num_true)])
    best = int(num_right.argmax())
    if best == 0:
        threshold = np.nextafter(cuts.scores[0], np.inf, dtype=cuts.scores.dtype)
    else:
        threshold = _threshold(cuts, best - 1)
    return BestAccuracy(float(num_right[best] / num_pairs), float(threshold))


def best_f1(scores: Scores, labels: NDArray[Any]) -> BestF1:
    """The best F1 for scores [P] and labels [P], of which 1 means true; all 0 when none is.

    Of equally good thresholds it is the highest, halfway between two scores.
    """
    cuts = _cuts(scores, labels)
    if not cuts.num_positive:
        return BestF1(0.0, 0.0, 0.0, 0.0)
    precision = cuts.num_true / cuts.num_yes
    recall = cuts.num_true / cuts.num_positive
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    best = int(f1.argmax())
    return BestF1(float(f1[best]), float(precision[best]), float(recall[best]), float(_threshold(cuts, best)))


def average_precision(scores: Scores, labels: NDArray[Any]) -> float:
    """The precision at each threshold, weighted by the recall it adds; 0 when no label is 1."""
    cuts = _cuts(scores, labels)
    if not cuts.num_positive:
        return 0.0
    gained = np.diff(cuts.num_true, prepend=0) / cuts.num_positive
    return float((gained * cuts.num_true / cuts.num_yes).sum())


class ClassF1(NamedTuple):
    """F1 over classes: their mean, of all decisions together, and their mean weighted by how often each occurs."""

    macro: float
    micro: float
    weighted: float


def class_f1(predicted: NDArray[np.int64], labels: NDArray[Any]) -> ClassF1:
    """F1 of predicted classes [P] against true ones [P], over the classes that occur among either.

    A class that is never right counts as 0. With one class a pair, micro F1 is the accuracy.
    """
    classes, numbers = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    true, guessed = numbers[: len(labels)], numbers[len(labels) :]
    num_classes = len(classes)
    support = np.bincount(true, minlength=num_classes)
    num_guessed = np.bincount(guessed, minlength=num_classes)
    num_right = np.bincount(true[true == guessed], minlength=num_classes)
    f1 = 2 * num_right / (support + num_guessed)
    return ClassF1(
        macro=float(f1.mean()),
        micro=float(num_right.sum() / len(labels)),
        weighted=float((f1 * support).sum() / len(labels)),
    )


def pearson(left: Scores, right: Scores) -> float:
    """The linear correlation of two columns [P]; NaN when one of them is constant or shorter than 2."""
    if len(left) < 2 or left.min() == left.max() or right.min() == right.max():
        return float("nan")
    left, right = (column.astype(np.float64) - column.astype(np.float64).mean() for column in (left, right))
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    return float(np.clip(left @ right / norms, -1.0, 1.0)) if norms > 0 else float("nan")


def spearman(left: Scores, right: Scores) -> float:
    """The correlation of the ranks of two columns [P], equal values sharing the mean of theirs; NaN as `pearson`."""
    return pearson(_mean_ranks(left), _mean_ranks(right))


def _mean_ranks(values: Scores) -> NDArray[np.float64]:
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[numbers]
    return ranks


def _cuts(scores: Scores, labels: NDArray[Any]) -> _Cuts:
    """All cuts between different scores, and the one below the last."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    is_true = (np.asarray(labels)[order] == 1).cumsum()
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return _Cuts(ordered, last, last + 1, is_true[last], int(is_true[-1]))


def _threshold(cuts: _Cuts, cut: int) -> np.floating[Any]:
    """Halfway between the last yes and the first no; the last yes where there is no number between them."""
    place = cuts.last[cut]
    lowest_yes: np.floating[Any] = cuts.scores[place]
    if place == len(cuts.scores) - 1:
        return lowest_yes
    highest_no = cuts.scores[place + 1]
    middle: np.floating[Any] = (lowest_yes + highest_no) / 2
    return lowest_yes if middle == highest_no else middle
