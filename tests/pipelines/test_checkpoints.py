"""The records of checkpoints: what is stored is what is read."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, LogPoint
from pipelines.storage import locate, read_bytes


@pytest.fixture
def output(tmp_path):
    return locate(str(tmp_path))


def at(step: int, **more) -> Checkpoint:
    return replace(checkpoints.before_the_first_step("run", 10), step=step, **more)


def stored_and_read(output, checkpoint: Checkpoint) -> Checkpoint:
    checkpoints.store(output, checkpoint, {"weight": torch.ones(1)}, {})
    return checkpoints.read_all(output, "run")[-1]


def test_a_loss_scaler_goes_on_from_what_the_record_says_of_it(output):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2000)
    scaler.scale(torch.ones(1))  # which makes its tensors
    found = stored_and_read(output, at(3, loss_scaler=scaler.state_dict())).loss_scaler
    assert found == scaler.state_dict() and isinstance(found["growth_interval"], int)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, again = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
    again.load_state_dict(dict(found))
    again.scale((weight * 0.25).sum()).backward()
    again.step(optimizer)
    again.update()
    assert weight.item() == 0.75 and again.state_dict()["_growth_tracker"] == 1


def test_figures_that_are_no_finite_numbers_are_stored_and_read(output):
    values = {"loss": 0.5, "gradient_norm": math.inf, "validation_loss": math.nan}
    found = stored_and_read(output, at(3, logs=(LogPoint(3, 0.5, values),))).logs[0].values
    assert (found["loss"], found["gradient_norm"]) == (0.5, math.inf) and math.isnan(found["validation_loss"])
    body = read_bytes(output / "checkpoints/step-00000003.json")
    json.loads(body, parse_constant=pytest.fail)  # other programs read it, too
    kept = checkpoints.read_tensors(output, checkpoints.read_all(output)[0].weights)
    assert kept["weight"].tolist() == [1.0]
