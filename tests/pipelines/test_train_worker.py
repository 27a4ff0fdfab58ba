"""What the workers of a training run decide and tell: functions that need no cluster."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ray.train import PreemptionInfo

from crossenc.losses import objective
from pipelines import train_worker
from pipelines.checkpoints import before_the_first_step
from pipelines.logs import Logs
from pipelines.train_board import Board, Figures
from pipelines.train_config import WorkersConfig
from pipelines.train_progress import _figures_in_words
from pipelines.train_worker import _News, _Worker, judge


@pytest.mark.parametrize(
    ("values", "is_ranked", "value", "words"),
    [
        ({"validation_loss": 0.5, "nDCG@10": 0.75, "RR@10": 1.0}, True, 0.75, ""),
        ({"nDCG@10": 0.75}, True, 0.75, ""),
        ({"validation_loss": 0.5}, True, -0.5, "measures no ranking"),
        ({"validation_loss": 0.5}, False, -0.5, ""),
        ({"validation_loss": math.nan}, False, None, "cannot judge"),
        ({}, True, None, "cannot judge"),
    ],
)
def test_a_checkpoint_is_chosen_by_its_ranking_or_its_loss_and_people_hear_of_it(values, is_ranked, value, words):
    found, note = judge(values, is_ranked)
    assert found == value and (words in note if words else not note)


class NearBoard:
    """A board that is called as an actor is, in this process."""

    def __init__(self) -> None:
        self.board = Board()

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self.board, name))


@pytest.fixture
def attempt(monkeypatch):
    """Runs a worker that ends with an error, on a board that stays the same; returns how the run ended, if it did."""
    board = NearBoard()
    monkeypatch.setattr(train_worker.ray, "get", lambda answer: answer)
    context = SimpleNamespace(get_world_rank=lambda: 1)
    monkeypatch.setattr(train_worker.ray.train, "get_context", lambda: context)

    def call(error: Exception, step: int, has_group: bool = True):
        def fail():
            raise error

        worker = SimpleNamespace(step=step, run=fail, close=lambda: None)
        monkeypatch.setattr(train_worker, "_Worker", lambda task: worker)
        monkeypatch.setattr(train_worker.dist, "is_initialized", lambda: has_group)
        with pytest.raises(type(error)):
            train_worker.train_worker(SimpleNamespace(board=board, logs=Logs(), threads=torch.get_num_threads()))
        return board.board.ending()

    return call


def test_an_error_that_comes_again_at_the_same_step_ends_the_run_with_its_words(attempt):
    assert attempt(IndexError("Target 7 is out of bounds."), 3) is None
    assert attempt(IndexError("Target 7 is out of bounds."), 5) is None
    ending = attempt(IndexError("Target 7 is out of bounds."), 3)
    assert ending is not None and ending.state == "failed"
    assert "IndexError: Target 7 is out of bounds. (worker 1, after step 3, in " in ending.message


@pytest.mark.parametrize(
    ("error", "has_group"),
    [
        (RuntimeError("Connection closed by peer"), True),
        (ConnectionResetError("reset"), True),
        (ValueError("Default process group has not been initialized"), False),
    ],
)
def test_lost_connections_and_workers_never_end_a_run(attempt, error, has_group):
    assert [attempt(error, 3, has_group) for _ in range(3)] == [None] * 3


def test_workers_that_would_share_a_device_are_refused():
    with pytest.raises(ValueError, match=r"gpus 0\.5 share a device.*set gpus: 1, or count: 1"):
        WorkersConfig(count=2, gpus=0.5)
    assert WorkersConfig(gpus=0.5).gpus == 0.5 and WorkersConfig(count=2, gpus=0.75).count == 2


@pytest.fixture
def worker():
    """The second of two workers, at the beginning of a run, without a model and without data."""
    made = object.__new__(_Worker)
    made._task = SimpleNamespace(validation=SimpleNamespace(num_lists=0))
    made._rank, made._num_workers, made._is_first, made._model = 1, 2, False, None
    made._objective, made._order = objective("binary_cross_entropy"), SimpleNamespace(epochs_after=lambda step: 0.0)
    made._state, made._notes, made._threatened = before_the_first_step("run", 10), set(), frozenset()
    made._started = made._seconds_before = 0.0
    return made


def test_rates_are_without_the_time_of_validation(worker, monkeypatch):
    now = 100.0
    monkeypatch.setattr(train_worker.time, "monotonic", lambda: now)
    worker._news = _News(None, None, None, 2, "packed")

    def judge_slowly(model, parts, loss):
        nonlocal now
        now += 8.0
        return {"nDCG@10": 0.5}

    monkeypatch.setattr(train_worker, "validate", judge_slowly)
    worker._validate()
    now += 2.0
    rates = worker._news.count(SimpleNamespace(num_pairs=30, num_tokens=600))
    assert rates == {"pairs_per_second": 15.0, "tokens_per_second": 300.0}
    assert (worker._state.value, worker._state.logs[0].values) == (0.5, {"nDCG@10": 0.5, "seconds": 108.0})


def test_each_node_that_is_to_be_taken_back_is_news_once(worker, monkeypatch):
    found = []
    for nodes in ({"a": [0]}, {"a": [0]}, {"a": [0], "b": [1]}, {}, {"b": [1]}):
        threat = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks=nodes) if nodes else None
        monkeypatch.setattr(train_worker.ray.train, "get_preemption_info", lambda threat=threat: threat)
        found.append(worker._is_threatened())
    assert found == [True, False, True, False, True]


def test_the_line_that_people_see_shows_loss_rate_and_speed():
    figures = Figures(step=3, num_steps=10, epoch=0.5, loss=0.25, learning_rate=1.5e-5)
    words = _figures_in_words(replace(figures, pairs_per_second=1234.0, tokens_per_second=56789.0))
    assert words == "epoch 0.50 · loss 0.2500 · learning rate 1.50e-05 · 1,234 pairs/s · 56,789 tokens/s"
