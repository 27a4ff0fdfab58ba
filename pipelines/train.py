"""The training job: prepare the data, train on Ray Train, finish. Killed at any moment, the same command goes on.

    _run/train.json       what the run depends on; another run's inputs, model or options are refused
    _run/data/            tokenised lists, prepared once
    checkpoints/          what training goes on from; the best one becomes the model

A step's batch, learning rate and dropout are functions of its number, so a run that was killed ends with the weights of
one that was not, up to rounding, as long as the number of workers is the same.
"""

import contextlib
import hashlib
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import ray
from pydantic import TypeAdapter, ValidationError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from crossenc.errors import CrossEncError, RunConflictError, StorageError
from crossenc.losses import Objective, objective, objective_problems
from crossenc.losses.objective import check_num_labels
from pipelines import checkpoints, lease, logs, metrics, train_board, train_finish
from pipelines import plan as plans
from pipelines.checkpoints import CHECKPOINT_FOLDER, TRAIN_STATE_FILE
from pipelines.execute import cpus_and_threads, describe_shortage
from pipelines.model import CheckpointModel, choose, registered_part
from pipelines.plan import RUN_FOLDER
from pipelines.progress import announce
from pipelines.records import MANIFEST_FILE, REPORT_FILE, SUCCESS_FILE, JobState
from pipelines.silence import Silence
from pipelines.storage import (
    Location,
    check_apart,
    delete,
    exists,
    list_files,
    locate,
    probe,
    put_new,
    read_bytes,
    redact,
)
from pipelines.train_board import Ending
from pipelines.train_config import TrainConfig
from pipelines.train_data import (
    PreparedData,
    PrepareProgress,
    PrepareSettings,
    StoppedError,
    check_prepared,
    prepare,
    prepare_split,
)
from pipelines.train_data_config import LabelledData
from pipelines.train_files import find_columns
from pipelines.train_files import list_files as list_input
from pipelines.train_finish import Finished, TrainRun
from pipelines.train_model import build, source
from pipelines.train_progress import TrainProgress
from pipelines.train_worker import FAILED_BATCH_FOLDER, TrainTask, train_worker

DATA_FOLDER = f"{RUN_FOLDER}/data"
_FOLDERS = (CHECKPOINT_FOLDER, train_finish.MODEL_FOLDER, train_finish.EVENTS_FOLDER, FAILED_BATCH_FOLDER, RUN_FOLDER)
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended. `result` says how good the model is, None where training was stopped."""

    state: JobState
    output: Location
    message: str
    result: Finished | None = None


@dataclass(frozen=True, slots=True)
class TrainJob:
    """A job with everything resolved that can be before data is read.

    `num_labels` are the model's, `note` is what people should hear of it.
    """

    config: TrainConfig
    output: Location
    model: CheckpointModel
    objective: Objective
    num_labels: int
    parts: Mapping[str, str]
    note: str = ""


def resolve(config: TrainConfig, *, new_run: bool = False) -> TrainJob:
    """Looks the model up and builds it once, so that what cannot work is found now. Raises before any work is done.

    With `new_run` the run that is stored does not matter.
    """
    options = config.storage_options
    output = locate(config.output, options)
    data = [one for one in (config.train, config.validation) if isinstance(one, LabelledData)]
    check_apart(output, [uri for one in data for uri in (*one.uris, one.queries, one.corpus)])
    loss = objective(config.loss.name, config.loss.parameters)
    planned = dict if new_run else lambda: planned_parts(output)
    chosen, note = choose(config.model, config.registry, options, planned)
    config = config.model_copy(update={"model": chosen})
    model = source(config).pinned()
    model.load_tokenizer()  # a max_length that cannot be is found here
    num_labels = build(config, model).num_labels
    check_num_labels(loss, num_labels)
    described = config.result_options()
    for name, one in (("train", config.train), ("validation", config.validation)):
        described[name] = one.model_dump(mode="json") if isinstance(one, LabelledData) else one
    parts = plans.describe_parts([], model.digests(), described) | {"job": "train"} | registered_part(chosen)
    return TrainJob(config, output, model, loss, num_labels, parts, note)


def describe(job: TrainJob) -> list[str]:
    """The job in figures, for people, one fact a line."""
    config = job.config
    lines = [f"model        {config.model}, {job.num_labels} label{'s' * (job.num_labels > 1)}"]
    lines += [f"train        {_in_words(config.train, config)}"]
    if isinstance(config.validation, LabelledData):
        lines += [f"validation   {_in_words(config.validation, config)}"]
    elif config.validation is not None:
        lines += [f"validation   {config.validation:.1%} of the queries"]
    parameters = ", ".join(f"{name} {value}" for name, value in job.objective.parameters.items() if value is not None)
    return [*lines, f"loss         {job.objective.name} ({parameters})"]


def _in_words(data: LabelledData, config: TrainConfig) -> str:
    files = list_input(data, dict(config.storage_options))
    columns = find_columns(data, files)
    num_bytes = sum(file.num_bytes for file in files)
    return f"{columns.layout}, {len(files):,} files, {num_bytes / 1e6:,.1f} MB"


def needs(config: TrainConfig, cores: int) -> dict[str, float]:
    """The CPUs and GPUs that the workers hold together."""
    return _needs_of(config.workers.count, config, cores)


def _needs_of(num_workers: int, config: TrainConfig, cores: int) -> dict[str, float]:
    return {"CPU": num_workers * worker_cpus(config, cores)[0], "GPU": num_workers * config.workers.gpus}


def worker_cpus(config: TrainConfig, cores: int) -> tuple[float, int]:
    """The CPUs each worker reserves and the torch threads it uses."""
    workers = config.workers
    return cpus_and_threads(workers.cpus, workers.gpus, cores // workers.count)


def train(
    config: TrainConfig,
    *,
    connect: Callable[[], int],
    stream: TextIO,
    should_stop: Callable[[], bool] = lambda: False,
    new_run: bool = False,
) -> Outcome:
    """Runs the job to its end, or goes on with an earlier attempt.

    `connect()` makes Ray ready and returns the cores of this machine. `should_stop()` is asked now and then; once it
    says yes, a checkpoint is stored after the step in work, and the next call goes on from there. Raises CrossEncError
    with what is wrong and what to do.
    """
    job = resolve(config, new_run=new_run)
    if job.note:
        announce(stream, job.note)
    stored = None if new_run else _beginning(job.output)
    if stored is not None:
        plans.check_unchanged(stored.parts, job.parts, job.output)
        if exists(job.output / SUCCESS_FILE):
            _check_data(job)
            result = train_finish.confirm(job.output)
            return Outcome("already done", job.output, "nothing to do: this run is finished", result)
    probe(job.output)
    display = TrainProgress(stream)
    lost: list[str] = []

    held = lease.hold(job.output, display.snapshot, lost.append, display.say)
    with held as epoch, contextlib.ExitStack() as stack:
        if new_run:
            remove_run(job.output)
        started = _begin(job)
        cores = connect()
        silence = _silence(config, cores)

        def is_over() -> bool:  # asked every moment
            if complaint := silence.complaint(display.place):
                display.say(complaint)
            return bool(lost) or should_stop()

        with display:
            try:
                run = _prepared(job, started, display, is_over)
                stack.enter_context(logs.about(metrics.run_tag(run.fingerprint), config.storage_options))
                ending = _fit(run, cores, display, is_over)
            except StoppedError:
                ending = Ending("stopped")
        if ending.state == "failed":
            raise CrossEncError(ending.message)
        overtaken = lost[0] if lost else lease.overtaken(job.output, epoch)
        if ending.state == "stopped" or overtaken:
            message = overtaken or f"stopped; run the same command again to resume {job.output}"
            return Outcome("stopped", job.output, message)
        display.say("writing the model and the report …")
        result = train_finish.finish(run, display.say)
    return Outcome("done", job.output, f"done; the model is in {job.output / train_finish.MODEL_FOLDER}", result)


@dataclass(frozen=True, slots=True)
class _Beginning:
    """What a run notes before its first step: what it depends on, and when it began, in Unix time."""

    parts: dict[str, str]
    started: float


_BEGINNING = TypeAdapter(_Beginning)


def _beginning(output: Location) -> _Beginning | None:
    try:
        return _BEGINNING.validate_json(read_bytes(output / TRAIN_STATE_FILE))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise RunConflictError(
            f"{output / TRAIN_STATE_FILE} is of another version; start over with --new-run"
        ) from None


def planned_parts(output: Location) -> Mapping[str, str]:
    """What the run in `output` depends on; nothing where there is none."""
    found = _beginning(output)
    return found.parts if found is not None else {}


def _begin(job: TrainJob) -> float:
    """Notes what the run depends on, or checks that it is what an earlier attempt noted; returns when it began."""
    found = _beginning(job.output)
    if found is None:
        for folder in _FOLDERS[:-1]:
            if list_files(job.output / folder):
                raise RunConflictError(
                    f"{job.output / folder} holds files but {job.output} no run; choose another output, or delete what"
                    " is there with --new-run"
                )
        made = _BEGINNING.dump_json(_Beginning(dict(job.parts), round(time.time(), 3)))
        found = _BEGINNING.validate_json(put_new(job.output / TRAIN_STATE_FILE, made))
    plans.check_unchanged(found.parts, job.parts, job.output)
    return found.started


def _prepare_settings(job: TrainJob, *, is_judged: bool = False) -> PrepareSettings:
    """How training data is prepared, or data that rankings are judged on."""
    return PrepareSettings(
        group_default=is_judged or not job.objective.is_pointwise,
        max_text_bytes=job.config.max_text_bytes,
        storage_options=dict(job.config.storage_options),
    )


def _check_data(job: TrainJob) -> None:
    """Raises RunConflictError where a finished run has read other files than there are now; reads none itself."""
    config, folder, settings = job.config, job.output / DATA_FOLDER, _prepare_settings(job)
    if isinstance(config.validation, float):
        check_prepared(config.train, folder, job.model, config.validation, settings=settings)
        return
    check_prepared(config.train, folder / "train", job.model, settings=settings)
    if config.validation is not None:
        judged = _prepare_settings(job, is_judged=True)
        check_prepared(config.validation, folder / "validation", job.model, settings=judged)


def _prepared(job: TrainJob, started: float, display: TrainProgress, should_stop: Callable[[], bool]) -> TrainRun:
    """The job with its data, prepared now or earlier."""
    config, folder = job.config, job.output / DATA_FOLDER
    settings = _prepare_settings(job)

    def show(progress: PrepareProgress) -> None:
        text = f"{progress.num_rows:,} rows · {progress.num_pairs:,} pairs"
        display.prepared(progress.num_parts_done, progress.num_parts, text)

    watch: dict[str, Any] = {"should_stop": should_stop, "on_progress": show}
    validation: PreparedData | None = None
    if isinstance(config.validation, float):
        share = config.validation
        train, validation = prepare_split(config.train, folder, job.model, share, settings=settings, **watch)
    else:
        train = prepare(config.train, folder / "train", job.model, settings=settings, **watch)
        if config.validation is not None:
            judged = _prepare_settings(job, is_judged=True)
            validation = prepare(config.validation, folder / "validation", job.model, settings=judged, **watch)
    problems = objective_problems(job.objective, train.statistics, job.num_labels)
    for problem in problems:
        display.say(f"warning: {problem}")
    digests = {**job.parts, "train data": train.digest, "validation data": validation.digest if validation else ""}
    fingerprint = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return TrainRun(
        config=job.config,
        output=job.output,
        model=job.model,
        objective=job.objective,
        fingerprint=fingerprint,
        train=train,
        validation=validation,
        warnings=tuple(problems),
        parts=job.parts,
        started=started,
    )


def _silence(config: TrainConfig, cores: int) -> Silence:
    fewest = config.workers.min_count or config.workers.count
    return Silence(
        "no part of the data was prepared and no step taken for",
        "add a node, or stop the run and resume it with fewer workers, or with less for each",
        lambda: describe_shortage(_needs_of(fewest, config, cores)),
    )


def _fit(run: TrainRun, cores: int, display: TrainProgress, should_stop: Callable[[], bool]) -> Ending:
    """Trains to the end, or until told to stop."""
    newest = checkpoints.read_all(run.output, run.fingerprint)
    if newest and newest[-1].is_last:
        return Ending("done")
    board, tag = train_board.start(), metrics.run_tag(run.fingerprint)
    cpus, threads = worker_cpus(run.config, cores)
    task = TrainTask(
        config=run.config,
        output=run.output,
        fingerprint=run.fingerprint,
        model=run.model,
        train=run.train,
        validation=run.validation,
        threads=threads,
        board=board,
        logs=logs.current(),
    )
    failure: list[BaseException] = []

    def fit(folder: str) -> None:
        try:
            _trainer(task, cpus, folder).fit()
        except Exception as error:  # told below, in the words of whoever knows more
            failure.append(error)

    # Ray Train keeps a few notes of its own beside the driver; what training goes on from is in checkpoints/.
    with tempfile.TemporaryDirectory(prefix="crossenc-train-", ignore_cleanup_errors=True) as folder:
        # In a thread, where Ray leaves the signals to this process.
        fitting = threading.Thread(target=fit, args=(folder,), name="ray-train", daemon=True)
        fitting.start()
        deadline = math.inf
        while fitting.is_alive() and time.monotonic() < deadline:
            fitting.join(_POLL_SECONDS)
            show_news(board, display, tag)
            if deadline == math.inf and should_stop():
                display.say("stopping after the step in work …")
                ray.get(board.stop.remote())
                deadline = time.monotonic() + run.config.drain_seconds
    ending = show_news(board, display, tag)
    if ending is not None:
        return ending
    if deadline < math.inf:
        return Ending("stopped")
    raise StorageError(
        f"the workers ended before the last step: {_reason(failure)}; run the same command again, it goes on from the"
        " last checkpoint"
    )


def _trainer(task: TrainTask, cpus: float, folder: str) -> TorchTrainer:
    workers = task.config.workers
    has_gpus = workers.gpus > 0
    return TorchTrainer(
        # Bound here, not a train_loop_config: Ray's controller would unpickle that, and import torch and more for it.
        partial(train_worker, task),
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.min_count is None else (workers.min_count, workers.count),
            use_gpu=has_gpus,
            resources_per_worker={"CPU": cpus} | ({"GPU": workers.gpus} if has_gpus else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
        torch_config=TorchConfig(backend="nccl" if has_gpus else "gloo"),
    )


def show_news(board: Any, display: TrainProgress, run: str) -> Ending | None:
    """Shows what the workers said since the last time; returns how they ended, if they did."""
    news = ray.get(board.read.remote())
    for message in news.messages:
        display.say(message)
    for point in news.validations:
        display.validated(point)
    if news.figures.num_steps:
        display.trained(news.figures)
        metrics.trained(run, news.figures.step, news.figures.loss)
    ending: Ending | None = news.ending
    return ending


def _reason(failure: Sequence[BaseException]) -> str:
    """What Ray Train says, in one line."""
    if not failure:
        return "they gave no reason"
    lines = [line.strip() for line in str(failure[0]).splitlines() if line.strip()]
    return redact(lines[-1])[:300] if lines else type(failure[0]).__name__


def remove_run(output: Location) -> None:
    """Deletes everything that runs write below `output`, but for the lease; what says that it is done goes first."""
    files = [file.location for folder in _FOLDERS for file in list_files(output / folder)]
    keep, state = (output / lease.LEASE_FOLDER).uri, output / TRAIN_STATE_FILE
    delete([output / name for name in (SUCCESS_FILE, MANIFEST_FILE, REPORT_FILE)])
    delete([file for file in files if not file.uri.startswith(keep) and file != state])
    delete([state])
