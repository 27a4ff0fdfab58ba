"""The records of checkpoints: what is stored is what is read."""

import json
import math
from dataclasses import replace

import pytest
import torch

from crossenc.errors import RunConflictError
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint, LogPoint
from pipelines.storage import delete, list_files, locate, put, read_bytes


@pytest.fixture
def output(tmp_path):
    return locate(str(tmp_path))


def at(step: int, **more) -> Checkpoint:
    return replace(checkpoints.before_the_first_step("run", 10), step=step, **more)


def stored_and_read(output, checkpoint: Checkpoint) -> Checkpoint:
    checkpoints.store(output, checkpoint, {"weight": torch.ones(1)}, {})
    return checkpoints.read_all(output, "run")[-1]


def tensor_files(output) -> list[str]:
    folder = output / "checkpoints"
    return [file.location.below(folder) for file in list_files(folder) if file.location.name.endswith("safetensors")]


def test_only_the_newest_and_the_best_are_kept_and_nothing_of_an_attempt_that_is_ahead(output):
    for step, value in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        checkpoints.store(output, at(step, value=value), {"weight": torch.ones(1)}, {})
    for place in ("step-00000002-killed", "step-00000004-slower", "step-00000005-ahead"):  # nothing records them yet
        put(output / f"checkpoints/{place}/weights.safetensors", b"x")
    checkpoints.prune(output, "run", num_newest=2)
    assert [found.step for found in checkpoints.read_all(output, "run")] == [1, 3, 4]
    recorded = {file.path for found in checkpoints.read_all(output) for file in (found.weights, found.optimizer)}
    unrecorded = {f"checkpoints/{file}" for file in tensor_files(output)} - recorded
    assert sorted(unrecorded) == [
        "checkpoints/step-00000004-slower/weights.safetensors",
        "checkpoints/step-00000005-ahead/weights.safetensors",
    ]
    assert len(tensor_files(output)) == 2 * 3 + 2


def test_no_record_is_stored_for_tensors_that_another_attempt_removed(output, monkeypatch):
    def stored_and_removed(place, body) -> None:
        put(place, body)
        delete([place])

    monkeypatch.setattr(checkpoints, "put", stored_and_removed)
    with pytest.raises(RunConflictError, match="was removed meanwhile: another run is ahead"):
        checkpoints.store(output, at(3), {"weight": torch.ones(1)}, {})
    assert checkpoints.read_all(output) == []


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
