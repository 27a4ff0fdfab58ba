"""The evaluation job: read what is judged, let models score it, compare, report.

A model scores through the rerank job, one run for each collection in a folder of its own below the output: so it
resumes, and is exactly once. Everything else is computed anew by each call, in seconds, from what is stored. Running
the same command again goes on where it was; with other settings, what was scored already is used as far as it fits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from crossenc.errors import ConfigError, InputError
from crossenc.evaluation.comparison import Collection, System
from crossenc.evaluation.depths import rerank_top
from crossenc.evaluation.results import Evaluation
from pipelines import evaluation_inputs, lease, ledger, logs, metrics, rankings
from pipelines import plan as plans
from pipelines.config import RerankConfig
from pipelines.evaluate import reranked_runs
from pipelines.evaluation_config import CollectionConfig, EvaluateConfig, SystemConfig
from pipelines.evaluation_inputs import Judged, Source
from pipelines.evaluation_output import (
    EVALUATION_FILES,
    FORMAT,
    TREC_FOLDER,
    Judgement,
    load,
    stored,
    write,
)
from pipelines.evaluation_texts import Prepared, prepare
from pipelines.model import Model, choose, from_config
from pipelines.progress import announce
from pipelines.rankings import Ranking
from pipelines.records import REPORT_FILE, SUCCESS_FILE, JobState, ShardCounts
from pipelines.rerank import rerank
from pipelines.schemas import SCORING_FAILURES
from pipelines.storage import Location, check_apart, delete, exists, list_files, locate, probe, put

#: A rerank run for each model and collection.
_RUNS_FOLDER = "runs"
_FOLDERS = ("collections", _RUNS_FOLDER, TREC_FOLDER)
#: A ranking that lacks more of the candidates than this says nothing about depths.
_MOST_LACKING = 0.01


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `evaluate` ended. `evaluation` is what was found, None where it was stopped."""

    state: JobState
    output: Location
    message: str
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """A job with everything resolved that its figures rest on. Rankings are by (system, collection)."""

    config: EvaluateConfig
    output: Location
    sources: tuple[Source, ...]
    models: Mapping[str, Model]
    rankings: Mapping[tuple[str, str], Ranking]
    parts: Mapping[str, str]


def resolve(config: EvaluateConfig, models: Mapping[str, Model] | None = None) -> EvaluationJob:
    """Looks everything up that the job names. Raises InputError before any work is done.

    `models` replaces those of the systems with these names. A model registry://name is what is current there now.
    """
    output = locate(config.output, config.storage_options)
    config = config.model_copy(update={"systems": tuple(_with_version(config, system) for system in config.systems)})
    check_apart(output, _inputs(config))
    sources = tuple(evaluation_inputs.find(collection, config.storage_options) for collection in config.collections)
    given = models or {}
    found: dict[str, Model] = {}
    existing: dict[tuple[str, str], Ranking] = {}
    for system in config.systems:
        if system.model is not None:
            model = given.get(system.name) or from_config(_rerank_config(config, system, {}, "none")).pinned()
            model.score_range()  # a model that cannot rank is found here, not after another one's hours
            found[system.name] = model
        for collection in config.collections:
            uri = config.ranking_of(system, collection)
            if uri is not None:
                existing[system.name, collection.name] = rankings.find(uri, config.storage_options)
    without_texts = [source.config.name for source in sources if not source.has_texts]
    if found and without_texts:
        raise ConfigError(f"{without_texts[0]} has no texts for a model to read: name its queries and corpus")
    files = [file for source in sources for file in source.files]
    files += [file for ranking in existing.values() for file in ranking.files]
    digests = {f"{name} {file}": digest for name, model in found.items() for file, digest in model.digests().items()}
    parts = plans.describe_parts(files, digests, config.result_options()) | {"job": "evaluate", "figures": str(FORMAT)}
    return EvaluationJob(config, output, sources, found, existing, parts)


def _with_version(config: EvaluateConfig, system: SystemConfig) -> SystemConfig:
    if system.model is None:
        return system
    source, _ = choose(system.model, config.registry, config.storage_options)
    return system.model_copy(update={"model": source})


def _inputs(config: EvaluateConfig) -> list[str | None]:
    uris: list[str | None] = []
    for one in config.collections:
        uris += [*one.candidate_uris, *(one.tables or ()), one.qrels_uri, one.query_columns]
    for system in config.systems:
        uris += [config.ranking_of(system, collection) for collection in config.collections]
    return uris


def describe(job: EvaluationJob) -> list[str]:
    """The job in figures, for people, one fact a line. Reads judgements and ids, and writes nothing."""
    lines = []
    num_pairs = 0
    for source in job.sources:
        judged = evaluation_inputs.read(source)
        depth = max(job.config.depths)
        pairs = sum(min(len(docs), depth) for docs in judged.first_stage.values())
        num_pairs += pairs * len(job.models)
        lines.append(f"{source.config.name:<12} {len(judged.qrels):,} queries, {pairs:,} candidates to a model")
        lines += [f"{'':<12} {note}" for note in judged.notes]
    lines.append(f"{'systems':<12} {len(job.models):,} models, {len(job.config.systems) - len(job.models):,} rankings")
    lines.append(f"{'work':<12} {num_pairs:,} pairs to score, less what the output holds already")
    return lines


def evaluate(
    config: EvaluateConfig,
    *,
    connect: Callable[[RerankConfig], int],
    stream: TextIO,
    should_stop: Callable[[], bool] = lambda: False,
    models: Mapping[str, Model] | None = None,
    new_run: bool = False,
) -> Outcome:
    """Runs the job to its end, or goes on with an earlier attempt.

    `connect(config)` makes Ray ready for a model's run and returns the cores of this machine; it is called when there
    is something to score. `should_stop()` and the errors are those of `rerank`. `new_run` deletes what was scored.
    """
    job = resolve(config, models)
    fingerprint = plans.fingerprint(job.parts)
    is_finished = not new_run and exists(job.output / SUCCESS_FILE)
    if is_finished and stored(job.output)["fingerprint"] == fingerprint:
        message = f"nothing to do: this evaluation is finished; see {job.output / REPORT_FILE}"
        return Outcome("already done", job.output, message, load(job.output))
    probe(job.output)  # found unwritable now, not after the first model

    def say(text: str) -> None:
        announce(stream, text)

    lost: list[str] = []
    run = logs.about(metrics.run_tag(fingerprint), job.config.storage_options)
    with run, lease.hold(job.output, dict, lost.append, say) as epoch:
        delete([job.output / SUCCESS_FILE])
        if new_run:
            _remove(job.output)
        judgements = []
        for source in job.sources:
            say(f"reading {source.config.name} …")
            judgement = _judge(job, source, connect, stream, lambda: bool(lost) or should_stop())
            if judgement is None:
                message = lost[0] if lost else f"stopped; run the same command again to resume {job.output}"
                return Outcome("stopped", job.output, message)
            judgements.append(judgement)
        if message := lost[0] if lost else lease.overtaken(job.output, epoch):
            return Outcome("stopped", job.output, message)
        say("comparing …")
        found = write(job.output, job.config, judgements, job.parts)
        put(job.output / SUCCESS_FILE, b"")
    return Outcome("done", job.output, f"done; see {job.output / REPORT_FILE}", found)


def _remove(output: Location) -> None:
    """Deletes everything that evaluations write below `output`, but for the lease."""
    delete([output / name for name in EVALUATION_FILES])
    delete([file.location for folder in _FOLDERS for file in list_files(output / folder)])


def _judge(
    job: EvaluationJob,
    source: Source,
    connect: Callable[[RerankConfig], int],
    stream: TextIO,
    should_stop: Callable[[], bool],
) -> Judgement | None:
    """A collection with the rankings of all systems; None where it was stopped while one was made."""
    judged, depth = evaluation_inputs.read(source), max(job.config.depths)
    folder = job.output / f"collections/{source.config.name}"
    texts = prepare(judged, folder, depth) if source.has_texts else None
    systems = []
    for system in job.config.systems:
        existing = job.rankings.get((system.name, source.config.name))
        if existing is not None:
            systems.append(_read(system, source.config, existing, judged))
            continue
        assert texts is not None, "resolve refuses models without texts"
        scored = _scored(job, system, judged, texts, connect, stream, should_stop)
        if scored is None:
            return None
        systems.append(scored)
    inputs = tuple(str(file.location) for file in source.files)
    return Judgement(_collection(judged, systems, texts, depth), texts, inputs)


def _rerank_config(
    config: EvaluateConfig, system: SystemConfig, settings: Mapping[str, Any], output: str
) -> RerankConfig:
    """The settings of the run in which a model scores what `settings` name."""
    return RerankConfig(
        model=system.model or "",
        output=output,
        registry=config.registry,
        scoring=system.scoring or config.scoring,
        max_text_bytes=config.max_text_bytes,
        storage_options=config.storage_options,
        drain_seconds=config.drain_seconds,
        ray_address=config.ray_address,
        **({"candidates": "none"} | dict(settings)),
    )


def _scored(
    job: EvaluationJob,
    system: SystemConfig,
    judged: Judged,
    texts: Prepared,
    connect: Callable[[RerankConfig], int],
    stream: TextIO,
    should_stop: Callable[[], bool],
) -> System | None:
    """The ranking that a model makes, by a rerank run; None where it was stopped."""
    collection = judged.source.config
    model = job.models[system.name]
    scoring = system.scoring or job.config.scoring
    identity = [texts.digest, dict(model.digests()), scoring.result_options(), job.config.max_text_bytes]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = job.output / f"{_RUNS_FOLDER}/{collection.name}/{system.name}-{digest[:8]}"
    announce(stream, f"{system.name} on {collection.name} …")
    config = _rerank_config(job.config, system, texts.settings, folder.uri)
    outcome = rerank(config, connect=lambda: connect(config), stream=stream, should_stop=should_stop, model=model)
    if outcome.state == "stopped":
        return None
    assert outcome.counts is not None, "a run that ended has counts"
    depth = max(job.config.depths)
    results = reranked_runs(folder, judged.qrels)
    run = {query: rerank_top(docs, results.get(query, ()), depth) for query, docs in judged.first_stage.items()}
    return System(
        name=system.name,
        kind="model",
        source=model.name,
        run=run,
        pairs_per_second=_rate(folder),
        num_failed=sum(outcome.counts.refused.get(reason, 0) for reason in SCORING_FAILURES),
        notes=_refused(outcome.counts),
    )


def _refused(counts: ShardCounts) -> tuple[str, ...]:
    if not counts.refused:
        return ()
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in counts.refused.items())
    total = sum(counts.refused.values())
    return (f"{total:,} of {counts.num_candidates:,} candidates were refused and are not ranked: {reasons}",)


def _rate(run: Location) -> float | None:
    """Pairs a second of one scorer while it scored, from the run's journal; None where that is lost."""
    timed = [record for record in ledger.read_journal(run).values() if record.seconds.score > 0]
    seconds = sum(record.seconds.score for record in timed)
    return sum(record.counts.num_scored for record in timed) / seconds if seconds else None


def _read(system: SystemConfig, collection: CollectionConfig, ranking: Ranking, judged: Judged) -> System:
    """A ranking that is there already."""
    run = rankings.read(ranking, judged.qrels, judged.source.options)
    if not run:
        raise InputError(f"{ranking.location} ranks none of the judged queries of {collection.name}: compare their ids")
    num_candidates = sum(map(len, judged.first_stage.values()))
    ranked = {query: set(docs) for query, docs in run.items()}
    num_lacking = sum(
        doc_id not in ranked.get(query, ()) for query, docs in judged.first_stage.items() for doc_id in docs
    )
    has_depths = not ranking.cut and num_lacking <= _MOST_LACKING * num_candidates
    notes = [ranking.cut] if ranking.cut else []
    if num_lacking:
        notes.append(f"{num_lacking:,} of {num_candidates:,} candidates are not in this ranking")
    if not has_depths:
        notes.append("not looked at by depths: it lacks candidates")
    return System(
        name=system.name,
        kind="ranking",
        source=ranking.location.uri,
        run=run,
        has_depths=has_depths,
        notes=tuple(notes),
    )


def _collection(judged: Judged, systems: Sequence[System], texts: Prepared | None, depth: int) -> Collection:
    notes = list(judged.notes)
    longest = max((len(docs) for docs in judged.first_stage.values()), default=0)
    if longest > depth:
        notes.append(
            f"models order the first {depth:,} of up to {longest:,} candidates; the rest stays in first-stage order"
        )
    return Collection(
        name=judged.source.config.name,
        qrels=judged.qrels,
        first_stage=judged.first_stage,
        systems=tuple(systems),
        segments=judged.segments,
        digests=dict(judged.digests) | ({"texts": texts.digest} if texts is not None else {}),
        notes=tuple(notes),
    )
