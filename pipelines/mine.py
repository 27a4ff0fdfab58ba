"""The mining job: plan, mine each unit, finish. Exactly once in the sense of the rerank job, with less machinery.

A unit's files are named by the unit, their bytes depend on the unit alone, and each is made by one create-only PUT;
the unit's record is stored after them and makes it done. Any process may die at any moment: running the same command
again does the units without a record. Judgements are in memory, candidates and texts a unit at a time.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Literal, TextIO

from pydantic import ValidationError

from crossenc.errors import CrossEncError, InputError, RunConflictError
from crossenc.mining import MineSettings
from crossenc.records import Qrels
from pipelines import lease, ledger, mine_workers
from pipelines import plan as plans
from pipelines.commit import RESULTS_FOLDER
from pipelines.evaluate import read_qrels
from pipelines.finish import MANIFEST_FILE, SUCCESS_FILE, first_changed
from pipelines.inputs import list_candidates, scan
from pipelines.mine_config import MineConfig
from pipelines.mine_formats import Format
from pipelines.mine_progress import MineProgress
from pipelines.mine_shard import (
    DATA_FOLDER,
    GATHERED_FOLDER,
    RECORD,
    MineContext,
    MineCounts,
    UnitRecord,
    add_counts,
    gather,
    mine_bucket,
    mine_shard,
)
from pipelines.plan import RUN_FOLDER, Plan, Shard
from pipelines.prepare import ReadSettings
from pipelines.stages import bucket_id
from pipelines.storage import (
    FileInfo,
    Location,
    check_apart,
    delete,
    exists,
    expand,
    list_files,
    locate,
    put,
    put_new,
    read_bytes,
)
from pipelines.texts import TextTable, default_cache, find_table

RECORD_FOLDER = f"{RUN_FOLDER}/records"
_FOLDERS = (DATA_FOLDER, "completeness", "quarantine", RUN_FOLDER)
#: Candidates in a shard, unless the job says otherwise: a few seconds of work, and training files worth the name.
_SHARD_CANDIDATES = 32_768
#: Candidates in a bucket where queries are spread over shards: their texts are in memory at once.
_BUCKET_CANDIDATES = 65_536
_MAX_BUCKETS = 4096

State = Literal["done", "already done", "stopped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `mine` ended. `counts` are those of the whole run, None where it was stopped."""

    state: State
    output: Location
    message: str
    counts: MineCounts | None = None


@dataclass(frozen=True, slots=True)
class MineJob:
    """A job with everything resolved that its fingerprint rests on. `source` is the plan of the rerank run to mine."""

    config: MineConfig
    output: Location
    files: tuple[FileInfo, ...]
    queries: TextTable | None
    corpus: TextTable | None
    source: Plan | None
    results: Mapping[str, FileInfo] | None
    parts: Mapping[str, str]


def resolve(config: MineConfig) -> MineJob:
    """Looks everything up that the job names. Raises InputError before any work is done."""
    options = config.storage_options
    output = locate(config.output, options)
    check_apart(output, [*config.candidate_uris, config.reranked, config.queries, config.corpus, config.qrels])
    queries = corpus = None
    if config.queries:
        queries = find_table("query", config.queries, "query_id", config.columns, options)
    if config.corpus:
        corpus = find_table("document", config.corpus, "doc_id", config.columns, options)
    source, results = (None, None) if config.reranked is None else _finished_rerank(config, config.reranked)
    files = list_candidates(config) if source is None else _planned_files(source, options)
    judgements = expand(locate(config.qrels, options), ".parquet")
    tables = [*(queries.files if queries else ()), *(corpus.files if corpus else ())]
    everything = [*files, *tables, *judgements, *(results or {}).values()]
    parts = plans.describe_parts(everything, {}, config.result_options()) | {"job": "mine"}
    return MineJob(config, output, tuple(files), queries, corpus, source, results, parts)


def _finished_rerank(config: MineConfig, uri: str) -> tuple[Plan, dict[str, FileInfo]]:
    """The plan and the parts of the results of a finished rerank run."""
    folder = locate(uri, config.storage_options)
    plan = plans.load(folder)
    if plan is None or plan.parts.get("job"):
        raise InputError(f"reranked: {folder} is not the output of a rerank run; give the folder that has results/")
    if not exists(folder / SUCCESS_FILE):
        raise InputError(f"reranked: the run in {folder} is not finished; let it finish, or run its command again")
    if plan.columns.layout == "ids" and config.queries is None:
        raise InputError(f"the candidates of {folder} are ids: name the tables with the texts as queries and corpus")
    if plan.columns.layout != "ids" and config.queries is not None:
        raise InputError(f"the candidates of {folder} hold their own queries; leave queries out")
    units = [bucket_id(b) for b in range(plan.num_buckets)] or [shard.shard_id for shard in plan.shards]
    stored = ledger.read(folder, RESULTS_FOLDER, units, plan.fingerprint)
    missing = [unit for unit in units if unit not in stored.parts]
    if missing:
        raise InputError(f"{folder} lacks the part {missing[0]}, or it is damaged; run its rerank command again")
    return plan, {unit: file for unit, (file, _) in stored.parts.items()}


def _planned_files(plan: Plan, options: Mapping[str, Any]) -> list[FileInfo]:
    return [FileInfo(locate(entry.uri, options), entry.num_bytes, entry.version) for entry in plan.inputs]


def make_plan(job: MineJob) -> Plan:
    """The plan of the job, not stored: the rerank run's own shards, or new ones."""
    if job.source is None:
        inputs = scan(job.config, job.files)
        size = job.config.shard_candidates or _SHARD_CANDIDATES
        plan = plans.make(inputs, job.parts, shard_candidates=size, force_two_phase=False)
    else:
        columns = replace(job.source.columns, pass_through=())
        fingerprint = plans.fingerprint(job.parts)
        plan = replace(job.source, columns=columns, parts=dict(job.parts), fingerprint=fingerprint)
    # A multiple of the rerank run's number, so that each bucket's scores lie in one part of its results.
    per_bucket = math.ceil(plan.num_candidates / (_BUCKET_CANDIDATES * max(1, plan.num_buckets)))
    most = _MAX_BUCKETS // max(1, plan.num_buckets)
    return replace(plan, num_buckets=plan.num_buckets * max(1, min(per_bucket, most)))


def describe(job: MineJob, plan: Plan) -> list[str]:
    """The plan in figures, for people, one fact a line."""
    qrels = read_qrels(job.config.qrels, job.config.storage_options)
    positives = [sum(grade > 0 for grade in grades.values()) for grades in qrels.values()]
    spread = ", queries spread: gathered first" * plan.is_two_phase
    scores = "the rerank run's" if job.source else plan.columns.score or "none"
    return [
        f"layout       {plan.columns.layout}{spread}",
        f"input        {len(plan.inputs):,} files, {sum(file.num_rows for file in plan.inputs):,} rows",
        f"work         {plan.num_candidates:,} candidates in {len(plan.shards):,} shards",
        f"scores       {scores}",
        f"judged       {sum(n > 0 for n in positives):,} queries with {sum(positives):,} positives",
    ]


def mine(
    config: MineConfig,
    *,
    stream: TextIO,
    should_stop: Callable[[], bool] = lambda: False,
    new_run: bool = False,
) -> Outcome:
    """Runs the job to its end, or goes on with an earlier attempt.

    `should_stop()` is asked between units; what is done then is kept for the next call. Raises CrossEncError with what
    is wrong and what to do; nothing that is stored is lost.
    """
    job = resolve(config)
    stored = None if new_run else plans.load(job.output)
    if stored is not None:
        plans.check_unchanged(stored.parts, job.parts, job.output)
        if exists(job.output / SUCCESS_FILE):
            return _confirm(job.output)
    display = MineProgress(stream)
    lost: list[str] = []
    with lease.hold(job.output, display.snapshot, lost.append, display.say):
        if new_run:
            _remove_run(job.output)
        plan = plans.load(job.output)  # again: another run may have made one while this one waited for the lease
        if plan is None:
            _check_empty(job.output)
            plan = plans.save(make_plan(job), job.output)
        plans.check_unchanged(plan.parts, job.parts, job.output)
        started = time.monotonic()
        units = _units(plan)
        records = _records(job.output, plan)
        with display:
            display.expect(len(units), plan.num_candidates, [record.counts for record in records.values()])
            mined = _mined(
                _context(job, plan), records, config.workers, lambda: bool(lost) or should_stop(), display.say
            )
            with contextlib.closing(mined):
                for record in mined:
                    records[record.unit_id] = record
                    display.update(record.counts)
        if len(records) < len(units):
            message = lost[0] if lost else f"stopped; run the same command again to resume {job.output}"
            return Outcome("stopped", job.output, message)
        return _finish(job, plan, records, time.monotonic() - started)


def _context(job: MineJob, plan: Plan) -> MineContext:
    config = job.config
    rules: MineSettings = config.rules()
    qrels: Qrels = read_qrels(config.qrels, config.storage_options)
    read = ReadSettings(
        columns=plan.columns,
        pass_through=(),
        storage_options=dict(config.storage_options),
        max_text_bytes=config.max_text_bytes,
        needs_score=False,
        queries=job.queries,
        corpus=job.corpus,
        cache=default_cache(),
    )
    shape = Format(config.format, config.num_negatives, config.scores, config.labels)
    return MineContext(
        output=job.output,
        plan=plan,
        read=read,
        qrels=qrels,
        settings=rules,
        shape=shape,
        from_others=config.random_from == "others",
        results=job.results,
    )


def _units(plan: Plan) -> dict[str, Shard | int]:
    """What is mined, by id: shards, or buckets of queries where those are spread over shards."""
    if plan.is_two_phase:
        return {bucket_id(bucket): bucket for bucket in range(plan.num_buckets)}
    return {shard.shard_id: shard for shard in plan.shards}


def _mined(
    context: MineContext,
    done: Mapping[str, UnitRecord],
    num_workers: int,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Generator[UnitRecord]:
    """Mines the units that are not done, until told to stop."""
    plan = context.plan
    todo = [(unit_id, unit) for unit_id, unit in _units(plan).items() if unit_id not in done]
    if todo and plan.is_two_phase:
        say("queries are spread over the input: gathering their candidates first …")
        num_gathered = sum(1 for _ in mine_workers.run(gather, plan.shards, context, num_workers, should_stop))
        if num_gathered < len(plan.shards):
            return
    yield from mine_workers.run(_mine_unit, todo, context, num_workers, should_stop)


def _mine_unit(item: tuple[str, Shard | int], context: MineContext) -> UnitRecord:
    """Mines one unit and makes it done."""
    unit_id, unit = item
    if isinstance(unit, Shard):
        record = mine_shard(unit, context)
    else:
        results_id = bucket_id(unit % len(context.results)) if context.results else unit_id
        record = mine_bucket(unit_id, unit, results_id, context)
    place = context.output / f"{RECORD_FOLDER}/{unit_id}.json"
    return _parse(put_new(place, RECORD.dump_json(record)), place, context.plan)


def _records(output: Location, plan: Plan) -> dict[str, UnitRecord]:
    """The records of the units that are done. A unit whose files are not all there is made again."""
    files = [file.location for file in list_files(output / RECORD_FOLDER) if not file.location.name.startswith(".")]
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda place: _parse(read_bytes(place), place, plan), files))
    units = _units(plan)
    listed = (file for folder in _FOLDERS[:-1] for file in list_files(output / folder)) if records else ()
    stored = {(file.location.uri, file.num_bytes) for file in listed}
    return {
        record.unit_id: record
        for record in records
        if record.unit_id in units
        and all(((output / file.path).uri, file.num_bytes) in stored for file in record.files)
    }


def _parse(body: bytes, place: Location, plan: Plan) -> UnitRecord:
    try:
        record = RECORD.validate_json(body)
    except ValidationError:
        raise RunConflictError(f"{place} is no record of this version; start over with --new-run") from None
    if record.fingerprint != plan.fingerprint:
        raise RunConflictError(f"{place} belongs to another run; start over with --new-run")
    return record


def _finish(job: MineJob, plan: Plan, records: Mapping[str, UnitRecord], elapsed_seconds: float) -> Outcome:
    """Reconciles, writes the manifest and the mark of success."""
    counts = add_counts(record.counts for record in records.values())
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
        "counts": asdict(counts),
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


def _confirm(output: Location) -> Outcome:
    """The outcome of a run that is finished already, after a look at whether its files are all there."""
    try:
        manifest = json.loads(read_bytes(output / MANIFEST_FILE))
    except FileNotFoundError:
        raise RunConflictError(
            f"{output} was finished, but its manifest is missing; start over with --new-run"
        ) from None
    _require_stored(output, [(part["path"], part["bytes"]) for part in manifest["parts"]])
    message = f"nothing to do: this run is finished; the training data is in {output / DATA_FOLDER}"
    return Outcome("already done", output, message, MineCounts(**manifest["counts"]))


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


def _remove_run(output: Location) -> None:
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
