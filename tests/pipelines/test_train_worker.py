"""What the workers of a training run decide by themselves: functions that need no cluster."""

import math
from types import SimpleNamespace

import pytest
import torch

from pipelines import train_worker
from pipelines.logs import Logs
from pipelines.train_board import Board
from pipelines.train_config import WorkersConfig
from pipelines.train_worker import judge


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
