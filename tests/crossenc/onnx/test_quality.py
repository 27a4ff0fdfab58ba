"""The figures that decide whether other scores rank as well, by hand."""

import numpy as np
import pytest

from crossenc.errors import InputError, ScoreError
from crossenc.onnx.quality import Limits, broken, compare

QUERIES = ["q1", "q1", "q1", "q2", "q2"]
DOCS = ["a", "b", "c", "a", "b"]
REFERENCE = np.array([3, 2, 1, 1, 2], np.float32)
QRELS = {"q1": {"a": 1}, "q2": {"b": 1}, "elsewhere": {"a": 1}}


def test_equal_scores_break_no_limit():
    quality = compare(REFERENCE, REFERENCE, QUERIES, DOCS, QRELS)
    assert (quality.num_queries, quality.num_pairs, quality.num_judged_queries) == (2, 5, 2)
    assert quality.ndcg == quality.reference_ndcg == 1.0 and quality.kendall_tau == 1.0
    assert quality.ndcg_drop_error == 0
    assert quality.max_difference == quality.top10_changed == quality.top10_swapped == 0
    assert broken(quality, Limits(ndcg_drop=0, max_difference=0, kendall_tau=1)) == []


def test_a_swap_of_two_documents_is_counted_by_hand():
    scores = np.array([2, 3, 1, 1, 2], np.float32)
    quality = compare(REFERENCE, scores, QUERIES, DOCS, QRELS)
    assert quality.ndcg == pytest.approx((1 / np.log2(3) + 1) / 2)
    fall = 1 - 1 / np.log2(3)
    assert quality.ndcg_drop_error == pytest.approx(fall / 2), "of two queries, one fell: sd fall / sqrt 2, over sqrt 2"
    assert quality.kendall_tau == pytest.approx((1 / 3 + 1) / 2)
    assert quality.top10_changed == 0.5 and quality.top10_swapped == 0
    assert (quality.max_difference, quality.mean_difference) == (1, pytest.approx(0.4))
    problems = broken(quality, Limits(ndcg_drop=0.002, max_difference=0.5, kendall_tau=0.9))
    assert [problem.split()[0] for problem in problems] == ["nDCG@10", "scores", "Kendall's"]


def test_a_document_that_leaves_the_first_ten_is_counted():
    reference = np.arange(11, 0, -1).astype(np.float32)
    scores = reference.copy()
    scores[[9, 10]] = scores[[10, 9]]
    quality = compare(reference, scores, ["q"] * 11, [f"d{i:02}" for i in range(11)])
    assert quality.top10_swapped == pytest.approx(0.1) and quality.top10_changed == 1 and quality.ndcg is None
    assert quality.ndcg_drop_error is None


def test_scores_that_say_nothing_have_no_tau_to_boast_of():
    constant = compare(REFERENCE, np.ones(5, np.float32), QUERIES, DOCS)
    assert constant.kendall_tau == 0 and broken(constant, Limits(kendall_tau=0.1))


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(InputError, match="no pairs"):
        compare(REFERENCE[:0], REFERENCE[:0], [], [])
    with pytest.raises(ScoreError):
        compare(REFERENCE, np.full(5, np.nan, np.float32), QUERIES, DOCS)
