"""Jobs that make training data out of candidates, unit by unit: exactly once, and resumable.

A unit's files are named by the unit, their bytes depend on the unit alone, and each is made by one create-only PUT;
the unit's record is stored after them and makes it done. Any process may die at any moment: running the same command
again does the units without a record. It knows nothing of what a job makes of its units.
"""

import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any, Generic, Protocol, TextIO, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from crossenc.errors import CrossEncError, RunConflictError
from pipelines import lease, logs, metrics, unit_workers
from pipelines import plan as plans
from pipelines.finish import first_changed
from pipelines.plan import RUN_FOLDER, Plan, Shard, bucket_id
from pipelines.records import MANIFEST_FILE, SUCCESS_FILE, JobState
from pipelines.storage import FileInfo, Location, delete, exists, list_files, put, put_new, read_bytes
from pipelines.stored_files import StoredFile, store
from pipelines.unit_progress import UnitProgress
from pipelines.unit_rows import GATHERED_FOLDER, RowContext, bucket_rows, gather, shard_rows

logger = logging.getLogger(__name__)
DATA_FOLDER = "data"
RECORD_FOLDER = f"{RUN_FOLDER}/records"
_FOLDERS = (DATA_FOLDER, "completeness", "quarantine", RUN_FOLDER)
#: Candidates in a shard, unless the job says otherwise: a few seconds of work, and training files worth the name.
SHARD_CANDIDATES = 32_768
#: Candidates in a bucket where queries are spread over shards: their texts are in memory at once.
_BUCKET_CANDIDATES = 65_536
_MAX_BUCKETS = 4096


class UnitCounts(Protocol):
    """An account of a unit, or of a whole run. A dataclass of numbers, and of numbers by reason."""

    @property
    def num_candidates(self) -> int: ...

    def check(self) -> None:
        """Raises CrossEncError where something came from nowhere or went missing."""
        ...

    def shown(self) -> dict[str, int]:
        """What progress shows."""
        ...


Counts = TypeVar("Counts", bound=UnitCounts)


@dataclass(frozen=True, slots=True)
class UnitRecord(Generic[Counts]):
    """What a unit came to: storing it makes the unit done."""

    unit_id: str
    fingerprint: str
    counts: Counts
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class Kind(Generic[Counts]):
    """What a job makes of a unit, and how it accounts for it.

    `make(unit_id, rows, results, context)` gets the part of each rerank run that has the unit's queries; it gives the
    counts, a dataclass, and the files by path, None for one that would be empty.
    """

    make: Callable[[str, pa.Table, Sequence[FileInfo], Any], tuple[Counts, Mapping[str, bytes | None]]]
    counts: type[Counts]
    record: TypeAdapter[UnitRecord[Counts]]


class UnitContext(RowContext):
    """What making any unit needs to know. It can be sent to other processes."""

    __slots__ = ()

    @property
    def kind(self) -> Kind[Any]:
        """The job's own."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class UnitJob(Generic[Counts]):
    """A job, resolved. `parts` are what its results depend on; the others are called when there is work to do."""

    output: Location
    parts: Mapping[str, str]
    kind: Kind[Counts]
    make_plan: Callable[[], Plan]
    make_context: Callable[[Plan], UnitContext]
    workers: int
    storage_options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Counts]):
    """How a call of `run` ended. `counts` are those of the whole run, None where it was stopped."""

    state: JobState
    output: Location
    message: str
    counts: Counts | None = None


def add_counts(kind: type[Counts], counts: Iterable[Counts]) -> Counts:
    """The sum over units: of numbers, which are 0 by default, and of numbers by reason."""
    every = list(counts)
    sums: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]  # they are dataclasses
        values = [getattr(one, field.name) for one in every]
        if field.default == 0:
            sums[field.name] = sum(values)
        else:
            total = Counter[str]()
            for numbers in values:
                total.update(numbers)
            sums[field.name] = dict(sorted(total.items()))
    return kind(**sums)


def plan_of_rerank(source: Plan, parts: Mapping[str, str]) -> Plan:
    """A plan with the shards of a rerank run, for a job on its results."""
    columns = replace(source.columns, pass_through=())
    return replace(source, columns=columns, parts=dict(parts), fingerprint=plans.fingerprint(parts))


def with_small_buckets(plan: Plan) -> Plan:
    """The plan with more buckets, if queries are spread: texts must fit in memory.

    A multiple of the number there was, so that each bucket's scores lie in one part of a rerank run's results.
    """
    per_bucket = math.ceil(plan.num_candidates / (_BUCKET_CANDIDATES * max(1, plan.num_buckets)))
    most = _MAX_BUCKETS // max(1, plan.num_buckets)
    return replace(plan, num_buckets=plan.num_buckets * max(1, min(per_bucket, most)))


def run(
    job: UnitJob[Counts], *, stream: TextIO, should_stop: Callable[[], bool] = lambda: False, new_run: bool = False
) -> Outcome[Counts]:
    """Runs the job to its end, or goes on with an earlier attempt.

    `should_stop()` is asked between units; what is done then is kept for the next call. Raises CrossEncError with what
    is wrong and what to do; nothing that is stored is lost.
    """
    stored = None if new_run else plans.load(job.output)
    if stored is not None:
        plans.check_unchanged(stored.parts, job.parts, job.output)
        if exists(job.output / SUCCESS_FILE):
            return _confirm(job)
    display = UnitProgress(stream)
    lost: list[str] = []
    about = logs.about(metrics.run_tag(plans.fingerprint(job.parts)), job.storage_options)
    with about, lease.hold(job.output, display.snapshot, lost.append, display.say) as epoch:
        if new_run:
            remove_run(job.output)
        plan = plans.load(job.output)  # again: another run may have made one while this one waited for the lease
        if plan is None:
            _check_empty(job.output)
            plan = plans.save(job.make_plan(), job.output)
        plans.check_unchanged(plan.parts, job.parts, job.output)
        started = time.monotonic()
        num_units = len(_units(plan))
        records = _records(job, plan)
        with display:
            display.expect(num_units, plan.num_candidates, [record.counts for record in records.values()])
            context = job.make_context(plan)
            made = _made(context, records, job.workers, lambda: bool(lost) or should_stop(), display.say)
            with contextlib.closing(made):
                for record in made:
                    records[record.unit_id] = record
                    display.update(record.counts)
        if len(records) < num_units:
            message = lost[0] if lost else f"stopped; run the same command again to resume {job.output}"
            return Outcome("stopped", job.output, message)
        if message := lost[0] if lost else lease.overtaken(job.output, epoch):
            return Outcome("stopped", job.output, message)
        return _finish(job, plan, records, time.monotonic() - started)


def _units(plan: Plan) -> dict[str, Shard | int]:
    """What is worked on, by id: shards, or buckets of queries where those are spread over shards."""
    if plan.is_two_phase:
        return {bucket_id(bucket): bucket for bucket in range(plan.num_buckets)}
    return {shard.shard_id: shard for shard in plan.shards}


def _made(
    context: UnitContext,
    done: Mapping[str, UnitRecord[Any]],
    num_workers: int,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Generator[UnitRecord[Any]]:
    """Makes the units that are not done, until told to stop."""
    plan = context.plan
    todo = [(unit_id, unit) for unit_id, unit in _units(plan).items() if unit_id not in done]
    if todo and plan.is_two_phase:
        say("queries are spread over the input: gathering their candidates first …")
        num_gathered = sum(1 for _ in unit_workers.run(gather, plan.shards, context, num_workers, should_stop))
        if num_gathered < len(plan.shards):
            return
    yield from unit_workers.run(_make_unit, todo, context, num_workers, should_stop)


def _make_unit(item: tuple[str, Shard | int], context: UnitContext) -> UnitRecord[Any]:
    """Makes one unit, and makes it done."""
    unit_id, unit = item
    started = time.monotonic()
    if isinstance(unit, Shard):
        rows, results = shard_rows(unit, context), [parts[unit_id] for parts in context.results]
    else:
        rows = bucket_rows(unit, context)
        results = [parts[bucket_id(unit % len(parts))] for parts in context.results]
    kind = context.kind
    counts, files = kind.make(unit_id, rows, results, context)
    counts.check()
    stored = [store(path, body, context.output) for path, body in files.items() if body is not None]
    record = UnitRecord(unit_id, context.plan.fingerprint, counts, tuple(stored))
    place = context.output / f"{RECORD_FOLDER}/{unit_id}.json"
    record = _parse(put_new(place, kind.record.dump_json(record)), place, context.plan, kind)
    seconds = round(time.monotonic() - started, 3)
    about = {"num_candidates": counts.num_candidates, **counts.shown(), "seconds": seconds}
    logs.note(logger, "committed", stage="write", shard=unit_id, **about)
    return record


def _records(job: UnitJob[Counts], plan: Plan) -> dict[str, UnitRecord[Counts]]:
    """The records of the units that are done. A unit whose files are not all there is made again."""
    output = job.output
    files = [file.location for file in list_files(output / RECORD_FOLDER) if not file.location.name.startswith(".")]
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda place: _parse(read_bytes(place), place, plan, job.kind), files))
    units = _units(plan)
    listed = (file for folder in _FOLDERS[:-1] for file in list_files(output / folder)) if records else ()
    stored = {(file.location.uri, file.num_bytes) for file in listed}
    return {
        record.unit_id: record
        for record in records
        if record.unit_id in units
        and all(((output / file.path).uri, file.num_bytes) in stored for file in record.files)
    }


def _parse(body: bytes, place: Location, plan: Plan, kind: Kind[Counts]) -> UnitRecord[Counts]:
    try:
        record = kind.record.validate_json(body)
    except ValidationError:
        raise RunConflictError(f"{place} is no record of this version; start over with --new-run") from None
    if record.fingerprint != plan.fingerprint:
        raise RunConflictError(f"{place} belongs to another run; start over with --new-run")
    return record


def _finish(
    job: UnitJob[Counts], plan: Plan, records: Mapping[str, UnitRecord[Counts]], elapsed_seconds: float
) -> Outcome[Counts]:
    """Reconciles, writes the manifest and the mark of success."""
    counts = add_counts(job.kind.counts, (record.counts for record in records.values()))
    counts.check()
    num_rows = sum(file.num_rows for file in plan.inputs)
    if plan.columns.layout != "nested" and counts.num_candidates != num_rows:
        raise CrossEncError(
            f"the input has {num_rows:,} rows but {counts.num_candidates:,} came out; start over with --new-run and"
            " report this as a bug"
        )
    files = [file for _, record in sorted(records.items()) for file in record.files]
    _require_stored(job.output, [(file.path, file.num_bytes) for file in files])
    manifest = {
        "format": plans.FORMAT,
        "fingerprint": plan.fingerprint,
        "depends_on": dict(plan.parts),
        "skipped_files": [list(entry) for entry in plan.skipped],
        "counts": TypeAdapter(job.kind.counts).dump_python(counts, mode="json"),
        "elapsed_seconds": round(elapsed_seconds, 3),
        "versions": {package: version(package) for package in ("crossenc", "numpy", "pyarrow")},
        "parts": [{"path": file.path, "bytes": file.num_bytes, "sha256": file.sha256} for file in files],
    }
    stored = json.loads(put_new(job.output / MANIFEST_FILE, json.dumps(manifest, indent=1).encode()))
    if (stored["fingerprint"], stored["parts"]) != (manifest["fingerprint"], manifest["parts"]):
        raise RunConflictError(f"{job.output / MANIFEST_FILE} lists other parts than are stored; use --new-run")
    delete([file.location for file in list_files(job.output / GATHERED_FOLDER)])
    put(job.output / SUCCESS_FILE, b"")
    return Outcome("done", job.output, f"done; the training data is in {job.output / DATA_FOLDER}", counts)


def _confirm(job: UnitJob[Counts]) -> Outcome[Counts]:
    """The outcome of a run that is finished already, after a look at whether its files are all there."""
    output = job.output
    try:
        manifest = json.loads(read_bytes(output / MANIFEST_FILE))
    except FileNotFoundError:
        raise RunConflictError(
            f"{output} was finished, but its manifest is missing; start over with --new-run"
        ) from None
    _require_stored(output, [(part["path"], part["bytes"]) for part in manifest["parts"]])
    message = f"nothing to do: this run is finished; the training data is in {output / DATA_FOLDER}"
    return Outcome("already done", output, message, TypeAdapter(job.kind.counts).validate_python(manifest["counts"]))


def _require_stored(output: Location, files: Sequence[tuple[str, int]]) -> None:
    changed = first_changed(output, files)
    if changed:
        raise RunConflictError(f"{output / changed} is missing or changed; restore it, or start over with --new-run")


def _check_empty(output: Location) -> None:
    for folder in _FOLDERS[:-1]:
        if list_files(output / folder):
            raise RunConflictError(
                f"{output / folder} holds files but {output} no plan of a run; choose another output, or delete what is"
                " there with --new-run"
            )


def remove_run(output: Location) -> None:
    """Deletes everything that runs write below `output`, but for the lease.

    What says that something is done goes first, the plan and its shards last: what a kill leaves can be resumed.
    """
    files = [file.location for folder in _FOLDERS for file in list_files(output / folder)]
    plan, keep = output / plans.PLAN_FILE, (output / lease.LEASE_FOLDER).uri
    shards = [location for location in files if location.name.startswith("shards-")]
    records = [location for location in files if location.uri.startswith((output / RECORD_FOLDER).uri)]
    delete([output / SUCCESS_FILE, output / MANIFEST_FILE])
    delete(records)
    delete([file for file in files if not file.uri.startswith(keep) and file not in (plan, *shards, *records)])
    delete([plan])
    delete(shards)
