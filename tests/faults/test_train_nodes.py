"""Training on a cluster whose nodes are lost, announced to be taken back, and replaced: the model is the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from crossenc import CrossEncoder
from crossenc.testing import WORDS, tiny_checkpoint
from tests.faults.test_train_kills import last_step
from tests.pipelines.test_train import largest_difference, write_lists
from tests.support.processes import DriverProcess, wait_for
from tests.support.ray_nodes import Nodes, WorkerNode, ray_nodes
from tests.support.rerank_driver import Drivers, drivers

pytestmark = [pytest.mark.timeout(1500), pytest.mark.faults]
#: Long enough for a node to be lost while it trains, and for another one to be taken in as well.
FEW_EPOCHS, EPOCHS = 20, 60


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ray_nodes(tmp_path / "nodes", num_cpus=1) as nodes:
        yield nodes


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Drivers]:
    with drivers(tmp_path) as starter:
        yield starter


def write_job(folder: Path, name: str, epochs: int, checkpoint_minutes: float = 0, **workers: object) -> str:
    settings = {
        "train": str(folder / "train.parquet"),
        "model": str(folder / "model"),
        "output": str(folder / name),
        "batch_lists": 4,
        "epochs": epochs,
        "checkpoint_minutes": checkpoint_minutes,
        "dropout": 0.0,  # two workers draw other numbers than one
        "workers": {"cpus": 1, **workers},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / f"{name}.yaml")


def start(starter: Drivers, nodes: Nodes, folder: Path, epochs: int, **workers: object) -> DriverProcess:
    tiny_checkpoint(folder / "model")
    write_lists(folder / "train.parquet", 80)
    return starter.start(write_job(folder, "out", epochs, **workers), module="jobs.train", **nodes.driver_env)


def undisturbed_model(starter: Drivers, folder: Path, epochs: int) -> Path:
    """The model of the same training by one worker on a Ray of its own."""
    driver = starter.start(write_job(folder, "undisturbed", epochs, checkpoint_minutes=10), module="jobs.train")
    assert driver.wait(600) == 0, driver.tail()
    return folder / "undisturbed" / "model"


def events(driver: DriverProcess) -> list[dict]:
    return [json.loads(line) for line in driver.stderr_path.read_text().splitlines() if line.startswith("{")]


def numbers_of_workers(driver: DriverProcess) -> list[int]:
    """How many workers trained, one after the other."""
    found: list[int] = []
    for event in events(driver):
        number = event.get("workers", 0)
        if number and found[-1:] != [number]:
            found.append(number)
    return found


def training_node(nodes: Nodes) -> WorkerNode:
    wait_for(lambda: any(node.actors("TrainWorker") for node in nodes.workers), 120, "a training worker")
    return next(node for node in nodes.workers if node.actors("TrainWorker"))


def test_training_goes_on_with_fewer_workers_where_a_node_is_lost_and_with_more_when_it_is_back(
    nodes, starter, tmp_path
):
    driver = start(starter, nodes, tmp_path, EPOCHS, count=2, min_count=1)
    driver.wait_until(lambda: numbers_of_workers(driver) == [2] and last_step(tmp_path) >= 3, 200)
    nodes.remove(nodes.workers[0])
    driver.wait_until(lambda: numbers_of_workers(driver) == [2, 1], 300)
    nodes.add(num_cpus=1)
    driver.wait_until(lambda: numbers_of_workers(driver) == [2, 1, 2], 300)
    assert driver.wait(600) == 0, driver.tail()
    went_on = [
        event["text"] for event in events(driver) if str(event.get("text", "")).startswith("going on after step")
    ]
    assert len(went_on) >= 2
    pairs = [(word, f"{word} of the river") for word in WORDS]
    folders = (tmp_path / "out" / "model", undisturbed_model(starter, tmp_path, EPOCHS))
    scores = [CrossEncoder(folder, device="cpu").predict(pairs) for folder in folders]
    assert np.abs(scores[0] - scores[1]).max() < 1e-3  # sums over two workers are rounded in another order


def test_a_checkpoint_is_stored_before_an_announced_node_is_taken_back(nodes, starter, tmp_path):
    driver = start(starter, nodes, tmp_path, FEW_EPOCHS, count=1)
    driver.wait_until(lambda: last_step(tmp_path) >= 3, 200)
    node = training_node(nodes)
    nodes.drain(node, seconds=20)
    said = "a node is about to be taken back: storing a checkpoint first"
    driver.wait_until(lambda: any(event.get("text") == said for event in events(driver)), 60)
    before = last_step(tmp_path)
    nodes.remove(node)
    driver.wait_until(
        lambda: any(str(event.get("text", "")).startswith("going on after step") for event in events(driver)), 300
    )
    assert last_step(tmp_path) >= before
    assert driver.wait(600) == 0, driver.tail()
    weights = [load_file(tmp_path / "out/model/model.safetensors")]
    weights.append(load_file(undisturbed_model(starter, tmp_path, FEW_EPOCHS) / "model.safetensors"))
    assert largest_difference(*weights) < 1e-5
