import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossenc.errors import ScoreError
from crossenc.ranking import order, rank
from crossenc.records import Candidates, ScoredDoc

rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1e30]),
        st.integers(1, 3),
        st.text("abя\0", max_size=2),
    ),
    max_size=40,
)


def candidates(*doc_ids: str) -> Candidates:
    return Candidates("q1", "a query", doc_ids, tuple(f"text of {doc_id}" for doc_id in doc_ids))


def test_higher_scores_come_first() -> None:
    assert order(np.array([0.1, 0.9, 0.5]), np.array([1, 2, 3]), ["a", "b", "c"]).tolist() == [1, 2, 0]


def test_equal_scores_keep_the_first_stage_order() -> None:
    assert order(np.array([0.5, 0.5, 0.5]), np.array([3, 1, 2]), ["a", "b", "c"]).tolist() == [1, 2, 0]


def test_equal_scores_and_ranks_are_ordered_by_document_id() -> None:
    scores, ranks = np.array([0.5, 0.5, 0.5, 0.7]), np.array([1, 1, 1, 1])
    assert order(scores, ranks, ["d10", "d9", "d1", "z"]).tolist() == [3, 2, 0, 1]


def test_negative_and_positive_zero_are_the_same_score() -> None:
    assert order(np.array([-0.0, 0.0]), np.array([1, 2]), ["a", "b"]).tolist() == [0, 1]
    assert order(np.array([0.0, -0.0]), np.array([2, 1]), ["a", "b"]).tolist() == [1, 0]


def test_groups_come_in_ascending_order_and_are_ranked_apart() -> None:
    scores, groups = np.array([0.1, 0.2, 0.3, 0.4]), np.array([7, 2, 7, 2])
    assert order(scores, np.ones(4, np.int64), list("abcd"), groups).tolist() == [3, 1, 2, 0]


def test_scores_are_compared_in_their_own_precision() -> None:
    almost = 0.1 + 1e-12
    assert order(np.array([0.1, almost]), np.array([1, 2]), ["a", "b"]).tolist() == [1, 0]
    assert order(np.array([0.1, almost], np.float32), np.array([1, 2]), ["a", "b"]).tolist() == [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    with pytest.raises(ScoreError, match="row 1"):
        order(np.array([0.5, bad]), np.array([1, 2]), ["a", "b"])


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 document ids"):
        order(np.array([0.5, 0.2]), np.array([1, 2]), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"\(2, 1\) scores"):
        order(np.array([[0.5], [0.2]]), np.array([1, 2]), ["a", "b"])


@given(rows_strategy)
def test_the_order_is_that_of_sorting_whole_rows(rows: list[tuple[int, float, int, str]]) -> None:
    expected = sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][1], rows[i][2], rows[i][3]))
    groups, scores, ranks, doc_ids = zip(*rows, strict=True) if rows else ((), (), (), ())
    found = order(np.array(scores, float), np.array(ranks, np.int64), doc_ids, np.array(groups, np.int64))
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_a_ranking_holds_ids_ranks_from_one_and_scores() -> None:
    ranking = rank(candidates("a", "b", "c"), np.array([0.25, 0.75, 0.25]))
    assert ranking.query_id == "q1"
    assert ranking.docs == (ScoredDoc("b", 1, 0.75), ScoredDoc("a", 2, 0.25), ScoredDoc("c", 3, 0.25))


@pytest.mark.parametrize(("top_k", "expected"), [(None, "bac"), (2, "ba"), (0, ""), (9, "bac")])
def test_top_k_keeps_the_best(top_k: int | None, expected: str) -> None:
    ranking = rank(candidates("a", "b", "c"), np.array([0.5, 0.75, 0.25]), top_k)
    assert "".join(doc.doc_id for doc in ranking.docs) == expected


def test_a_negative_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k is -1"):
        rank(candidates("a"), np.array([0.5]), -1)


def test_a_query_without_documents_has_an_empty_ranking() -> None:
    assert rank(candidates(), np.empty(0)).docs == ()


def test_a_missing_score_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks"):
        rank(candidates("a", "b"), np.array([0.5]))
