"""The mining job: judgements and candidates, or a rerank run, to training data. Exactly once, unit by unit.

Judgements are in memory, candidates and texts a unit at a time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from crossenc.records import Qrels
from pipelines import plan as plans
from pipelines import units
from pipelines.evaluate import read_qrels
from pipelines.inputs import list_candidates, scan
from pipelines.mine_config import MineConfig
from pipelines.mine_formats import Format
from pipelines.mine_shard import KIND, MineContext, MineCounts
from pipelines.plan import Plan
from pipelines.prepare import ReadSettings
from pipelines.storage import FileInfo, Location, check_apart, expand, locate
from pipelines.texts import TextTable, default_cache, find_tables
from pipelines.unit_rows import finished_rerank, planned_files

Outcome = units.Outcome[MineCounts]


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
    judged_uris = [*config.qrels_uris, *config.known_uris]
    check_apart(output, [*config.candidate_uris, config.reranked, config.queries, config.corpus, *judged_uris])
    source, results, columns = None, None, config.columns
    if config.reranked is not None:
        source, results = finished_rerank("reranked", locate(config.reranked, options), config.queries is not None)
        columns = json.loads(source.parts["option columns"])
    queries, corpus = find_tables(config.queries, config.corpus, columns, options)
    files = list_candidates(config) if source is None else planned_files(source, options)
    judgements = [file for uri in judged_uris for file in expand(locate(uri, options), ".parquet")]
    tables = [*(queries.files if queries else ()), *(corpus.files if corpus else ())]
    everything = [*files, *tables, *judgements, *(results or {}).values()]
    parts = plans.describe_parts(everything, {}, config.result_options()) | {"job": "mine"}
    return MineJob(config, output, tuple(files), queries, corpus, source, results, parts)


def make_plan(job: MineJob) -> Plan:
    """The plan of the job, not stored: the rerank run's own shards, or new ones."""
    if job.source is not None:
        plan = units.plan_of_rerank(job.source, job.parts)
    else:
        inputs = scan(job.config, job.files)
        size = job.config.shard_candidates or units.SHARD_CANDIDATES
        plan = plans.make(inputs, job.parts, shard_candidates=size, force_two_phase=False)
    return units.with_small_buckets(plan)


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
    """Runs the job to its end, or goes on with an earlier attempt, as `units.run` does."""
    job = resolve(config)
    work = units.UnitJob(
        output=job.output,
        parts=job.parts,
        kind=KIND,
        make_plan=lambda: make_plan(job),
        make_context=lambda plan: _context(job, plan),
        workers=config.workers,
        storage_options=config.storage_options,
    )
    return units.run(work, stream=stream, should_stop=should_stop, new_run=new_run)


def _context(job: MineJob, plan: Plan) -> MineContext:
    config = job.config
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
    return MineContext(
        output=job.output,
        plan=plan,
        read=read,
        results=() if job.results is None else (job.results,),
        qrels=qrels,
        known=read_qrels(config.known_uris, config.storage_options, qrels.keys()),
        settings=config.rules(),
        shape=Format(config.format, config.num_negatives, config.scores, config.labels),
        from_others=config.random_from == "others",
    )
