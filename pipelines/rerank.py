"""The rerank job: plan, score, commit, finish. Reads like the protocol; each step is a module of its own.

Any process may die at any moment. What is committed is in storage, and running the same command again does the rest.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import pyarrow.parquet as pq

from crossenc.errors import CrossEncError, RunConflictError
from pipelines import agreement, execute, finish, lease, ledger, logs, metrics, weights
from pipelines import plan as plans
from pipelines.commit import RESULTS_FOLDER, SCORED_FOLDER, CommitSettings
from pipelines.config import RerankConfig
from pipelines.evaluate import read_qrels
from pipelines.inputs import list_candidates, scan
from pipelines.model import Model, choose, from_config, registered_part
from pipelines.plan import RUN_FOLDER, Plan, bucket_id
from pipelines.prepare import ReadSettings, pass_through_fields
from pipelines.progress import Progress, announce
from pipelines.rank import RankSettings
from pipelines.records import (
    MANIFEST_FILE,
    REPORT_FILE,
    SUCCESS_FILE,
    Agreement,
    JobState,
    ShardCounts,
    ShardRecord,
    add_counts,
)
from pipelines.silence import Silence
from pipelines.stages import Item, RunContext, raise_failure
from pipelines.storage import (
    FileInfo,
    Location,
    check_apart,
    delete,
    exists,
    expand,
    list_files,
    locate,
    open_input,
    probe,
)
from pipelines.texts import TextTable, default_cache, find_tables


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `rerank` ended. `counts` is what is committed, None where nothing was looked at."""

    state: JobState
    output: Location
    message: str
    counts: ShardCounts | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job with everything resolved that its fingerprint rests on. `note` is what people should hear of its model."""

    config: RerankConfig
    output: Location
    model: Model
    files: tuple[FileInfo, ...]
    queries: TextTable | None
    corpus: TextTable | None
    parts: Mapping[str, str]
    note: str = ""


def resolve(config: RerankConfig, model: Model | None = None, *, new_run: bool = False) -> Job:
    """Looks everything up that the job names: files, tables, model. Raises before any work is done.

    `model` replaces the one that the job names. With `new_run` the run that is stored does not matter.
    """
    output = locate(config.output, config.storage_options)
    check_apart(output, [*config.candidate_uris, config.queries, config.corpus, config.qrels])
    files = list_candidates(config)
    queries, corpus = find_tables(config.queries, config.corpus, config.columns, config.storage_options)
    fit = config.interpolate.fit if config.interpolate else None
    fitted_on = expand(locate(fit, config.storage_options), ".parquet") if fit else []
    for judgements in filter(None, (fit, config.qrels)):
        read_qrels(judgements, config.storage_options)  # found missing or malformed now, not after the night
    note, registered = "", {}
    if model is None:
        config, note = _with_version(config, output, new_run)
        model, registered = from_config(config).pinned(), registered_part(config.model)
    model.score_range()
    model.load_tokenizer()  # a max_length that cannot be is found here, not by a worker
    tables = [*(queries.files if queries else ()), *(corpus.files if corpus else ())]
    parts = plans.describe_parts([*files, *tables, *fitted_on], model.digests(), config.result_options()) | registered
    return Job(config, output, model, tuple(files), queries, corpus, parts, note)


def _with_version(config: RerankConfig, output: Location, new_run: bool) -> tuple[RerankConfig, str]:
    """The job with the version of its model, where that is one of a registry; and what people should hear of it."""
    planned = dict if new_run else partial(plans.planned_parts, output)
    source, note = choose(config.model, config.registry, config.storage_options, planned)
    return config.model_copy(update={"model": source}), note


def rerank(
    config: RerankConfig,
    *,
    connect: Callable[[], int],
    stream: TextIO,
    should_stop: Callable[[], bool] = lambda: False,
    model: Model | None = None,
    new_run: bool = False,
) -> Outcome:
    """Runs the job to its end, or goes on with an earlier attempt.

    `connect()` makes Ray ready and returns the cores of this machine; it is called when there is work to do.
    `should_stop()` is asked now and then; once it says yes, shards in work are finished and the rest is left for
    the next call. Raises CrossEncError with what is wrong and what to do; nothing that was committed is lost.
    """
    job = resolve(config, model, new_run=new_run)
    if job.note:
        announce(stream, job.note)
    stored = None if new_run else plans.load(job.output)
    if stored is not None:
        plans.check_unchanged(stored.parts, job.parts, job.output)
        if exists(job.output / SUCCESS_FILE):
            return finish.confirm(job.output)
    inputs = scan(config, job.files) if stored is None else None
    create_only = probe(job.output)
    run = _Run(job, connect, stream, should_stop)
    if create_only != "atomic":
        run.say(f"this store's create-only PUT is {create_only}: do not start two runs on one output")
    about = logs.about(metrics.run_tag(plans.fingerprint(job.parts)), config.storage_options)
    with about, lease.hold(job.output, run.snapshot, run.lose, run.say) as epoch:
        if new_run:
            remove_run(job.output)
        plan = plans.load(job.output)  # again: another run may have made one while this one waited for the lease
        if plan is None:
            _check_empty(job.output)
            inputs = inputs or scan(config, job.files)
            force = bool(config.interpolate and config.interpolate.fit)
            made = plans.make(inputs, job.parts, shard_candidates=config.shard_candidates, force_two_phase=force)
            plan = plans.save(made, job.output)
        plans.check_unchanged(plan.parts, job.parts, job.output)
        return run.execute(plan, epoch)


def _check_empty(output: Location) -> None:
    for folder in (RESULTS_FOLDER, "quarantine", "completeness"):
        found = list_files(output / folder)
        if found:
            raise RunConflictError(
                f"{output / folder} holds files but {output} no plan of a run; choose another output, or delete what is"
                " there with --new-run"
            )


def remove_run(output: Location) -> None:
    """Deletes everything that runs write below `output`, but for the lease.

    The marks of a finished run go first, the plan and its shards last: what a kill half-way leaves can be resumed.
    """
    folders = (RESULTS_FOLDER, "quarantine", "completeness", "trec", RUN_FOLDER)
    files = [file.location for folder in folders for file in list_files(output / folder)]
    plan, keep = output / plans.PLAN_FILE, (output / lease.LEASE_FOLDER).uri
    shards = [location for location in files if location.name.startswith("shards-")]
    delete([output / name for name in (SUCCESS_FILE, MANIFEST_FILE, REPORT_FILE)])
    delete([file for file in files if not file.uri.startswith(keep) and file not in (plan, *shards)])
    delete([plan])
    delete(shards)


class _Stopped(Exception):
    """Leaves the loop over shards when the run is to end early."""


class _Run:
    """One process's attempt at a run: what it has seen so far, and how it talks to people and to the cluster."""

    def __init__(self, job: Job, connect: Callable[[], int], stream: TextIO, should_stop: Callable[[], bool]) -> None:
        self._job, self._connect, self._stream, self._should_stop = job, connect, stream, should_stop
        self._progress: Progress | None = None
        self._lost = ""
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.message(text)
        else:
            announce(self._stream, text)

    def lose(self, message: str) -> None:
        self._lost = message

    def snapshot(self) -> Mapping[str, Any]:
        return self._progress.snapshot() if self._progress is not None else {}

    def execute(self, plan: Plan, epoch: int) -> Outcome:
        """Scores what is not committed yet, ranks buckets where there are any, and finishes the run."""
        config, output = self._job.config, self._job.output
        journal = ledger.Journal(output, epoch)
        try:
            shard_records = self._phase(
                SCORED_FOLDER if plan.is_two_phase else RESULTS_FOLDER,
                {shard.shard_id: shard for shard in plan.shards},
                plan,
                journal,
                weight=config.interpolate.weight if config.interpolate else None,
            )
            records, interpolation = shard_records, weights.describe(config)
            if plan.is_two_phase:
                weight, interpolation = weights.decide(config, plan, output)
                buckets = {bucket_id(bucket): bucket for bucket in range(plan.num_buckets)}
                records = self._phase(RESULTS_FOLDER, buckets, plan, journal, weight=weight)
            agreed = self._agreement(plan)
        except _Stopped:
            return self._stopped()
        finally:
            with contextlib.suppress(OSError):  # the journal is a convenience, and another error may be on its way
                journal.flush()
        finished = finish.FinishedRun(
            config=config,
            plan=plan,
            output=output,
            model_name=self._job.model.name,
            score_range=self._job.model.score_range(),
            records=records,
            shard_records=shard_records,
            interpolation=interpolation,
            agreement=agreed,
            elapsed_seconds=time.monotonic() - self._started,
        )
        counts = finish.finish(finished, self.say, lambda: self._is_lost(epoch))
        if counts is None:
            return self._stopped()
        return Outcome("done", output, f"done; see {output / REPORT_FILE}", counts)

    def _is_lost(self, epoch: int) -> bool:
        self._lost = self._lost or lease.overtaken(self._job.output, epoch)
        return bool(self._lost)

    def _stopped(self) -> Outcome:
        output = self._job.output
        return Outcome("stopped", output, self._lost or f"stopped; run the same command again to resume {output}")

    def _agreement(self, plan: Plan) -> Agreement | None:
        """How the run's number format agrees with float32, where it is another one."""
        job = self._job
        exact = job.model.exact()
        if exact is None or not plan.shards:
            return None
        known = agreement.load(job.output)
        if known is not None:
            return known
        self.say("ranking a sample in float32, to compare with …")
        cpus_per_actor, threads = execute.actor_cpus(job.config, self._connect())
        shard = max(plan.shards, key=lambda shard: shard.num_candidates)
        return agreement.measure_on_cluster(
            job.output,
            job.model,
            exact,
            shard,
            plan.inputs[shard.file],
            read_settings(job, plan),
            (cpus_per_actor, job.config.scoring.gpus_per_actor, threads),
            lambda: bool(self._lost) or self._should_stop(),
        )

    def _phase(
        self,
        folder: str,
        items: Mapping[str, Item],
        plan: Plan,
        journal: ledger.Journal,
        weight: float | None,
    ) -> dict[str, ShardRecord]:
        """Commits every item that is not committed yet; returns the records of all of them."""
        output = self._job.output
        done = ledger.read(output, folder, items, plan.fingerprint)
        if done.damaged:
            self.say(f"{len(done.damaged)} damaged parts are made again, the first is {done.damaged[0]}")
            delete(done.damaged)
        records = ledger.recorded(output, folder, done)
        todo = [item for item_id, item in items.items() if item_id not in records]
        run = metrics.run_tag(plan.fingerprint)
        counts_done = add_counts([record.counts for record in records.values()])
        total = plan.num_candidates
        with Progress(
            len(items), total, self._stream, num_shards_done=len(records), counts_done=counts_done
        ) as progress:
            self._progress = progress
            try:
                if todo:
                    with contextlib.closing(self._committed(todo, self._context(plan, weight))) as committed:
                        for record in committed:
                            records[record.shard_id] = record
                            progress.update(record)
                            metrics.committed(run, record, is_bucket=isinstance(items[record.shard_id], int))
                            journal.add(record)
            finally:
                self._progress = None
        missing = [item_id for item_id in items if item_id not in records]
        if missing:
            raise CrossEncError(f"{len(missing)} shards have no result ({missing[0]} …); run the same command again")
        return records

    def _committed(
        self, todo: Sequence[Item], context: Callable[[int], tuple[RunContext, float]]
    ) -> Generator[ShardRecord]:
        """Runs the items and yields a record for each; raises _Stopped when the run is to end early."""
        config = self._job.config
        cores = self._connect()
        run_context, cpus_per_actor = context(cores)
        cluster = execute.Cluster.prepare(run_context)
        run = metrics.run_tag(run_context.commit.fingerprint)
        begun: set[str] | None = None  # set once stopping: the shards that are still to come back
        seen: set[str] = set()
        deadline = 0.0
        silence = Silence(
            "no shard has finished for",
            "add a node, or stop the run and resume it with fewer scoring.actors",
            lambda: execute.describe_shortage(execute.needs(config, cores)),
        )
        with contextlib.closing(execute.run(todo, cluster, config, cpus_per_actor)) as results:
            for result in results:
                metrics.remaining(run, len(todo) - len(seen))
                if result is not None:
                    seen.add(result.shard_id)
                    if result.kind == "failure":
                        raise_failure(result.message)
                    if result.record is not None:
                        yield result.record
                if complaint := silence.complaint(len(seen)):
                    self.say(complaint)
                if begun is None and (self._lost or self._should_stop()):
                    begun = cluster.stop()
                    deadline = time.monotonic() + (0 if self._lost else config.drain_seconds)
                    self.say(self._lost or f"stopping: {len(begun - seen)} shards in work are finished first")
                if begun is not None and (begun <= seen or time.monotonic() > deadline):
                    raise _Stopped

    def _context(self, plan: Plan, weight: float | None) -> Callable[[int], tuple[RunContext, float]]:
        job = self._job

        def build(cores: int) -> tuple[RunContext, float]:
            cpus_per_actor, threads = execute.actor_cpus(job.config, cores)
            return RunContext(
                model=job.model,
                read=read_settings(job, plan),
                commit=_commit_settings(job, plan, weight),
                inputs=plan.inputs,
                threads=threads,
                logs=logs.current(),
            ), cpus_per_actor

        return build


def read_settings(job: Job, plan: Plan) -> ReadSettings:
    """What reading the shards of this job takes."""
    first = next(file for file in job.files if file.location.uri == plan.inputs[0].uri)
    with open_input(first) as source:
        fields = pass_through_fields(pq.read_schema(source), plan.columns)
    return ReadSettings(
        columns=plan.columns,
        pass_through=fields,
        storage_options=dict(job.config.storage_options),
        max_text_bytes=job.config.max_text_bytes,
        needs_score=job.config.interpolate is not None,
        queries=job.queries,
        corpus=job.corpus,
        cache=default_cache(),
    )


def _commit_settings(job: Job, plan: Plan, weight: float | None) -> CommitSettings:
    return CommitSettings(
        output=job.output,
        fingerprint=plan.fingerprint,
        rank=RankSettings(
            top_k=job.config.top_k,
            weight=weight,
            query_id_type=plan.query_id_type,
            doc_id_type=plan.doc_id_type,
            files=tuple(file.uri for file in plan.inputs),
            trec_run=job.config.trec_run,
        ),
        num_buckets=plan.num_buckets,
        score_range=job.model.score_range(),
    )
