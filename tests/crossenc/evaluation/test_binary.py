import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.evaluation.binary import (
    average_precision,
    best_accuracy,
    best_f1,
    class_f1,
    pearson,
    spearman,
)

scored = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=1, max_size=12)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in rows], dtype=np.float32), np.array([label for _, label in rows])


def test_the_best_threshold_lies_halfway_between_two_scores():
    scores, labels = np.array([0.9, 0.1, 0.6, 0.3]), np.array([1, 0, 1, 0])
    assert best_accuracy(scores, labels) == (1.0, pytest.approx(0.45))
    assert best_f1(scores, labels) == (1.0, 1.0, 1.0, pytest.approx(0.45))
    assert average_precision(scores, labels) == 1.0


def test_the_best_of_imperfect_thresholds_is_found():
    scores, labels = np.array([4.0, 3, 2, 1]), np.array([1, 0, 1, 0])
    assert best_accuracy(scores, labels) == (0.75, 3.5)
    f1, precision, recall, threshold = best_f1(scores, labels)
    assert (f1, precision, recall, threshold) == (pytest.approx(0.8), pytest.approx(2 / 3), 1.0, 1.5)
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_when_no_is_always_right_the_threshold_is_just_above_all_scores():
    scores = np.array([0.5, 0.25], dtype=np.float32)
    accuracy, threshold = best_accuracy(scores, np.array([0, 0]))
    assert accuracy == 1.0 and threshold == np.nextafter(np.float32(0.5), np.float32(1))
    assert best_f1(scores, np.array([0, 0])) == (0, 0, 0, 0)
    assert average_precision(scores, np.array([0, 0])) == 0


def test_when_yes_is_always_right_the_threshold_is_the_lowest_score():
    scores = np.array([0.5, 0.25])
    assert best_accuracy(scores, np.array([1, 1])) == (1.0, 0.25)
    assert best_f1(scores, np.array([1, 1])) == (1, 1, 1, 0.25)


def test_two_neighbouring_floats_are_still_told_apart():
    low = np.float32(1)
    high = np.nextafter(low, np.float32(2))
    scores, labels = np.array([low, high]), np.array([0, 1])
    accuracy, threshold = best_accuracy(scores, labels)
    assert accuracy == 1 and ((scores >= np.float32(threshold)) == labels).all()


def test_equal_scores_are_not_told_apart():
    scores = np.zeros(4)
    assert best_accuracy(scores, np.array([1, 0, 1, 1])) == (0.75, 0)
    assert best_f1(scores, np.array([1, 0, 1, 1]))[:3] == (pytest.approx(6 / 7), 0.75, 1)
    assert average_precision(scores, np.array([1, 0, 1, 1])) == 0.75
    assert average_precision(scores, np.array([0, 1, 1, 1])) == 0.75


@given(rows=scored)
def test_thresholds_reach_what_is_promised_and_none_is_better(rows: list[tuple[int, int]]):
    scores, labels = columns(rows)

    def f1_at(threshold: float) -> float:
        yes = scores >= threshold
        return 2 * (yes & (labels == 1)).sum() / max((yes.sum() + labels.sum()), 1)

    thresholds = [*(value + half for value in range(-4, 5) for half in (0, 0.5))]
    accuracy, threshold = best_accuracy(scores, labels)
    assert accuracy == ((scores >= np.float32(threshold)) == labels).mean()
    assert accuracy == max(((scores >= other) == labels).mean() for other in thresholds)
    best = best_f1(scores, labels)
    assert best.f1 == pytest.approx(max(f1_at(other) for other in thresholds))
    if labels.any():
        assert best.f1 == pytest.approx(f1_at(best.threshold))


@given(rows=scored)
def test_the_order_of_pairs_does_not_matter(rows: list[tuple[int, int]]):
    for measure in (best_accuracy, best_f1, average_precision):
        assert measure(*columns(rows)) == measure(*columns(rows[::-1]))


def test_f1_of_classes_by_hand():
    # Class 0: 1 right of 1 guessed and 2 true, F1 2/3. Class 1: 1 of 2 and 1, 2/3. Class 2 is guessed once, never true.
    macro, micro, weighted = class_f1(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]))
    assert (macro, micro) == (pytest.approx((2 / 3 + 0.5 + 0) / 3), 0.5)
    assert weighted == pytest.approx((2 * 2 / 3 + 2 * 0.5) / 4)


def test_perfect_classes_have_f1_of_1():
    assert class_f1(np.array([3, 7, 3]), np.array([3, 7, 3])) == (1, 1, 1)


def test_correlations_by_hand():
    left, right = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert pearson(left, right) == pytest.approx(0.8) and spearman(left, right) == pytest.approx(0.8)
    assert pearson(left, left**3) == pytest.approx(0.951, abs=1e-3) and spearman(left, left**3) == pytest.approx(1)
    assert pearson(left, -2 * left) == pytest.approx(-1)


def test_equal_values_share_the_mean_of_their_ranks():
    # Ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman(np.array([5.0, 5, 9]), np.array([1.0, 2, 3])) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


@pytest.mark.parametrize("constant", [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]])
def test_a_constant_column_correlates_with_nothing(constant: list[float]):
    other = np.array([1.0, 2, 3])
    for measure in (pearson, spearman):
        assert math.isnan(measure(np.array(constant), other)) and math.isnan(measure(other, np.array(constant)))
        assert math.isnan(measure(np.array([1.0]), np.array([1.0])))
