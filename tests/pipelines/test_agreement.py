from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from crossenc.testing import FakeScorer
from pipelines import agreement
from pipelines.records import Agreement
from pipelines.storage import locate
from tests.pipelines.guilty import make_pairs


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


@pytest.mark.parametrize(("seconds", "num_scored"), [(1000.0, 20), (100.0, 11), (15.0, 3), (14.0, 3), (4.0, 1)])
def test_queries_are_scored_while_there_is_time_and_a_few_for_twice_as_long(
    seconds: float, num_scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0

    class Slow(FakeScorer):
        def score(self, pairs: Any) -> Any:
            nonlocal clock
            clock += 10
            return FakeScorer().score(pairs)

    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(agreement, "_LEAST_QUERIES", 3)
    pairs = make_pairs(40)
    queries = [np.array([place, 39 - place]) for place in range(20)]
    scores = agreement.score_in_time(Slow(), pairs, queries, seconds)
    expected = FakeScorer().score(pairs)
    assert [found.tolist() for found in scores] == [expected[places].tolist() for places in queries[:num_scored]]


class Task:
    """A task of Ray's that ends with a result, with an error, or not at all."""

    def __init__(self, result: Any) -> None:
        self.result, self.was_cancelled = result, False

    def remote(self, *_: Any, **__: Any) -> Any:
        return lambda function: SimpleNamespace(remote=lambda *_: None)

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], references) if self.result is None else (references, [])

    def get(self, reference: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def cancel(self, reference: Any, force: bool) -> None:
        self.was_cancelled = True


@pytest.mark.parametrize(
    ("result", "stops", "note", "is_kept"),
    [
        (Agreement(num_queries=7), False, "", True),
        (ValueError("no such file"), False, "not measured: no such file", True),
        (None, False, "not measured: it took more than 0 seconds", True),
        (None, True, "not measured: it was cut short", False),
    ],
)
def test_what_came_of_a_measurement_is_kept_unless_the_run_was_stopped(
    result: Any, stops: bool, note: str, is_kept: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, nothing, output = Task(result), Any, locate(str(tmp_path))
    arguments: Any = (output, nothing, nothing, nothing, nothing, nothing, (1, 0, 1), lambda: stops)
    monkeypatch.setattr(agreement, "ray", task)
    monkeypatch.setattr(agreement, "_MOST_SECONDS", 0)
    found = agreement.measure_on_cluster(*arguments)
    assert (found.note, task.was_cancelled) == (note, result is None)
    assert agreement.load(output) == (found if is_kept else None)
