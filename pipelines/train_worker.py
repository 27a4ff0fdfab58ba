"""What each worker of a training run does: load, go on from the newest checkpoint, step by step, validate, store.

All workers go through the same steps and agree on everything by what they exchange in them; the first one also stores
checkpoints and tells the board. Ray Train starts the workers, and all of them again when one dies.
"""

import contextlib
import json
import logging
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import barrier, broadcast_from_rank_zero
from torch import distributed as dist

from crossenc.errors import CrossEncError
from crossenc.loop.learner import Learner, LearnerSettings, StepResult
from crossenc.loop.lists import TokenizedLists
from crossenc.loop.optimizer import (
    load_optimizer_tensors,
    load_trained_weights,
    optimizer_tensors,
    parameter_groups,
    rate_factor,
    trained_weights,
)
from crossenc.loop.order import Order, OrderSettings
from crossenc.loop.validation import MEASURES, validate
from crossenc.losses import Objective, objective
from crossenc.precision import resolve_dtype
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, CheckpointWriter, LogPoint
from pipelines.logs import Logs, note
from pipelines.logs import begin as begin_logs
from pipelines.model import CheckpointModel
from pipelines.storage import Location, put, redact
from pipelines.train_batches import Batch, Lists, read_ahead
from pipelines.train_board import Ending, Figures
from pipelines.train_config import TrainConfig
from pipelines.train_data import PreparedData
from pipelines.train_lists import expect_lists, parts_of, read_lists
from pipelines.train_model import build

logger = logging.getLogger(__name__)
#: Errors of the program and its data. Lost workers and connections make others, which starting again cures.
_LASTING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
#: Tokens in a forward pass, unless the job says otherwise.
_CPU_TOKENS, _CUDA_TOKENS = 8_192, 65_536
#: Lists validated at a time.
_VALIDATED_LISTS = 256
#: Seconds between two posts on the board, and two looks at whether a node will be taken back, which all wait for.
_BOARD_SECONDS, _LOOK_SECONDS = 1.0, 5.0
FAILED_BATCH_FOLDER = "failed-batch"


@dataclass(frozen=True, slots=True)
class TrainTask:
    """What every worker needs to know. `threads` are torch's, `board` is the actor's handle."""

    config: TrainConfig
    output: Location
    fingerprint: str
    model: CheckpointModel
    train: PreparedData
    validation: PreparedData | None
    threads: int
    board: Any
    logs: Logs


def train_worker(task: TrainTask) -> None:
    """The function that Ray Train runs in each worker."""
    if ray.get(task.board.ending.remote()) is not None:  # an error that starting again does not cure
        return
    begin_logs(task.logs)
    torch.set_num_threads(task.threads)
    rank = ray.train.get_context().get_world_rank()
    note(logger, "begun", stage="train", worker=rank)
    worker: _Worker | None = None
    try:
        worker = _Worker(task)
        with contextlib.closing(worker):
            worker.run()
        barrier()  # the first one's last checkpoint is stored before any of them leaves
    except CrossEncError as error:
        note(logger, str(error), logging.ERROR, stage="train", worker=rank)
        ray.get(task.board.end.remote(Ending("failed", str(error))))
        raise
    except torch.OutOfMemoryError:
        most = max_tokens(task.config, ray.train.torch.get_device())
        message = f"a worker's device ran out of memory: set workers.max_tokens, now {most:,}, lower"
        ray.get(task.board.end.remote(Ending("failed", f"{message}, and run the same command again")))
        raise
    except _LASTING_ERRORS as error:
        # Where workers are being ended their group goes first, and what they trip over then says nothing.
        if dist.is_initialized():
            _end_if_it_comes_again(task, error, f"worker {rank}, after step {worker.step if worker else 0:,}")
        raise


def _end_if_it_comes_again(task: TrainTask, error: Exception, place: str) -> None:
    """Ends the run where a restart led to the same error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = redact(f"{type(error).__name__}: {error}")
    if ray.get(task.board.comes_again.remote(f"{place}: {what}")):
        note(logger, what, logging.ERROR, stage="train")
        message = (
            f"{what} ({place}, in {frame.filename}:{frame.lineno}), and again after a restart: correct the settings or"
            " the data that it names, or report it as a bug"
        )
        ray.get(task.board.end.remote(Ending("failed", message)))


def max_tokens(config: TrainConfig, device: torch.device) -> int:
    """Tokens in a forward pass."""
    return config.workers.max_tokens or (_CUDA_TOKENS if device.type == "cuda" else _CPU_TOKENS)


def order_settings(config: TrainConfig) -> OrderSettings:
    """How the job's lists become batches."""
    return OrderSettings(
        batch_lists=config.lists_in_batch,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        shuffled_lists=config.shuffled_lists,
    )


def judge(values: Mapping[str, float], is_ranked: bool) -> tuple[float | None, str]:
    """What a checkpoint is chosen by, higher is better, out of what validation found; and what people should know.

    `is_ranked` says whether the model gives one score, by which documents can be ranked.
    """
    if MEASURES[0] in values:
        return values[MEASURES[0]], ""
    loss = values.get("validation_loss", math.nan)
    if not math.isfinite(loss):
        return None, (
            "validation cannot judge this checkpoint: no list has documents of different grades (whole numbers from 0),"
            " and their loss is no finite number; give other validation data, or the last checkpoint becomes the model"
        )
    note = (
        "validation measures no ranking, because no list has documents of different grades (whole numbers from 0):"
        " the checkpoint with the lowest validation loss becomes the model"
    )
    return -loss, note if is_ranked else ""


class _Worker:
    """One worker's part in a run, from the newest checkpoint on."""

    def __init__(self, task: TrainTask) -> None:
        config, context = task.config, ray.train.get_context()
        self._task, self._config = task, config
        self._rank, self._num_workers = context.get_world_rank(), context.get_world_size()
        self._is_first = self._rank == 0
        device = ray.train.torch.get_device()
        num_pairs, num_tokens = task.train.sizes()
        read, expect = partial(read_lists, task.train), partial(expect_lists, task.train)
        self._lists = Lists(num_pairs, num_tokens, read, expect)
        parts = parts_of(task.train, num_pairs, num_tokens)
        self._order = Order(num_tokens, order_settings(config), config.epochs, parts)
        self._objective = objective(config.loss.name, config.loss.parameters)
        self._learner = _learner(task, self._objective, device, self._lists.read(self._order.batch(0)[:1]))
        self._model = self._learner.model
        self._writer = CheckpointWriter(task.output, config.keep_checkpoints, self._say) if self._is_first else None
        self._state = self._resume()
        self._news = _News(task.board, self._order, config, self._num_workers, self._learner.forward_kind)
        self._started = self._stored_at = self._looked_at = time.monotonic()
        self._seconds_before = self._state.seconds
        self._threatened: frozenset[str] = frozenset()  # nodes that are known to be taken back
        self._notes: set[str] = set()  # on validation, that people have read

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._state.step

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _resume(self) -> Checkpoint:
        """The newest checkpoint, loaded, or a state before the first step; the same for all workers."""
        output, fingerprint = self._task.output, self._task.fingerprint
        stored = checkpoints.read_all(output, fingerprint) if self._is_first else []
        newest: Checkpoint | None = broadcast_from_rank_zero(stored[-1] if stored else None)
        if newest is None:
            return checkpoints.before_the_first_step(fingerprint, self._order.num_steps)
        load_trained_weights(self._model, checkpoints.read_tensors(output, newest.weights))
        load_optimizer_tensors(self._model, self._learner.optimizer, checkpoints.read_tensors(output, newest.optimizer))
        self._learner.scaler.load_state_dict(dict(newest.loss_scaler))
        self._say(f"going on after step {newest.step:,}")
        return replace(newest, value=None)

    def run(self) -> None:
        """Trains to the end, or until told to stop, or until the loss is no number; the board hears which."""
        num_steps = self._order.num_steps
        num_warmup = self._config.warmup_steps(num_steps)
        if self._state.step == 0 and not self._model.head_is_new:
            self._validate()
            self._state = replace(self._state, value=None)  # what was judged is the parent, not a checkpoint
        batches = read_ahead(self._lists, self._order, self._state.step, self._rank, self._num_workers)
        with contextlib.closing(batches):
            for batch in batches:
                rate = rate_factor(batch.step, num_steps, num_warmup, self._config.schedule)
                wishes = (self._is_first and self._news.wishes_to_stop(), self._is_first and self._is_time_to_look())
                result = self._learner.step(batch.step, batch.lists, batch.num_lists, rate=rate, wishes=wishes)
                if not result.is_finite:
                    self._fail(batch, result)
                    return
                stop, look = result.wishes
                self._count(batch, result, rate)
                is_last = self._state.step == num_steps
                is_validated = is_last or self._is_time_to_validate()
                if is_validated:
                    self._validate()
                if stop or is_validated or (look and self._is_threatened()) or self._is_time_to_store():
                    self._store()
                if stop and not is_last:
                    self._end(Ending("stopped", f"stopped after step {self._state.step:,} of {num_steps:,}"))
                    return
        self._end(Ending("done"))

    # --- what a step leads to

    def _count(self, batch: Batch, result: StepResult, rate: float) -> None:
        """Takes a finished step into account, and adds a point to the curve when one is due."""
        loss_sum, num_losses = self._state.loss_sum + result.loss, self._state.num_loss_steps + 1
        self._state = replace(self._state, step=batch.step + 1, loss_sum=loss_sum, num_loss_steps=num_losses)
        learning_rate = self._config.learning_rate * rate
        rates = self._news.count(batch)
        if self._state.step % self._config.log_steps == 0 or self._state.step == self._order.num_steps:
            values = {"loss": loss_sum / num_losses, "learning_rate": learning_rate}
            values |= {"gradient_norm": result.gradient_norm, **rates, "seconds": self._seconds()}
            self._state = replace(self._state, loss_sum=0.0, num_loss_steps=0)
            self._add_point(values)
            self._news.begin_point()
        if self._is_first:
            self._news.post_now_and_then(self._state.step, result.loss, learning_rate)

    def _add_point(self, values: Mapping[str, float]) -> None:
        point = LogPoint(self._state.step, self._order.epochs_after(self._state.step), values)
        self._state = replace(self._state, logs=(*self._state.logs, point))

    def _is_time_to_validate(self) -> bool:
        step, every = self._state.step, self._config.evaluate_steps
        return step % every == 0 if every else step in self._order.steps_before

    def _validate(self) -> None:
        """Adds a point with what validation finds; the state then has a value to be chosen by."""
        prepared = self._task.validation
        if prepared is None:
            return
        began = time.monotonic()
        self._say("validating …")
        own = np.arange(self._rank, prepared.num_lists, self._num_workers, dtype=np.int64)
        parts = (
            read_lists(prepared, own[start : start + _VALIDATED_LISTS])
            for start in range(0, len(own), _VALIDATED_LISTS)
        )
        values = validate(self._model, parts, self._objective)
        value, note = judge(values, is_ranked=self._objective.needs_num_labels_one)
        if note and note not in self._notes:
            self._notes.add(note)
            self._say(note)
        self._state = replace(self._state, value=value)
        if values:
            self._add_point({**values, "seconds": self._seconds()})
            if self._is_first:
                ray.get(self._task.board.validated.remote(self._state.logs[-1]))
        self._news.leave_out(time.monotonic() - began)

    def _is_time_to_look(self) -> bool:
        return time.monotonic() - self._looked_at > _LOOK_SECONDS

    def _is_threatened(self) -> bool:
        """Whether a worker's node is newly known to be taken back soon. All workers ask together."""
        self._looked_at = time.monotonic()
        threat, known = ray.train.get_preemption_info(), self._threatened
        self._threatened = frozenset(threat.preempted_node_ids if threat is not None else ())
        is_news = not self._threatened <= known
        if is_news:
            self._say("a node is about to be taken back: storing a checkpoint first")
        return is_news

    def _is_time_to_store(self) -> bool:
        return self._is_first and time.monotonic() - self._stored_at >= 60 * self._config.checkpoint_minutes

    def _store(self) -> None:
        """Begins to store a checkpoint, which later steps do not change."""
        if self._writer is not None:
            learner, self._stored_at = self._learner, time.monotonic()
            scaler = learner.scaler.state_dict()
            state = replace(self._state, loss_scaler=scaler, seconds=self._seconds(), forward_kind=learner.forward_kind)
            self._writer.write(state, trained_weights(self._model), optimizer_tensors(self._model, learner.optimizer))
        self._state = replace(self._state, value=None)

    def _fail(self, batch: Batch, result: StepResult) -> None:
        """Keeps the batch that gave no number, for people to look at."""
        what, remedy = "the loss", "lower learning_rate"
        if math.isfinite(result.loss):
            what = "the gradient"
            if self._learner.scaler.is_enabled():
                what += ", in float16 and with the loss scaled below 1,"
                remedy += " or take dtype: bfloat16"
        step = batch.step + 1
        if result.is_guilty:
            place = self._task.output / f"{FAILED_BATCH_FOLDER}/step-{step:08d}-worker-{self._rank}.json"
            put(place, json.dumps(list(_shown(batch.lists, self._model.tokenizer)), indent=1).encode())
        barrier()
        self._end(
            Ending(
                "failed",
                f"{what} is not a finite number at step {step:,}; its lists are in"
                f" {self._task.output / FAILED_BATCH_FOLDER}: look for labels out of range, or {remedy}, and start over"
                " with --new-run",
            )
        )

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _say(self, text: str) -> None:
        if self._is_first:
            self._task.board.say.remote(text)

    def _end(self, ending: Ending) -> None:
        if self._writer is not None:
            self._writer.wait()
            self._news.post(self._state.step)
            ray.get(self._task.board.end.remote(ending))


def _learner(task: TrainTask, loss: Objective, device: torch.device, example: TokenizedLists) -> Learner:
    config = task.config

    def optimizer(model: Any) -> torch.optim.Optimizer:
        groups = parameter_groups(
            model,
            learning_rate=config.learning_rate,
            head_learning_rate=config.head_learning_rate,
            weight_decay=config.weight_decay,
        )
        return torch.optim.AdamW(groups, fused=True)

    settings = LearnerSettings(
        max_tokens=max_tokens(config, device),
        dtype=resolve_dtype(config.dtype, device),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        recomputes=config.gradient_checkpointing,
    )
    return Learner(build(config, task.model, device), loss, optimizer, settings, example)


class _News:
    """What the first worker posts now and then, and the driver's wish that comes back."""

    def __init__(self, board: Any, order: Order, config: TrainConfig, num_workers: int, forward_kind: str) -> None:
        self._board, self._order, self._num_workers, self._kind = board, order, num_workers, forward_kind
        self._answer: Any = None
        self._stop = False
        self._posted_at = -math.inf
        self._last: tuple[float | None, float | None] = (None, None)
        self._shown: dict[str, float] = {}
        self.begin_point()

    def begin_point(self) -> None:
        """Rates are taken from now on."""
        self._since, self._num_pairs, self._num_tokens = time.monotonic(), 0, 0

    def leave_out(self, seconds: float) -> None:
        """Rates are without these seconds, which went into other things than steps."""
        self._since += seconds

    def _rates(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        return {"pairs_per_second": self._num_pairs / seconds, "tokens_per_second": self._num_tokens / seconds}

    def count(self, batch: Batch) -> dict[str, float]:
        """Counts a finished batch; returns the rates since the last point."""
        self._num_pairs += batch.num_pairs
        self._num_tokens += batch.num_tokens
        self._shown = self._rates()
        return self._shown

    def post_now_and_then(self, step: int, loss: float, learning_rate: float) -> None:
        self._last = loss, learning_rate
        if time.monotonic() - self._posted_at > _BOARD_SECONDS:
            self.post(step)

    def post(self, step: int) -> None:
        self._posted_at = time.monotonic()
        loss, learning_rate = self._last
        figures = Figures(
            step=step,
            num_steps=self._order.num_steps,
            epoch=self._order.epochs_after(step),
            loss=loss,
            learning_rate=learning_rate,
            pairs_per_second=self._shown.get("pairs_per_second"),
            tokens_per_second=self._shown.get("tokens_per_second"),
            num_workers=self._num_workers,
            forward_kind=self._kind,
        )
        self._answer = self._board.post.remote(figures)

    def wishes_to_stop(self) -> bool:
        """What the board last answered, as far as it has."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop, self._answer = self._stop or ray.get(self._answer), None
        return self._stop


def _shown(lists: TokenizedLists, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Lists in words: where they came from, their texts as tokens say them, and their labels."""
    ends = np.cumsum(lists.sizes)
    for number, end in enumerate(ends.tolist()):
        pairs = range(end - int(lists.sizes[number]), end)
        ids = [lists.pairs.input_ids[lists.pairs.offsets[pair] : lists.pairs.offsets[pair + 1]] for pair in pairs]
        yield {
            "origin": lists.origins[number],
            "weight": float(lists.weights[number]),
            "labels": [float(lists.labels[pair]) for pair in pairs],
            "texts": [tokenizer.decode(tokens.tolist()) for tokens in ids],
        }
