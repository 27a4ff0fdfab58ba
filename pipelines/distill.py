"""The distillation job: teachers score candidates, lists are drawn from all levels of score, a student learns them.

    teachers/<n>/   a rerank run of each teacher, whose scores are raw logits
    lists/          training lists out of their results
    start/          the first teacher with some of its layers, where the student starts from that
    student/        a training run on the lists

Each stage is exactly once and resumable by itself, and refuses what was made by other settings. So running the same
command again goes on in the stage that was stopped, and does none again that is finished.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from crossenc.errors import InputError, RunConflictError
from crossenc.layers import keep_layers, layers_to_keep
from crossenc.losses import objective
from pipelines import execute, lease, logs, metrics, units
from pipelines import plan as plans
from pipelines import rerank as reranking
from pipelines import train as training
from pipelines.config import RerankConfig
from pipelines.distill_config import DistillConfig
from pipelines.distill_lists import ListCounts, list_job
from pipelines.estimate import estimate
from pipelines.evaluate import read_qrels
from pipelines.finish import first_changed
from pipelines.model import CheckpointModel, choose, from_config
from pipelines.plan import RUN_FOLDER
from pipelines.records import SUCCESS_FILE, JobState
from pipelines.storage import Location, check_apart, delete, exists, list_files, locate, put, put_new, read_bytes
from pipelines.stored_files import store_model
from pipelines.train_config import TrainConfig
from pipelines.train_data_config import LabelledData
from pipelines.train_files import find_columns
from pipelines.train_files import list_files as list_input
from pipelines.train_finish import MODEL_FOLDER, Finished
from pipelines.unit_progress import UnitProgress

TEACHERS_FOLDER, LISTS_FOLDER, START_FOLDER, STUDENT_FOLDER = "teachers", "lists", "start", "student"
_START_RECORD = f"{RUN_FOLDER}/start.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `distill` ended. What a stage came to is None where it was not reached."""

    state: JobState
    output: Location
    message: str
    lists: ListCounts | None = None
    kept_layers: tuple[int, ...] | None = None
    student: Finished | None = None


def needs(config: DistillConfig, cores: int) -> dict[str, float]:
    """The CPUs and GPUs that the job holds at once, in whichever stage."""
    scoring = execute.needs(config.rerank_config(config.teacher_names[0], config.output), cores)
    learning = training.needs(_train_config(config), cores)
    return {kind: max(scoring[kind], learning[kind]) for kind in scoring}


def describe(config: DistillConfig) -> list[str]:
    """The job in figures, for people, one fact a line. Raises as `check` does."""
    config, _ = _with_versions(config)
    check(config)
    lines = []
    for number, teacher in enumerate(config.teacher_names):
        lines += [f"teacher      {teacher}", *estimate(_rerank_config(config, number)).lines()]
    start = f"the first teacher with {config.student_layers} layers" if config.student_layers else config.student.model
    lines += [f"lists        up to {config.documents} documents of {config.strata} levels of score"]
    return [*lines, f"student      {start}", f"loss         {config.student.loss.name}"]


def check(config: DistillConfig) -> None:
    """Looks everything up that the stages need, so that what cannot work is found before the teachers score.

    Raises CrossEncError with what is wrong and what to do.
    """
    options = config.storage_options
    inputs = [*config.rerank_config(config.teacher_names[0], config.output).candidate_uris]
    check_apart(locate(config.output, options), [*inputs, config.queries, config.corpus, config.qrels])
    for number in range(len(config.teacher_names)):
        reranking.resolve(_rerank_config(config, number))
    if config.qrels:
        read_qrels(config.qrels, options)
    learning = _train_config(config)
    loss = objective(learning.loss.name, learning.loss.parameters)
    if not loss.needs_num_labels_one:
        raise InputError(f"the loss {loss.name} chooses among classes; take kl_distillation, margin_mse or mse")
    if isinstance(learning.validation, LabelledData):
        find_columns(learning.validation, list_input(learning.validation, dict(options)))
    if config.student_layers is None:
        training.resolve(learning)
    else:
        layers_to_keep(_first_teacher(config).folder(), config.student_layers)


def distill(
    config: DistillConfig,
    *,
    connect: Callable[[], int],
    stream: TextIO,
    should_stop: Callable[[], bool] = lambda: False,
    new_run: bool = False,
) -> Outcome:
    """Runs the stages to their end, or goes on with an earlier attempt.

    `connect()` makes Ray ready and returns the cores of this machine; it is called when there is work for it.
    `should_stop()` is asked now and then, as the stages do it. Raises CrossEncError with what is wrong and what to do;
    nothing that is stored is lost.
    """
    config, notes = _with_versions(config, new_run=new_run)
    check(config)
    output = locate(config.output, config.storage_options)
    say = UnitProgress(stream).say
    for note in notes:
        say(note)
    # A distillation has no plan of its own, but one output.
    run = metrics.run_tag(plans.fingerprint({"job": "distill", "output": output.uri}))
    with logs.about(run, config.storage_options):
        if new_run:
            _remove(output, say)
        return _stages(config, output, say, connect=connect, stream=stream, should_stop=should_stop)


def _stages(
    config: DistillConfig,
    output: Location,
    say: Callable[[str], None],
    *,
    connect: Callable[[], int],
    stream: TextIO,
    should_stop: Callable[[], bool],
) -> Outcome:
    """Runs the stages in their order."""
    shared: dict[str, Any] = {"stream": stream, "should_stop": should_stop}
    stopped = Outcome("stopped", output, f"stopped; run the same command again to resume {output}")
    folders = []
    for number, teacher in enumerate(config.teacher_names):
        say(f"teacher {number + 1} of {len(config.teacher_names)}: {teacher}")
        scored = reranking.rerank(_rerank_config(config, number), connect=connect, **shared)
        folders.append(scored.output)
        if scored.state == "stopped" or should_stop():
            return stopped
    say("drawing lists …")
    drawn = units.run(list_job(config, output / LISTS_FOLDER, folders), **shared)
    if drawn.state == "stopped" or should_stop():
        return stopped
    assert drawn.counts is not None, "it was not stopped"
    if not drawn.counts.num_lists:
        raise InputError(f"no query has two documents with scores: see {output / LISTS_FOLDER} for why")
    kept = None if config.student_layers is None else _make_start(config, output / START_FOLDER, config.student_layers)
    say("training the student …")
    trained = training.train(_train_config(config), connect=connect, **shared)
    if trained.state == "stopped":
        return stopped
    put_new(output / SUCCESS_FILE, b"")
    message = f"{trained.message}; the lists are in {output / LISTS_FOLDER}, the teachers' scores in"
    message += f" {output / TEACHERS_FOLDER}"
    return Outcome(trained.state, output, message, drawn.counts, kept, trained.result)


def _with_versions(config: DistillConfig, *, new_run: bool = False) -> tuple[DistillConfig, list[str]]:
    """The job with the versions of its models, where they are of a registry; and what people should hear of them."""
    output = locate(config.output, config.storage_options)

    def planned(number: int) -> Mapping[str, str]:
        return {} if new_run else plans.planned_parts(output / f"{TEACHERS_FOLDER}/{number}")

    def planned_student() -> Mapping[str, str]:
        return {} if new_run else training.planned_parts(output / STUDENT_FOLDER)

    places = (config.registry, config.storage_options)
    chosen = [choose(name, *places, partial(planned, n)) for n, name in enumerate(config.teacher_names)]
    student, note = choose(config.student.model or "", *places, planned_student)
    changes = {
        "teachers": tuple(source for source, _ in chosen),
        "student": config.student.model_copy(update={"model": student or None}),
    }
    return config.model_copy(update=changes), [text for text in (*(note for _, note in chosen), note) if text]


def _rerank_config(config: DistillConfig, number: int) -> RerankConfig:
    folder = locate(config.output, config.storage_options) / f"{TEACHERS_FOLDER}/{number}"
    return config.rerank_config(config.teacher_names[number], folder.uri)


def _train_config(config: DistillConfig) -> TrainConfig:
    output = locate(config.output, config.storage_options)
    start = output / f"{START_FOLDER}/{MODEL_FOLDER}"
    model = config.student.model or (start.path if start.scheme == "file" else start.uri)
    return config.train_config(
        (output / f"{LISTS_FOLDER}/{units.DATA_FOLDER}").uri, model, (output / STUDENT_FOLDER).uri
    )


def _first_teacher(config: DistillConfig) -> CheckpointModel:
    return from_config(_rerank_config(config, 0))


def _make_start(config: DistillConfig, folder: Location, num_layers: int) -> tuple[int, ...]:
    """Stores the first teacher with so many of its layers, unless it is stored; returns which layers they are."""
    teacher = _first_teacher(config)
    kept = layers_to_keep(teacher.folder(), num_layers)
    parts = plans.describe_parts([], teacher.digests(), {"student_layers": num_layers})
    if exists(folder / _START_RECORD):
        try:
            record = json.loads(read_bytes(folder / _START_RECORD))
            stored, made = record["parts"], [(file["path"], file["bytes"]) for file in record["files"]]
        except (ValueError, KeyError, TypeError):
            place = folder / _START_RECORD
            raise RunConflictError(f"{place} is not of this version; start over with --new-run") from None
        plans.check_unchanged(stored, parts, folder)
        if first_changed(folder, made) is None:
            return kept
    with tempfile.TemporaryDirectory(prefix="crossenc-start-") as temporary:
        target = Path(temporary) / MODEL_FOLDER
        keep_layers(teacher.folder(), num_layers, target)
        files = store_model(target, MODEL_FOLDER, folder)
    put(folder / _START_RECORD, json.dumps({"parts": parts, "files": files}, indent=1).encode())
    return kept


def _remove(output: Location, say: Callable[[str], None]) -> None:
    """Deletes what the stages wrote, the last stage first, so that what a kill leaves can be resumed."""
    delete([output / SUCCESS_FILE])
    teachers = {
        file.location.below(output / TEACHERS_FOLDER).partition("/")[0] for file in list_files(output / TEACHERS_FOLDER)
    }
    stages = [(STUDENT_FOLDER, training.remove_run), (LISTS_FOLDER, units.remove_run)]
    stages += [(f"{TEACHERS_FOLDER}/{name}", reranking.remove_run) for name in sorted(teachers)]
    for name, remove in stages:
        if list_files(output / name):
            with lease.hold(output / name, dict, lambda message: None, say):
                remove(output / name)
    delete([file.location for file in list_files(output / START_FOLDER)])
