"""The evaluation job: read what is judged, let models score it, compare, report.

A model scores through the rerank job, one run for each collection in a folder of its own below the output: so it
resumes, and is exactly once. Everything else is computed anew by each call, in seconds, from what is stored. Running
the same command again goes on where it was; with other settings, what was scored already is used as far as it fits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal, TextIO

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from crossenc.errors import ConfigError, InputError, RunConflictError
from crossenc.evaluation import comparison
from crossenc.evaluation.comparison import Collection, System, Values
from crossenc.evaluation.depths import rerank_top
from crossenc.evaluation.results import Evaluation
from pipelines import evaluation_inputs, evaluation_report, lease, ledger, rankings
from pipelines import plan as plans
from pipelines.config import RerankConfig
from pipelines.evaluate import reranked_runs
from pipelines.evaluation_config import CollectionConfig, EvaluateConfig, SystemConfig
from pipelines.evaluation_inputs import Judged, Source
from pipelines.evaluation_losses import Loss, with_texts, worst_losses
from pipelines.evaluation_texts import Prepared, look_up, prepare
from pipelines.finish import REPORT_FILE, SUCCESS_FILE
from pipelines.model import Model, from_config
from pipelines.progress import announce
from pipelines.rankings import Ranking
from pipelines.records import ShardCounts
from pipelines.rerank import rerank
from pipelines.schemas import to_parquet
from pipelines.storage import (
    Location,
    check_apart,
    delete,
    exists,
    list_files,
    locate,
    probe,
    put,
    read_bytes,
)

#: Raised when the meaning of evaluation.json changes.
FORMAT = 1
EVALUATION_FILE = "evaluation.json"
PER_QUERY_FILE = "per_query.parquet"
LOSSES_FILE = "losses.jsonl"
_FOLDERS = ("collections", "runs", "trec")
_FILES = (EVALUATION_FILE, PER_QUERY_FILE, LOSSES_FILE, REPORT_FILE)
#: A ranking that lacks more of the candidates than this says nothing about depths.
_MOST_LACKING = 0.01
_TEXT_LENGTH = 280
_PACKAGES = ("crossenc", "ir_measures", "numpy", "ray", "scipy", "torch", "transformers")
_EVALUATION = TypeAdapter(Evaluation)

State = Literal["done", "already done", "stopped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `evaluate` ended. `evaluation` is what was found, None where it was stopped."""

    state: State
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

    `models` replaces those of the systems with these names.
    """
    output = locate(config.output, config.storage_options)
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
    if not new_run and exists(job.output / SUCCESS_FILE):
        stored = _stored(job.output)
        if stored["fingerprint"] == fingerprint:
            message = f"nothing to do: this evaluation is finished; see {job.output / REPORT_FILE}"
            return Outcome("already done", job.output, message, load(job.output))
    probe(job.output)  # found unwritable now, not after the first model

    def say(text: str) -> None:
        announce(stream, text)

    lost: list[str] = []
    with lease.hold(job.output, dict, lost.append, say):
        delete([job.output / SUCCESS_FILE])
        if new_run:
            _remove(job.output)
        collections, prepared = [], {}
        for source in job.sources:
            say(f"reading {source.config.name} …")
            judged = evaluation_inputs.read(source)
            folder = job.output / f"collections/{source.config.name}"
            texts = prepare(judged, folder, max(config.depths)) if source.has_texts else None
            systems = []
            for system in config.systems:
                ranked = _ranked(job, system, judged, texts, connect, stream, lambda: bool(lost) or should_stop())
                if ranked is None:
                    message = lost[0] if lost else f"stopped; run the same command again to resume {job.output}"
                    return Outcome("stopped", job.output, message)
                systems.append(ranked)
            collections.append(_collection(judged, systems, texts, max(config.depths)))
            prepared[source.config.name] = texts
        say("comparing …")
        found = _compare(job, collections, prepared, fingerprint)
        put(job.output / SUCCESS_FILE, b"")
    return Outcome("done", job.output, f"done; see {job.output / REPORT_FILE}", found)


def load(output: Location) -> Evaluation:
    """What a finished evaluation found. Raises RunConflictError where there is none that can be read."""
    try:
        return _EVALUATION.validate_python(_stored(output)["evaluation"])
    except (KeyError, ValidationError) as error:
        raise RunConflictError(f"{output / EVALUATION_FILE} is no evaluation of this version ({error})") from None


def _stored(output: Location) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(read_bytes(output / EVALUATION_FILE))
        if body["format"] != FORMAT or "fingerprint" not in body:
            raise ValueError("another format")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise RunConflictError(
            f"{output / EVALUATION_FILE} is no evaluation of this version ({error}); start over with --new-run"
        ) from None
    return body


def _remove(output: Location) -> None:
    """Deletes everything that evaluations write below `output`, but for the lease."""
    delete([output / name for name in _FILES])
    delete([file.location for folder in _FOLDERS for file in list_files(output / folder)])


def _rerank_config(
    config: EvaluateConfig, system: SystemConfig, settings: Mapping[str, Any], output: str
) -> RerankConfig:
    """The settings of the run in which a model scores what `settings` name."""
    return RerankConfig(
        model=system.model or "",
        output=output,
        scoring=system.scoring or config.scoring,
        max_text_bytes=config.max_text_bytes,
        storage_options=config.storage_options,
        drain_seconds=config.drain_seconds,
        ray_address=config.ray_address,
        **({"candidates": "none"} | dict(settings)),
    )


def _ranked(
    job: EvaluationJob,
    system: SystemConfig,
    judged: Judged,
    texts: Prepared | None,
    connect: Callable[[RerankConfig], int],
    stream: TextIO,
    should_stop: Callable[[], bool],
) -> System | None:
    """The ranking of a system, read or made; None where it was stopped while it was made."""
    collection = judged.source.config
    existing = job.rankings.get((system.name, collection.name))
    if existing is not None:
        return _read(system, collection, existing, judged)
    assert texts is not None, "resolve refuses models without texts"
    model = job.models[system.name]
    scoring = system.scoring or job.config.scoring
    identity = [texts.digest, dict(model.digests()), scoring.result_options(), job.config.max_text_bytes]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = job.output / f"runs/{collection.name}/{system.name}-{digest[:8]}"
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


def _compare(
    job: EvaluationJob, collections: Sequence[Collection], prepared: Mapping[str, Prepared | None], fingerprint: str
) -> Evaluation:
    """Computes all figures and writes everything but the mark of success."""
    config = job.config
    values = {one.name: comparison.values_of(one, config.measures) for one in collections}
    found = comparison.evaluate(collections, values, depths=config.depths, baseline=config.baseline, seed=config.seed)
    losses: list[Loss] = []
    for one in collections:
        worst = worst_losses(one, values[one.name], config.measures[0], config.baseline, config.worst)
        losses += _told(worst, prepared[one.name], config)
    versions = {package: version(package) for package in _PACKAGES}
    body = {"format": FORMAT, "fingerprint": fingerprint, "depends_on": dict(job.parts), "versions": versions}
    body |= {"evaluation": asdict(found)}
    put(job.output / EVALUATION_FILE, json.dumps(body, indent=1).encode())
    put(job.output / PER_QUERY_FILE, to_parquet(per_query_table(collections, values, config.baseline)))
    lines = [json.dumps(asdict(loss), ensure_ascii=False) + "\n" for loss in losses]
    put(job.output / LOSSES_FILE, "".join(lines).encode())
    if config.trec_run:
        for one in collections:
            for system in one.all_systems:
                run = {query: system.run[query] for query in one.qrels if query in system.run}
                put(job.output / f"trec/{one.name}/{system.name}.run", rankings.trec_run(run))
    differences = {
        one.name: {name: _differences(values[one.name], name, config) for name in values[one.name]}
        for one in collections
    }
    page = evaluation_report.Page(
        evaluation=found,
        differences=differences,
        losses=tuple(losses),
        output=str(job.output),
        inputs={source.config.name: tuple(str(file.location) for file in source.files) for source in job.sources},
        versions=versions,
    )
    put(job.output / REPORT_FILE, evaluation_report.render(page).encode())
    return found


def _differences(values: Mapping[str, Values], system: str, config: EvaluateConfig) -> tuple[float, ...]:
    """The main measure of each query minus the baseline's."""
    before, after = values[config.baseline][config.measures[0]], values[system][config.measures[0]]
    return tuple(after[query] - before[query] for query in before)


def _told(losses: Sequence[Loss], texts: Prepared | None, config: EvaluateConfig) -> list[Loss]:
    if texts is None or not losses:
        return list(losses)
    pairs = [pair for loss in losses for pair in loss.pairs]
    found = look_up(texts, pairs, config.storage_options, config.max_text_bytes, _TEXT_LENGTH)
    return [with_texts(loss, found) for loss in losses]


def per_query_table(
    collections: Sequence[Collection], values: Mapping[str, Mapping[str, Values]], baseline: str
) -> pa.Table:
    """A row for each query and system: what was judged and ranked, a column for each measure, segments, and
    `difference`, that of the main measure to the baseline.
    """
    segments = list(dict.fromkeys(column for one in collections for column in one.segments))
    rows: list[dict[str, Any]] = []
    for one in collections:
        for system in one.all_systems:
            of = values[one.name][system.name]
            main = next(iter(of))
            for query, grades in one.qrels.items():
                row = {
                    "collection": one.name,
                    "query_id": query,
                    "system": system.name,
                    "num_judged": len(grades),
                    "num_relevant": sum(grade > 0 for grade in grades.values()),
                    "num_ranked": len(system.run.get(query, ())),
                    "difference": of[main][query] - values[one.name][baseline][main][query],
                }
                row |= {measure: by_query[query] for measure, by_query in of.items()}
                row |= {f"segment {name}": one.segments.get(name, {}).get(query) for name in segments}
                rows.append(row)
    texts = ["collection", "query_id", "system", *(f"segment {name}" for name in segments)]
    kinds = {name: pa.string() for name in texts} | dict.fromkeys(
        ("num_judged", "num_relevant", "num_ranked"), pa.int64()
    )
    names = list(rows[0])
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    return pa.Table.from_pylist(rows, schema=schema)
