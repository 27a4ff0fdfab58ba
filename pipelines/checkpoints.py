"""Checkpoints of a training run: tensors and a record, which is stored last and makes them a checkpoint.

    checkpoints/step-00000500-<attempt>/weights.safetensors, optimizer.safetensors
    checkpoints/step-00000500.json                          the record: create-only, names the files and their digests

Tensors are safetensors, the record is JSON; nothing is pickled. Knows storage and tensors, no training.
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pydantic import ConfigDict, TypeAdapter, ValidationError

from crossenc.errors import RunConflictError, StorageError
from pipelines.plan import RUN_FOLDER
from pipelines.storage import Location, delete, exists, list_files, put, put_new, read_bytes
from pipelines.stored_files import StoredFile

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FOLDER = "checkpoints"
#: What makes a folder the output of a training run.
TRAIN_STATE_FILE = f"{RUN_FOLDER}/train.json"


@dataclass(frozen=True, slots=True)
class LogPoint:
    """Figures at a step: the mean loss since the point before, or what validation found."""

    step: int
    epoch: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The record of a checkpoint: everything that training goes on from, but for the tensors.

    `step` counts finished steps of `num_steps`. `loss_sum` of `num_loss_steps` steps waits for the next point of the
    curve. `loss_scaler` is float16's; its whole numbers stay whole. `value` is what checkpoints are chosen by, higher
    is better; None where validation did not judge this one. `seconds` is the time spent in training so far, over all
    attempts; `forward_kind` tells people how passes were computed.
    """

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")  # JSON has no NaN and no infinity

    fingerprint: str
    step: int
    num_steps: int
    loss_sum: float
    num_loss_steps: int
    loss_scaler: Mapping[str, int | float]
    value: float | None
    seconds: float
    forward_kind: str
    logs: tuple[LogPoint, ...]
    weights: StoredFile = field(default=StoredFile("", 0, ""))
    optimizer: StoredFile = field(default=StoredFile("", 0, ""))

    @property
    def is_last(self) -> bool:
        """Whether training is over."""
        return self.step == self.num_steps


_RECORD = TypeAdapter(Checkpoint)


def before_the_first_step(fingerprint: str, num_steps: int) -> Checkpoint:
    """The state that a run begins with; it is not stored."""
    return Checkpoint(
        fingerprint=fingerprint,
        step=0,
        num_steps=num_steps,
        loss_sum=0.0,
        num_loss_steps=0,
        loss_scaler={},
        value=None,
        seconds=0.0,
        forward_kind="",
        logs=(),
    )


def store(
    output: Location, checkpoint: Checkpoint, weights: "Mapping[str, Tensor]", optimizer: "Mapping[str, Tensor]"
) -> Checkpoint:
    """Stores tensors, then the record; returns the record with their files in it.

    A checkpoint of the same step that is there already stays, and is returned.
    """
    from safetensors.torch import save  # here, because it imports torch

    folder = f"{CHECKPOINT_FOLDER}/{_name(checkpoint.step)}-{uuid.uuid4().hex[:12]}"
    stored = {}
    for name, tensors in (("weights", weights), ("optimizer", optimizer)):
        body = save(dict(tensors))
        path = f"{folder}/{name}.safetensors"
        put(output / path, body)
        stored[name] = StoredFile(path, len(body), hashlib.sha256(body).hexdigest())
    if not all(exists(output / file.path) for file in stored.values()):
        raise RunConflictError(
            f"{output / folder} was removed meanwhile: another run is ahead on this output; let it end"
        )
    record = replace(checkpoint, weights=stored["weights"], optimizer=stored["optimizer"])
    place = _place(output, checkpoint.step)
    found = _parse(put_new(place, _RECORD.dump_json(record)), place, checkpoint.fingerprint)
    if found.weights != record.weights:
        delete([output / file.path for file in (record.weights, record.optimizer)])
    return found


def read_all(output: Location, fingerprint: str | None = None) -> list[Checkpoint]:
    """The records of a run's checkpoints, by step. Raises RunConflictError for another run's, unless None is given."""
    files = [file.location for file in list_files(output / CHECKPOINT_FOLDER) if _is_record(file.location)]
    found = []
    for place in files:
        try:
            body = read_bytes(place)
        except FileNotFoundError:  # removed since it was listed
            continue
        found.append(_parse(body, place, fingerprint))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def read_tensors(output: Location, file: StoredFile) -> "dict[str, Tensor]":
    """The tensors of a file. Raises StorageError where they are not what was stored."""
    from safetensors.torch import load

    place = output / file.path
    try:
        body = read_bytes(place)
    except FileNotFoundError:
        raise StorageError(
            f"{place} is missing: restore it, or delete its checkpoint's record to go back one"
        ) from None
    if hashlib.sha256(body).hexdigest() != file.sha256:
        raise StorageError(f"{place} is damaged: restore it, or delete its checkpoint's record to go back one")
    tensors: dict[str, Tensor] = load(body)
    return tensors


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the highest value, the first of equals; the last one where none was validated."""
    judged = [checkpoint for checkpoint in checkpoints if checkpoint.value is not None]
    if judged:
        return max(judged, key=lambda checkpoint: (checkpoint.value or 0.0, -checkpoint.step))
    return checkpoints[-1] if checkpoints else None


def prune(output: Location, fingerprint: str, num_newest: int) -> None:
    """Deletes all checkpoints but the newest ones and the best: a record first, then its files.

    Files that no record names, which a kill left behind, go as well, once their step is behind the newest ones': those
    of later steps may be another attempt's, which is about to record them.
    """
    checkpoints = read_all(output, fingerprint)
    newest = [checkpoint.step for checkpoint in checkpoints[-num_newest:]]
    chosen = best(checkpoints)
    kept = {*newest, *([chosen.step] if chosen else [])}
    delete([_place(output, checkpoint.step) for checkpoint in checkpoints if checkpoint.step not in kept])
    named = {
        (output / file.path).uri
        for checkpoint in checkpoints
        if checkpoint.step in kept
        for file in (checkpoint.weights, checkpoint.optimizer)
    }
    files = [file.location for file in list_files(output / CHECKPOINT_FOLDER)]
    unnamed = [place for place in files if not _is_record(place) and place.uri not in named]
    delete([place for place in unnamed if _step(place.below(output / CHECKPOINT_FOLDER)) < min(newest, default=0)])


class CheckpointWriter:
    """Stores checkpoints in a thread, one at a time, while training goes on.

    An error of a write comes up at the next call.
    """

    def __init__(self, output: Location, num_newest: int, say: Callable[[str], None]) -> None:
        self._output, self._num_newest, self._say = output, num_newest, say
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def write(self, checkpoint: Checkpoint, weights: "Mapping[str, Tensor]", optimizer: "Mapping[str, Tensor]") -> None:
        """Begins to store a checkpoint; waits first for the one before. The tensors must be copies."""
        self.wait()
        self._pending = self._pool.submit(self._store, checkpoint, weights, optimizer)

    def wait(self) -> None:
        """Returns when everything is stored. Raises StorageError where it could not be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _store(
        self, checkpoint: Checkpoint, weights: "Mapping[str, Tensor]", optimizer: "Mapping[str, Tensor]"
    ) -> None:
        store(self._output, checkpoint, weights, optimizer)
        prune(self._output, checkpoint.fingerprint, self._num_newest)
        self._say(f"checkpoint after step {checkpoint.step:,} stored")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _place(output: Location, step: int) -> Location:
    return output / f"{CHECKPOINT_FOLDER}/{_name(step)}.json"


def _step(path: str) -> int:
    """The step of a file below the folder of checkpoints, also of a half-written one."""
    found = re.match(r"\.?step-(\d+)", path)
    return int(found[1]) if found else 0


def _is_record(place: Location) -> bool:
    return place.name.startswith("step-") and place.name.endswith(".json")


def _parse(body: bytes, place: Location, fingerprint: str | None) -> Checkpoint:
    try:
        record = _RECORD.validate_json(body)
    except ValidationError:
        raise RunConflictError(f"{place} is no checkpoint of this version; start over with --new-run") from None
    if fingerprint is not None and record.fingerprint != fingerprint:
        raise RunConflictError(f"{place} belongs to another run; start over with --new-run")
    return record
