"""The end of a training run: the best checkpoint becomes the model, with its card, a report and a manifest.

Everything here is a function of what is stored, so it can be done again after a kill; _SUCCESS is written last.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from crossenc.errors import CrossEncError, RunConflictError
from crossenc.loop.optimizer import load_trained_weights
from crossenc.loop.validation import MEASURES
from crossenc.losses import Objective
from crossenc.model import CrossEncoder
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint
from pipelines.finish import first_changed
from pipelines.model import CheckpointModel
from pipelines.records import MANIFEST_FILE, REPORT_FILE, SUCCESS_FILE
from pipelines.storage import Location, put, read_bytes, redact_options
from pipelines.stored_files import store_model
from pipelines.train_config import TrainConfig
from pipelines.train_data import PreparedData
from pipelines.train_events import event_file
from pipelines.train_logs import card_logs
from pipelines.train_model import build
from pipelines.train_report import DataSummary, TrainSummary, render

MODEL_FOLDER, EVENTS_FOLDER = "model", "tensorboard"
_PACKAGES = ("crossenc", "torch", "transformers", "ray", "pyarrow", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """A job with its data: what training and its end need to know.

    `fingerprint` is of everything that the weights depend on, `started` the Unix time of the run's first attempt.
    """

    config: TrainConfig
    output: Location
    model: CheckpointModel
    objective: Objective
    fingerprint: str
    train: PreparedData
    validation: PreparedData | None
    warnings: tuple[str, ...]
    parts: Mapping[str, str]
    started: float


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run came to. `measure` is what the best checkpoint was chosen by, empty where nothing was validated.

    `before` is the same measure before training, None where the model could not rank yet.
    """

    best_step: int
    num_steps: int
    measure: str
    value: float | None
    before: float | None


def finish(run: TrainRun, say: Callable[[str], None]) -> Finished:
    """Writes model, card, report, events, manifest and mark; returns what the run came to."""
    stored = checkpoints.read_all(run.output, run.fingerprint)
    best = checkpoints.best(stored)
    if best is None or not stored[-1].is_last:
        raise CrossEncError(f"{run.output} lacks the last checkpoint; run the same command again")
    last = stored[-1]
    result = _result(best, last)
    model = build(run.config, run.model, is_trained=True)
    load_trained_weights(model, checkpoints.read_tensors(run.output, best.weights))
    model.mark_trained()
    lineage = _lineage(run, best)
    _fill_card(model, run, best, last, lineage)
    if run.config.lora is not None:
        model.merge_adapters()
    with tempfile.TemporaryDirectory(prefix="crossenc-model-") as folder:
        model.save_pretrained(folder)
        files = store_model(Path(folder), MODEL_FOLDER, run.output)
    summary = _summary(run, best, last, result, lineage)
    put(run.output / REPORT_FILE, render(summary).encode())
    try:
        name, events = event_file(last.logs, run.started)
        put(run.output / f"{EVENTS_FOLDER}/{name}", events)
    except ImportError as error:
        say(f"no TensorBoard file: {error}")
    manifest = {
        "fingerprint": run.fingerprint,
        "depends_on": dict(run.parts),
        "lineage": lineage,
        "result": asdict(result),
        "rows": {"train": run.train.num_rows, "refused": dict(run.train.num_refused)},
        "seconds": round(last.seconds, 3),
        "versions": _versions(),
        "files": files,
    }
    put(run.output / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
    put(run.output / SUCCESS_FILE, b"")
    return result


def confirm(output: Location) -> Finished:
    """What a finished run came to, after a look at whether its model is all there."""
    try:
        manifest = json.loads(read_bytes(output / MANIFEST_FILE))
        files = [(file["path"], file["bytes"]) for file in manifest["files"]]
        result = Finished(**manifest["result"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise RunConflictError(
            f"{output / MANIFEST_FILE} is missing or not of this version; delete {SUCCESS_FILE} and run the same"
            " command again to write it anew"
        ) from None
    changed = first_changed(output, files)
    if changed:
        raise RunConflictError(
            f"{output / changed} is missing or changed; delete {SUCCESS_FILE} and run the same command again to write"
            " it anew"
        )
    return result


def _result(best: Checkpoint, last: Checkpoint) -> Finished:
    for measure in (MEASURES[0], "validation_loss"):
        found = ((point.step, point.values.get(measure, math.nan)) for point in last.logs)
        values = {step: value for step, value in found if math.isfinite(value)}
        if best.value is not None and values:
            return Finished(best.step, last.num_steps, measure.replace("_", " "), values[best.step], values.get(0))
    return Finished(best.step, last.num_steps, "", None, None)


def _lineage(run: TrainRun, best: Checkpoint) -> dict[str, str]:
    """What the model comes from, each as a digest or a version."""
    files = dict(run.model.digests())
    found = {
        "Parent": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "Training data": run.train.digest,
        "Configuration": run.fingerprint,
        "Code": f"crossenc {_versions().get('crossenc', 'unknown')}",
        "Weights": best.weights.sha256,
    }
    return found | ({"Validation data": run.validation.digest} if run.validation else {})


def _fill_card(
    model: CrossEncoder, run: TrainRun, best: Checkpoint, last: Checkpoint, lineage: Mapping[str, str]
) -> None:
    card, config = model.model_card_data, run.config
    card.training = [run.train.facts]
    card.validation = [run.validation.facts] if run.validation else []
    card.add_loss(run.objective.card_name, run.objective.parameters, run.objective.citation)
    default = TrainConfig.model_validate({"train": "-", "model": "-", "output": "-"})
    card.set_hyperparameters(config.result_options(), default.result_options())
    card.logs = card_logs(last.logs)
    card.best_step = best.step if best.value is not None else None
    card.training_seconds = last.seconds
    card.lineage = dict(lineage)


def _summary(
    run: TrainRun,
    best: Checkpoint,
    last: Checkpoint,
    result: Finished,
    lineage: Mapping[str, str],
) -> TrainSummary:
    config = run.config
    settings = config.model_dump(mode="json")
    settings["storage_options"] = redact_options(config.storage_options)
    return TrainSummary(
        model_name=config.model,
        output=str(run.output),
        num_steps=last.num_steps,
        num_epochs=config.epochs,
        best_step=best.step,
        measure=result.measure,
        logs=last.logs,
        settings=settings,
        loss_name=run.objective.card_name,
        loss_parameters=run.objective.parameters,
        forward_kind=last.forward_kind,
        warnings=run.warnings,
        num_workers=config.workers.count,
        seconds=last.seconds,
        train=_data(run.train),
        validation=_data(run.validation) if run.validation else None,
        lineage=lineage,
    )


def _data(prepared: PreparedData) -> DataSummary:
    return DataSummary(
        num_rows=prepared.num_rows,
        num_lists=prepared.num_lists,
        num_pairs=prepared.num_pairs,
        num_tokens=prepared.num_tokens,
        refused=prepared.num_refused,
        statistics=prepared.statistics,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
