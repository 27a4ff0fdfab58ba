"""The retraining job: new labels to a decision about a new version, step by step.

    labels → (mine) → (distil) → train from the current version → evaluate both on one fixed set → decide → promote

Each retraining has a folder of its own below retrainings/, and each step in it is a job that is resumable by itself and
does nothing twice. What a retraining sets out with is stored before its first step, what is decided after its last: so
a killed one goes on with the same files, the same parent and the same decision. The registry takes a promotion by the
retraining's key once, and only while its history is as it was at the start.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from crossenc.errors import ConfigError, CrossEncError, InputError, RunConflictError, StorageError
from crossenc.evaluation.gate import Decision, decide
from crossenc.evaluation.results import FIRST_STAGE, Evaluation
from crossenc.layout import ranks
from crossenc.model import CrossEncoder
from pipelines import distill as distilling
from pipelines import evaluation as evaluating
from pipelines import evaluation_inputs, execute, lease, logs, registry
from pipelines import mine as mining
from pipelines import plan as plans
from pipelines import rerank as reranking
from pipelines import retrain_records as records
from pipelines import train as training
from pipelines.distill import STUDENT_FOLDER
from pipelines.evaluate import read_qrels
from pipelines.evaluation_inputs import Source
from pipelines.evaluation_output import EVALUATION_FILES, load
from pipelines.model import checkpoint
from pipelines.new_version import EVALUATION_FOLDER
from pipelines.progress import announce
from pipelines.rankings import Tables
from pipelines.records import REPORT_FILE
from pipelines.retrain_config import RetrainConfig
from pipelines.retrain_leaks import (
    FixedQueries,
    Leaks,
    Query,
    candidate_queries,
    find_leaks,
    fixed_queries,
    label_queries,
    refusal,
    without_rows,
)
from pipelines.retrain_records import Ending, LabelFile, Retraining
from pipelines.retrain_report import Story, card_of, facts_of, lineage_of, render
from pipelines.storage import (
    FileInfo,
    Location,
    check_apart,
    list_files,
    locate,
    probe,
    put,
    put_new,
    read_bytes,
    redact,
)
from pipelines.texts import find_table
from pipelines.train_data import NothingToLearnError
from pipelines.train_data_config import LabelledData
from pipelines.train_files import find_columns, has_rows
from pipelines.train_files import list_files as list_input
from pipelines.train_finish import MODEL_FOLDER
from pipelines.units import DATA_FOLDER

#: The model with the card that tells of its promotion, as it goes to the registry.
PROMOTED_FOLDER = "promoted"
LABELS_FOLDER, PUSHED_FILE = "labels", "pushed.json"
_CARD = "README.md"
_READERS = 8
_LEARNED_BEFORE = "rows of labels from before are judged on now: earlier versions may have learned their queries"

State = Literal["promoted", "refused", "void", "nothing new", "stopped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `retrain` ended. `folder` is the retraining's, None where there was none to do."""

    state: State
    message: str
    folder: Location | None = None
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class RetrainJob:
    """A job with everything looked up that does not depend on which retraining it is.

    `files` are the label files with rows, `empty` those without.
    """

    config: RetrainConfig
    output: Location
    registry: Location
    sources: tuple[Source, ...]
    files: tuple[FileInfo, ...]
    empty: tuple[FileInfo, ...]
    parts: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.config.storage_options)


@dataclass(slots=True)
class _Run:
    """A retraining at work. `step` is what it is at, for those who look at the lease."""

    job: RetrainJob
    connect: Callable[[], int]
    stream: TextIO
    should_stop: Callable[[], bool]
    retraining: Retraining | None = None
    step: str = ""
    lost: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        announce(self.stream, text)

    def is_over(self) -> bool:
        return bool(self.lost) or self.should_stop()

    def snapshot(self) -> dict[str, Any]:
        return {"retraining": self.retraining.key if self.retraining else None, "step": self.step}

    def begin(self, step: str, text: str) -> None:
        self.step = step
        self.say(text)

    @property
    def one(self) -> Retraining:
        assert self.retraining is not None, "steps are done of a retraining"
        return self.retraining

    @property
    def folder(self) -> Location:
        return records.folder_of(self.job.output, self.one.key)

    @property
    def shared(self) -> dict[str, Any]:
        return {"connect": self.connect, "stream": self.stream, "should_stop": self.is_over}


class _StoppedError(Exception):
    """A step was told to stop; what it did is kept."""


def needs(config: RetrainConfig, cores: int) -> dict[str, float]:
    """The CPUs and GPUs that the job holds at once, in whichever step."""
    scoring = config.rerank_config("model", "reranked") if config.mine else None
    found = [training.needs(config.train_config(config.labels, "start", "trained"), cores)]
    found.append(execute.needs(config.scoring_config("model", "evaluation"), cores))
    found += [execute.needs(scoring, cores)] if scoring else []
    found += [distilling.needs(config.distill_config("start", "distilled"), cores)] if config.distill else []
    return {kind: max(one[kind] for one in found) for kind in found[0]}


def resolve(config: RetrainConfig) -> RetrainJob:
    """Looks up what the job names, but for models. Raises InputError before any work is done."""
    options = dict(config.storage_options)
    output, place = locate(config.output, options), locate(config.registry, options)
    inputs: list[str | None] = [config.registry, *config.labels.uris, config.labels.queries, config.labels.corpus]
    for one in config.evaluation.collections:
        inputs += [*one.candidate_uris, *(one.tables or ()), one.qrels_uri, one.query_columns]
    check_apart(output, inputs)
    sources = tuple(evaluation_inputs.find(one, options) for one in config.evaluation.collections)
    for source in sources:
        if not source.has_texts:
            raise ConfigError(f"{source.config.name} has no texts for a model to read: name its queries and corpus")
    listed = list_input(config.labels, options)
    with ThreadPoolExecutor(_READERS) as pool:
        filled = list(pool.map(has_rows, listed))
    files = [file for file, is_filled in zip(listed, filled, strict=True) if is_filled]
    empty = [file for file, is_filled in zip(listed, filled, strict=True) if not is_filled]
    if not files:
        raise InputError(f"none of {len(listed):,} label files has a row, as {listed[0].location}: there are no labels")
    find_columns(config.labels, files)
    if config.mine is not None and not all(file.location.name.endswith(".parquet") for file in files):
        raise ConfigError("mine needs labels as Parquet with query_id, doc_id and label")
    judged_on = [file for source in sources for file in source.files]
    parts = plans.describe_parts(judged_on, {}, config.result_options()) | {"job": "retrain"}
    return RetrainJob(config, output, place, sources, tuple(files), tuple(empty), parts)


def describe(job: RetrainJob) -> list[str]:
    """What a call would do, for people, one fact a line. Reads labels and registry, and writes nothing.

    Raises InputError as the call would, for leaks among others.
    """
    known = records.read_all(job.output)
    pending = next((one for one, ending in known if ending is None), None)
    entry = registry.newest(job.registry, job.config.name)
    lines = [f"{'current':<12} {entry.version if entry else f'none; {job.config.base} is trained from'}"]
    if pending is not None:
        plans.check_unchanged(pending.parts, job.parts, records.folder_of(job.output, pending.key))
        lines.append(f"{'goes on with':<12} {pending.key}, {len(pending.new_files):,} new files of labels")
        steps = records.steps(job.output, pending)
        return lines + [f"{'done' if step.done else 'to do':<12} {step.name}" for step in steps]
    lines += [f"{'':<12} {_empty(job)}"] if job.empty else []
    made = _make(job, known)
    if made is None:
        return [*lines, f"{'labels':<12} {len(job.files):,} files; {_nothing_new(job, known)}: nothing to do"]
    num_bytes = sum(file.num_bytes for file in made.files)
    lines.append(f"{'labels':<12} {len(made.files):,} files to train on, {num_bytes / 1e6:,.1f} MB; new are")
    lines += [f"{'':<12} {file.uri}" for file in made.new_files]
    leaking = sum(file.num_leaking for file in made.files)
    lines += [f"{'':<12} {leaking:,} rows of them are judged on, and left out"] if leaking else []
    before = made.num_leaking_before
    lines += [f"{'':<12} {before:,} {_LEARNED_BEFORE}"] if before else []
    lines.append(f"{'baseline':<12} {made.baseline}")
    return lines + [f"{'to do':<12} {step.name}" for step in records.steps(job.output, made)]


def retrain(
    config: RetrainConfig,
    *,
    connect: Callable[[], int],
    stream: TextIO,
    should_stop: Callable[[], bool] = lambda: False,
    new_run: bool = False,
) -> Outcome:
    """Goes on with the retraining that was not finished, or does one where there are new labels.

    `connect()` makes Ray ready and returns the cores of this machine. `should_stop()` is asked now and then, as the
    steps do it. `new_run` gives an unfinished retraining up. Raises CrossEncError with what is wrong and what to do;
    nothing that is stored is lost.
    """
    job = resolve(config)
    probe(job.output)
    run = _Run(job, connect, stream, should_stop)
    with lease.hold(job.output, run.snapshot, run.lost.append, run.say):
        outcome = _next(run, new_run)
        return outcome if outcome.state == "stopped" else _pushed(run, outcome)


def _next(run: _Run, new_run: bool) -> Outcome:
    """The retraining that was not finished, or a new one where there is anything to do, to its ending."""
    job, known = run.job, records.read_all(run.job.output)
    pending = next((one for one, ending in known if ending is None), None)
    if pending is not None and new_run:
        _give_up(run, pending)
        known, pending = records.read_all(job.output), None
    if pending is not None:
        plans.check_unchanged(pending.parts, job.parts, records.folder_of(job.output, pending.key))
        run.say(f"going on with {pending.key} …")
    else:
        run.begin("labels", "looking for new labels …")
        if job.empty:
            run.say(_empty(job))
        pending = _make(job, known)
        if pending is None:
            return Outcome("nothing new", f"nothing to do: {_nothing_new(job, known)}")
        pending = records.begin(job.output, pending)
        run.say(f"{pending.key}: {len(pending.new_files):,} new of {len(job.files):,} files of labels")
        if pending.num_leaking_before:
            run.say(f"{pending.num_leaking_before:,} {_LEARNED_BEFORE}")
    run.retraining = pending
    try:
        with logs.about(pending.key, job.options):
            return _finish(run)
    except NothingToLearnError as error:
        _end(run, "void", str(error), None, None)
        raise NothingToLearnError(
            f"{error}\n{pending.key} is void; the same command begins another one with the labels as they are then"
        ) from None
    except CrossEncError:
        run.say(f"{pending.key} is not finished: the same command goes on with it, --new-run begins another one")
        raise
    except _StoppedError:
        message = run.lost[0] if run.lost else f"stopped; run the same command again to resume {run.folder}"
        return Outcome("stopped", message, run.folder)


def _empty(job: RetrainJob) -> str:
    return f"{len(job.empty):,} label files without rows are passed over, as {job.empty[0].location}"


def _nothing_new(job: RetrainJob, known: Sequence[tuple[Retraining, Ending | None]]) -> str:
    last, ending = records.decided(known, job.registry, job.config.name)[-1]
    was = ", which was refused: with other settings or labels it is tried again" if ending.state == "refused" else ""
    return f"no label file is new since {last.key}{was}"


def _make(job: RetrainJob, known: Sequence[tuple[Retraining, Ending | None]]) -> Retraining | None:
    """What a new retraining sets out with, not stored; None where no label file is new.

    Raises InputError where something cannot work, or where what is learned from is judged on.
    """
    config = job.config
    before = records.decided(known, job.registry, config.name)
    again = records.to_try_again(before, job.files, job.parts)
    files = records.label_files(job.files, records.used_files(before, again))
    if not any(file.is_new for file in files):
        return None
    entry = registry.newest(job.registry, config.name)
    parent = entry.version if entry else None
    judges_base = parent is None and ranks(checkpoint(config.base, config.registry, config.storage_options).folder())
    _check_models(job, parent, judges_base)
    fixed = fixed_queries(job.sources, config.max_text_bytes)
    _refuse_leaks(job, fixed)
    leaks, num_rows = _label_leaks(job, files, fixed)  # of all files: what earlier versions learned counts, too
    if leaks.first and config.leaking == "refuse":
        remedy = "Take these rows out of the labels, or set leaking: drop to train without them."
        raise refusal(leaks, "the labels", remedy)
    files = [replace(file, num_leaking=len(leaks.rows.get(file.uri, ()))) for file in files]
    chosen = files if config.use == "all" else [file for file in files if file.is_new]
    num_left = sum(num_rows[file.uri] - file.num_leaking for file in chosen)
    if not num_left:
        raise InputError(
            "nothing is left to train on: every row of labels that can be read is judged on; add labels of other"
            " queries"
        )
    _check_judgements(job, chosen)
    num_before = leaks.num_rows - sum(file.num_leaking for file in chosen)
    now = round(time.time(), 3)
    key = records.new_key(now, [job.output.uri, [file.identity for file in chosen], job.parts])
    every = tuple(files) if config.mine is not None and len(chosen) < len(files) else ()
    number = entry.number if entry else 0
    return Retraining(key, now, parent, number, tuple(chosen), job.parts, num_before, judges_base, every)


def _check_models(job: RetrainJob, parent: str | None, judges_base: bool) -> None:
    """Looks up the models that steps begin with, so that what cannot work is found before the first one."""
    config, start = job.config, _model_of(job, parent)
    nowhere = job.output.uri
    training.resolve(config.train_config(config.labels, start, f"{nowhere}/{records.TRAINED_FOLDER}"))
    judged = {parent or records.BASE: start} if parent or judges_base else {}
    baseline = next(iter(judged), FIRST_STAGE)
    evaluating.resolve(config.evaluate_config(judged, baseline, f"{nowhere}/{records.EVALUATION_FOLDER}"))
    if config.distill is not None:
        distilling.check(config.distill_config(start, f"{nowhere}/{records.DISTILLED_FOLDER}"))
    if config.mine is not None:
        reranked = config.rerank_config(start, f"{nowhere}/{records.RERANKED_FOLDER}")
        if parent is not None:
            reranking.resolve(reranked)
        mining.resolve(config.mine_config(config.labels.uris, None, f"{nowhere}/{records.MINED_FOLDER}"))


def _check_judgements(job: RetrainJob, files: Sequence[LabelFile]) -> None:
    """Raises InputError where there are labels to mine for, and they are no judgements or have no positive one."""
    if job.config.mine is None:
        return
    qrels = read_qrels(tuple(file.uri for file in files), job.options)
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise InputError(
            f"the labels judge {len(qrels):,} queries, and none with a relevant document: there is nothing to mine"
        )


def _label_leaks(job: RetrainJob, files: Sequence[LabelFile], fixed: FixedQueries) -> tuple[Leaks, Counter[str]]:
    """The rows of labels whose query is judged on, and how many rows of each file, by URI, can be read."""
    infos = [records.as_info(file, job.options) for file in files]
    queries = label_queries(job.config.labels, infos, job.options, job.config.max_text_bytes)
    num_rows: Counter[str] = Counter()

    def counted() -> Iterator[Query]:
        for query in queries:
            num_rows[query.file.location.uri] += 1
            yield query

    return find_leaks(counted(), fixed), num_rows


def _refuse_leaks(job: RetrainJob, fixed: FixedQueries) -> None:
    """Raises InputError where validation data, or what teachers are to score, has queries that are judged on."""
    config, limit = job.config, job.config.max_text_bytes
    validation = config.train.validation
    if isinstance(validation, LabelledData):
        files = list_input(validation, job.options)
        found = find_leaks(label_queries(validation, files, job.options, limit), fixed)
        if found.first:
            raise refusal(found, "train.validation", "Take these rows out of the validation data.")
    if config.distill is not None:
        named = config.distill_config("start", "distilled")
        seen = named.rerank_config(named.teacher_names[0], "distilled")
        table = find_table("query", seen.queries, "query_id", seen.columns, job.options) if seen.queries else None
        plan = Tables(seen.candidate_uris, seen.layout, seen.columns, seen.queries, job.options).plan()
        found = find_leaks(candidate_queries(plan, table, job.options, limit), fixed)
        if found.first:
            raise refusal(found, "distill.candidates", "Take these queries out of the candidates.")


def _model_of(job: RetrainJob, version: str | None) -> str:
    """What a step calls a version's model; the base, where there is no version."""
    return job.config.base if version is None else f"{registry.SCHEME}{job.config.name}@{version}"


def _named(place: Location) -> str:
    return place.path if place.scheme == "file" else place.uri


# --- the steps of a retraining


def _finish(run: _Run) -> Outcome:
    """The steps that are not done yet, and the ending."""
    if records.read_decision(run.folder) is None:
        overtaken = _overtaken(run)
        if overtaken is not None:
            return _void(run, overtaken, None)
        data = _labels(run)
        start = _model_of(run.job, run.one.parent)
        if run.job.config.mine is not None:
            data = _mine(run, data, start)
        if run.job.config.distill is not None:
            start = _distil(run, start)
        _train(run, data, start)
        _decide(run, _evaluate(run))
    decision = records.read_decision(run.folder)
    assert decision is not None, "it was just stored"
    overtaken = _overtaken(run)
    if overtaken is not None:
        return _void(run, overtaken, decision)
    story = _story(run, decision)
    if not decision.promote:
        put(run.folder / REPORT_FILE, render(story, "refused").encode())
        message = f"{decision.summary}; see {run.folder / REPORT_FILE}"
        return _end(run, "refused", message, decision, None)
    return _promote(run, story)


def _end(run: _Run, state: records.EndState, message: str, decision: Decision | None, entry: int | None) -> Outcome:
    ending = records.end(run.job.output, run.one, Ending(state, message, entry, round(time.time(), 3)))
    return Outcome(ending.state, ending.reason, run.folder, decision)


def _overtaken(run: _Run) -> str | None:
    """Why this retraining decides nothing any more, in words; None where the registry is as it was at the start."""
    history = registry.history(run.job.registry, run.job.config.name)
    newest = history[-1] if history else None
    if any(entry.key == run.one.key for entry in history):
        return None
    if (newest.number if newest else 0) == run.one.entry:
        return None
    if newest is None or newest.number < run.one.entry:
        found = f"its history has no entry {run.one.entry} any more"
    else:
        found = f"entry {newest.number} of its history, {newest.action} of {newest.version}, came after entry"
        found += f" {run.one.entry}"
    return (
        f"{run.job.config.name} was changed while {run.one.key} was at work: {found}, which it was to be compared with."
        " It promotes nothing; the same command begins another one with the same labels, from the version that is"
        " current then"
    )


def _void(run: _Run, reason: str, decision: Decision | None) -> Outcome:
    if decision is not None:
        put(run.folder / REPORT_FILE, render(_story(run, decision), "void", reason).encode())
    return _end(run, "void", reason, decision, None)


def _give_up(run: _Run, retraining: Retraining) -> None:
    """Ends a retraining that is not finished: as promoted where the registry says so."""
    run.retraining = retraining
    history = registry.history(run.job.registry, run.job.config.name)
    promoted = next((entry for entry in history if entry.key == retraining.key), None)
    decision = records.read_decision(run.folder)
    if promoted is None or decision is None:
        _end(run, "void", "given up for a new one", None, None)
    else:
        _end_promoted(run, _story(run, decision), promoted)
    run.retraining = None


def _labels(run: _Run) -> LabelledData:
    """What to train on: the files of labels, and in place of those with leaks copies without them."""
    config, files = run.job.config, run.one.files
    uris = {file.uri: file.uri for file in files}
    leaking = [file for file in files if file.num_leaking]
    now = {file.location.uri: (file.num_bytes, file.version) for file in run.job.files}
    needed = (*files, *run.one.known_files)
    changed = next((file.uri for file in needed if now.get(file.uri) != (file.num_bytes, file.version)), None)
    if changed is not None:
        raise RunConflictError(
            f"{changed} was changed or removed since {run.one.key} began; restore it, or begin another one with"
            " --new-run"
        )
    if leaking:
        run.begin("labels", f"leaving {sum(file.num_leaking for file in leaking):,} rows out that are judged on …")
        fixed = fixed_queries(run.job.sources, config.max_text_bytes)
        found, _ = _label_leaks(run.job, leaking, fixed)
        for number, file in enumerate(leaking):
            name, body = without_rows(records.as_info(file, run.job.options), found.rows.get(file.uri, ()))
            place = run.folder / f"{LABELS_FOLDER}/{number:06d}-{name}"
            if body is None:
                del uris[file.uri]
                continue
            put_new(place, body)
            uris[file.uri] = place.uri
    assert uris, "there were other rows when it began"
    return config.labels.model_copy(update={"files": tuple(uris.values())})


def _mine(run: _Run, judgements: LabelledData, start: str) -> LabelledData:
    """Lists of judged positives with negatives that the version in use ranks high, in place of the judgements."""
    config, reranked = run.job.config, None
    if run.one.parent is not None:
        run.begin("mine", f"scoring candidates with {run.one.parent} …")
        place = run.folder / records.RERANKED_FOLDER
        reranked = place.uri
        _go_on(run, reranking.rerank(config.rerank_config(start, reranked), **run.shared).state)
    run.begin("mine", "mining negatives …")
    place = run.folder / records.MINED_FOLDER
    known = tuple(file.uri for file in run.one.known_files)
    settings = config.mine_config(judgements.uris, reranked, place.uri, known)
    mined = mining.mine(settings, stream=run.stream, should_stop=run.is_over)
    _go_on(run, mined.state)
    if mined.counts is None or not mined.counts.num_rows:
        raise NothingToLearnError(f"no judged query gave a list to train on: see {place} for why")
    return LabelledData(files=(place / DATA_FOLDER).uri, group=judgements.group, max_documents=judgements.max_documents)


def _distil(run: _Run, start: str) -> str:
    """The model that training starts as: one that learned of the teachers."""
    run.begin("distil", "distilling …")
    place = run.folder / records.DISTILLED_FOLDER
    _go_on(run, distilling.distill(run.job.config.distill_config(start, place.uri), **run.shared).state)
    return _named(place / f"{STUDENT_FOLDER}/{MODEL_FOLDER}")


def _train(run: _Run, data: LabelledData, start: str) -> None:
    run.begin("train", f"training from {run.one.parent or start} …")
    place = run.folder / records.TRAINED_FOLDER
    _go_on(run, training.train(run.job.config.train_config(data, start, place.uri), **run.shared).state)


def _evaluate(run: _Run) -> Evaluation:
    baseline = run.one.baseline
    shown = {FIRST_STAGE: "the first stage", records.BASE: run.job.config.base}.get(baseline, baseline)
    run.begin("evaluate", f"comparing {run.one.key} with {shown} …")
    candidate = _named(run.folder / f"{records.TRAINED_FOLDER}/{MODEL_FOLDER}")
    models = {} if baseline == FIRST_STAGE else {baseline: _model_of(run.job, run.one.parent)}
    models[run.one.key] = candidate
    place = run.folder / records.EVALUATION_FOLDER
    config = run.job.config.evaluate_config(models, baseline, place.uri)
    found = evaluating.evaluate(config, connect=lambda _: run.connect(), stream=run.stream, should_stop=run.is_over)
    _go_on(run, found.state)
    assert found.evaluation is not None, "it was not stopped"
    return found.evaluation


def _go_on(run: _Run, state: str) -> None:
    """Raises _StoppedError where a step was stopped, or the run is over now that it is done."""
    if state == "stopped" or run.is_over():
        raise _StoppedError


def _decide(run: _Run, evaluation: Evaluation) -> None:
    run.step = "decide"
    decision = decide(run.job.config.gate, evaluation, run.one.key)
    made = _story(run, decision)
    records.store_decision(run.folder, decision, facts_of(made) | {"lineage": lineage_of(made)})


def _story(run: _Run, decision: Decision) -> Story:
    return Story.of(run.job.config, run.one, decision, load(run.folder / records.EVALUATION_FOLDER), run.folder)


def _promote(run: _Run, story: Story) -> Outcome:
    """The candidate becomes the current version, unless the registry is changed at this very moment."""
    config, one, decision = run.job.config, run.one, story.decision
    run.begin("promote", f"promoting {one.key} …")
    model = _with_card(run, story)
    folders = {registry.MODEL_FOLDER: model, EVALUATION_FOLDER: _evaluation_to_keep(run)}
    facts = facts_of(story) | {"lineage": lineage_of(story)}
    registry.store_version(run.job.registry, config.name, one.key, folders, parent=one.parent, facts=facts)
    try:
        entry = registry.promote(
            run.job.registry, config.name, one.key, reason=decision.summary, key=one.key, expected=one.entry
        )
    except RunConflictError:
        overtaken = _overtaken(run)
        if overtaken is None:
            raise
        return _void(run, overtaken, decision)
    return _end_promoted(run, story, entry)


def _end_promoted(run: _Run, story: Story, entry: registry.Entry) -> Outcome:
    """Writes the report and the ending of what `entry` promoted."""
    put(run.folder / REPORT_FILE, render(story, "promoted").encode())
    name, newest = run.job.config.name, registry.newest(run.job.registry, run.job.config.name)
    now = f"{name} is {run.one.key} now, by entry {entry.number}"
    if newest is not None and newest.version != run.one.key:
        now = f"entry {entry.number} promoted it, but {name} is {newest.version} now, by entry {newest.number}"
    message = f"{story.decision.summary}; {now}; see {run.folder / REPORT_FILE}"
    return _end(run, "promoted", message, story.decision, entry.number)


def _with_card(run: _Run, story: Story) -> Location:
    """A copy of the trained model whose card tells of the evaluation. What an earlier attempt wrote stays as it is."""
    source = run.folder / f"{records.TRAINED_FOLDER}/{MODEL_FOLDER}"
    target = run.folder / f"{PROMOTED_FOLDER}/{MODEL_FOLDER}"
    for file in list_files(source):
        path, body = file.location.below(source), read_bytes(file.location)
        put_new(target / path, card_of(story, body.decode()).encode() if path == _CARD else body)
    return target


def _evaluation_to_keep(run: _Run) -> Location:
    """A copy of what the evaluation found and of the decision, without the runs of the models."""
    target = run.folder / f"{PROMOTED_FOLDER}/{EVALUATION_FOLDER}"
    source = run.folder / records.EVALUATION_FOLDER
    for name in EVALUATION_FILES:
        put_new(target / name, read_bytes(source / name))
    for name in (records.DECISION_FILE, records.RETRAINING_FILE):
        put_new(target / name, read_bytes(run.folder / name))
    return target


def _pushed(run: _Run, outcome: Outcome) -> Outcome:
    """Uploads the current version to the hub, where a retraining made it and it is not there yet; adds where it is.

    This is the last thing that a call does: nothing waits for a hub that is away, and the next call tries again.
    """
    job, repository = run.job, run.job.config.push
    entry = registry.current(job.registry, job.config.name)
    if repository is None or entry is None:
        return outcome
    known = records.decided(records.read_all(job.output), job.registry, job.config.name)
    is_ours = any(one.key == entry.version and ending.state == "promoted" for one, ending in known)
    folder = records.folder_of(job.output, entry.version)
    if not is_ours or _is_at(repository, folder / PUSHED_FILE):
        return outcome
    run.say(outcome.message)
    run.begin("push", f"uploading {entry.version} to {repository} …")
    url = _uploaded(folder / f"{PROMOTED_FOLDER}/{MODEL_FOLDER}", repository, entry.version)
    put(folder / PUSHED_FILE, json.dumps({"repository": repository, "url": url}).encode())
    return replace(outcome, message=f"{outcome.message}; {entry.version} is at {url}")


def _is_at(repository: str, place: Location) -> bool:
    """Whether the note at `place` says that the model is in the repository."""
    try:
        return bool(json.loads(read_bytes(place))["repository"] == repository)
    except FileNotFoundError:
        return False


def _uploaded(model: Location, repository: str, version: str) -> str:
    """Uploads a model with its card to a repository, made private if it is not there; returns the commit's URL."""
    with tempfile.TemporaryDirectory(prefix="crossenc-push-") as temporary:
        for file in list_files(model):
            path = Path(temporary) / file.location.below(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_bytes(file.location))
        encoder = CrossEncoder(temporary, device="cpu")
        try:
            return encoder.push_to_hub(
                repository,
                private=True,
                exist_ok=True,
                commit_message=f"Version {version}",
                local_model_path=temporary,
                replace_model_card=True,
            )
        except Exception as error:  # the hub's client has errors of its own
            raise StorageError(
                f"{version} was promoted, but could not be uploaded to {repository}: {redact(str(error))}; run the same"
                " command again, or leave push out"
            ) from None
