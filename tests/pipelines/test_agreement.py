import numpy as np
import pyarrow as pa
import pytest

from pipelines import agreement


def test_other_documents_and_other_orders_among_the_ten_best_are_counted() -> None:
    falling = np.linspace(1, 0, 12, dtype=np.float32)
    swapped_at_the_top, swapped_at_the_edge = falling.copy(), falling.copy()
    swapped_at_the_top[[0, 1]] = falling[[1, 0]]
    swapped_at_the_edge[[9, 10]] = falling[[10, 9]]
    swapped_below = falling.copy()
    swapped_below[[10, 11]] = falling[[11, 10]]
    scores = np.concatenate([falling, swapped_at_the_top, swapped_at_the_edge, swapped_below])
    found = agreement.compare([q for q in "abcd" for _ in range(12)], scores, np.tile(falling, 4))
    assert (found.num_queries, found.num_pairs) == (4, 48)
    assert (found.num_other_documents, found.num_other_order) == (1, 2)
    step = 1 / 11
    assert found.max_difference == pytest.approx(step, rel=1e-5)
    assert found.mean_difference == pytest.approx(6 * step / 48, rel=1e-5)
    assert found.note == ""


def test_pairs_without_a_finite_score_are_left_out() -> None:
    nan = float("nan")
    found = agreement.compare(["a", "a", "b"], np.float32([1, nan, nan]), np.float32([1, 2, 3]))
    assert (found.num_queries, found.num_pairs, found.max_difference) == (1, 1, 0.0)
    nothing = agreement.compare(["a"], np.float32([nan]), np.float32([1]))
    assert nothing.note == "not measured: the sample has no pair with a score"


def rows(query_ids: list[str], bad: set[int] = frozenset()) -> pa.Table:  # type: ignore[assignment]
    reasons = ["empty" if i in bad else None for i in range(len(query_ids))]
    return pa.table({"query_id": query_ids, "reason": pa.array(reasons, pa.string()), "row": range(len(query_ids))})


def test_the_sample_is_of_whole_queries_and_good_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_MAX_PAIRS", 5)
    table = rows(["a", "a", "a", "b", "b", "c", "c"], bad={1})
    assert agreement.sample(table).column("row").to_pylist() == [0, 2, 3, 4]  # c goes on behind the fifth good row
    assert agreement.sample(rows(["a"] * 7)).num_rows == 5
    monkeypatch.setattr(agreement, "_MAX_QUERIES", 1)
    assert agreement.sample(table).column("row").to_pylist() == [0, 2]
