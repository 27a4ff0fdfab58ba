"""How far a run's number format agrees with float32: a sample of its queries, ranked by both.

Measured by a task with the resources of a scoring actor, once a run; the driver loads no model. What was measured is
kept beside the run's plan. A measurement that fails costs the run nothing but this figure.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from pydantic import TypeAdapter

from crossenc.ranking import order
from pipelines.model import Model
from pipelines.plan import RUN_FOLDER, InputFile, Shard
from pipelines.prepare import ReadSettings, prepare
from pipelines.records import Agreement
from pipelines.stages import good_pairs
from pipelines.storage import Location, put, read_bytes, redact

FILE = f"{RUN_FOLDER}/agreement.json"
#: The first queries of a shard, and no more than so many pairs of them: seconds on a GPU, a minute on a core.
_MAX_QUERIES, _MAX_PAIRS = 200, 5_000
_DEPTH = 10
_MOST_SECONDS = 600.0
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
    """Measures in a task and keeps the result. `resources` are CPUs, GPUs and torch threads of a scoring actor."""
    num_cpus, num_gpus, threads = resources
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_measure)
    reference = task.remote(model, exact, shard, file, read, threads)
    deadline = time.monotonic() + _MOST_SECONDS
    while not ray.wait([reference], timeout=0.5)[0]:
        if should_stop() or time.monotonic() > deadline:
            ray.cancel(reference, force=True)
            return Agreement(note="not measured: it was cut short")
    try:
        found: Agreement = ray.get(reference)
    except Exception as error:  # a figure for people is not worth a run
        first_line = redact(str(error)).strip().splitlines()[-1:] or [type(error).__name__]
        return Agreement(note=f"not measured: {first_line[0][:200]}")
    put(output / FILE, _KIND.dump_json(found))
    return found


def _measure(model: Model, exact: Model, shard: Shard, file: InputFile, read: ReadSettings, threads: int) -> Agreement:
    rows = sample(prepare(shard, file, read, model.load_tokenizer()).rows)
    pairs = good_pairs(rows)
    scores = [loaded.load_scorer(threads).score(pairs) for loaded in (model, exact)]
    return compare(rows.column("query_id").to_pylist(), scores[0], scores[1])


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
    rows_of: dict[str, list[int]] = {}
    for row in np.flatnonzero(finite).tolist():
        rows_of.setdefault(query_ids[row], []).append(row)
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


def _first(scores: NDArray[np.float32]) -> list[Any]:
    first: list[Any] = order(scores, np.arange(len(scores)), [""] * len(scores))[:_DEPTH].tolist()
    return first
