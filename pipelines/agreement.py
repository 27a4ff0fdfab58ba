"""How far a run's number format agrees with float32: a sample of its queries, ranked by both.

Measured by a task with the resources of a scoring actor, once a run and within minutes; the driver loads no model. What
was measured is kept beside the run's plan. A measurement that fails costs the run nothing but this figure.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from pydantic import TypeAdapter

from crossenc.ranking import order
from crossenc.records import Scorer, TokenizedPairs
from pipelines.isolation import select
from pipelines.model import Model
from pipelines.plan import RUN_FOLDER, InputFile, Shard
from pipelines.prepare import ReadSettings, prepare
from pipelines.records import Agreement
from pipelines.stages import good_pairs
from pipelines.storage import Location, put, read_bytes, redact

FILE = f"{RUN_FOLDER}/agreement.json"
#: The first queries of a shard, and no more than so many pairs of them: seconds on a GPU.
_MAX_QUERIES, _MAX_PAIRS = 200, 5_000
#: Processors may need longer: then what was scored by then is compared. For so many queries it may take twice as long.
_OWN_SECONDS, _EXACT_SECONDS = 80.0, 160.0
_LEAST_QUERIES = 30
#: After which the task is given up, whatever it does.
_MOST_SECONDS = 600.0
_DEPTH = 10
_KIND = TypeAdapter(Agreement)


def load(output: Location) -> Agreement | None:
    """What was measured for the run in `output`, None where nothing was yet."""
    try:
        return _KIND.validate_json(read_bytes(output / FILE))
    except (FileNotFoundError, ValueError):
        return None


def measure_on_cluster(
    output: Location,
    model: Model,
    exact: Model,
    shard: Shard,
    file: InputFile,
    read: ReadSettings,
    resources: tuple[float, float, int],
    should_stop: Callable[[], bool],
) -> Agreement:
    """Measures in a task and keeps the result, or why there is none, so that it is done once a run.

    `resources` are CPUs, GPUs and torch threads of a scoring actor. What `should_stop` cuts short is not kept.
    """
    num_cpus, num_gpus, threads = resources
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_measure)
    reference = task.remote(model, exact, shard, file, read, threads)
    deadline = time.monotonic() + _MOST_SECONDS
    while not ray.wait([reference], timeout=0.5)[0]:
        if should_stop():
            ray.cancel(reference, force=True)
            return Agreement(note="not measured: it was cut short")
        if time.monotonic() > deadline:
            ray.cancel(reference, force=True)
            return _kept(Agreement(note=f"not measured: it took more than {_MOST_SECONDS:.0f} seconds"), output)
    try:
        found: Agreement = ray.get(reference)
    except Exception as error:  # a figure for people is not worth a run
        first_line = redact(str(error)).strip().splitlines()[-1:] or [type(error).__name__]
        found = Agreement(note=f"not measured: {first_line[0][:200]}")
    return _kept(found, output)


def _kept(found: Agreement, output: Location) -> Agreement:
    put(output / FILE, _KIND.dump_json(found))
    return found


def _measure(model: Model, exact: Model, shard: Shard, file: InputFile, read: ReadSettings, threads: int) -> Agreement:
    rows = sample(prepare(shard, file, read, model.load_tokenizer()).rows)
    pairs, query_ids = good_pairs(rows), rows.column("query_id").to_pylist()
    queries = [np.array(places) for places in _rows_of(query_ids, range(len(query_ids))).values()]
    # One after the other, so that only one model takes memory.
    ours = score_in_time(model.load_scorer(threads), pairs, queries, _OWN_SECONDS)
    theirs = score_in_time(exact.load_scorer(threads), pairs, queries[: len(ours)], _EXACT_SECONDS)
    compared = [query_ids[place] for places in queries[: len(theirs)] for place in places]
    nothing = np.empty(0, np.float32)
    return compare(compared, np.concatenate([nothing, *ours[: len(theirs)]]), np.concatenate([nothing, *theirs]))


def score_in_time(
    scorer: Scorer, pairs: TokenizedPairs, queries: Sequence[NDArray[np.int64]], seconds: float
) -> list[NDArray[np.float32]]:
    """The scores of each of the first `queries`, given as places in `pairs`: as many as there is time for."""
    started = time.monotonic()
    scores: list[NDArray[np.float32]] = []
    for places in queries:
        scores.append(scorer.score(select(pairs, places)))
        if time.monotonic() - started > (seconds if len(scores) >= _LEAST_QUERIES else 2 * seconds):
            break
    return scores


def sample(rows: pa.Table) -> pa.Table:
    """The good rows of the first queries: whole queries, unless the first one alone is too long."""
    good = rows.filter(pc.is_null(rows.column("reason"))).slice(0, _MAX_PAIRS + 1)
    queries = good.column("query_id").to_pylist()
    distinct = list(dict.fromkeys(queries))
    if good.num_rows > _MAX_PAIRS and len(distinct) > 1:
        distinct.remove(queries[-1])  # it may go on behind the cut
    chosen = set(distinct[:_MAX_QUERIES])
    return good.filter(pa.array([query in chosen for query in queries], pa.bool_())).slice(0, _MAX_PAIRS)


def compare(query_ids: list[str], scores: NDArray[np.float32], exact: NDArray[np.float32]) -> Agreement:
    """What changes between two scorings of the same pairs, both float32 [P], where both are finite."""
    finite = np.isfinite(scores) & np.isfinite(exact)
    rows_of = _rows_of(query_ids, np.flatnonzero(finite).tolist())
    if not rows_of:
        return Agreement(note="not measured: the sample has no pair with a score")
    num_other, num_reordered = 0, 0
    for rows in rows_of.values():
        ours, theirs = (_first(values[rows]) for values in (scores, exact))
        num_other += set(ours) != set(theirs)
        num_reordered += ours != theirs
    differences = np.abs(scores[finite].astype(np.float64) - exact[finite])
    return Agreement(
        num_queries=len(rows_of),
        num_pairs=int(finite.sum()),
        num_other_documents=num_other,
        num_other_order=num_reordered,
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
    )


def _rows_of(query_ids: Sequence[str], rows: Iterable[int]) -> dict[str, list[int]]:
    """The rows of each query, in the order of its first one."""
    rows_of: dict[str, list[int]] = {}
    for row in rows:
        rows_of.setdefault(query_ids[row], []).append(row)
    return rows_of


def _first(scores: NDArray[np.float32]) -> list[Any]:
    first: list[Any] = order(scores, np.arange(len(scores)), [""] * len(scores))[:_DEPTH].tolist()
    return first
