"""Training on a cluster whose nodes are lost, announced to be taken back, and replaced."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from crossenc.testing import tiny_checkpoint
from tests.faults.test_train_kills import last_step
from tests.pipelines.test_train import write_lists
from tests.support.processes import DriverProcess, wait_for
from tests.support.ray_nodes import Nodes, WorkerNode, ray_nodes
from tests.support.rerank_driver import Drivers, drivers

pytestmark = [pytest.mark.timeout(900), pytest.mark.faults]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ray_nodes(tmp_path / "nodes", num_cpus=1) as nodes:
        yield nodes


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Drivers]:
    with drivers(tmp_path) as starter:
        yield starter


def start(starter: Drivers, nodes: Nodes, folder: Path, **workers: object) -> DriverProcess:
    tiny_checkpoint(folder / "model")
    write_lists(folder / "train.parquet", 80)
    settings = {
        "train": str(folder / "train.parquet"),
        "model": str(folder / "model"),
        "output": str(folder / "out"),
        "batch_lists": 4,
        "epochs": 400,
        "checkpoint_minutes": 0,
        "workers": {"cpus": 1, **workers},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    return starter.start(str(folder / "job.yaml"), module="jobs.train", **nodes.driver_env)


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
    driver = start(starter, nodes, tmp_path, count=2, min_count=1)
    driver.wait_until(lambda: numbers_of_workers(driver) == [2] and last_step(tmp_path) >= 3, 200)
    nodes.remove(nodes.workers[0])
    driver.wait_until(lambda: numbers_of_workers(driver) == [2, 1], 300)
    nodes.add(num_cpus=1)
    driver.wait_until(lambda: numbers_of_workers(driver) == [2, 1, 2], 300)
    driver.terminate()
    assert driver.wait(200) == 75, driver.tail()
    went_on = [
        event["text"] for event in events(driver) if str(event.get("text", "")).startswith("going on after step")
    ]
    assert len(went_on) >= 2


def test_a_checkpoint_is_stored_before_an_announced_node_is_taken_back(nodes, starter, tmp_path):
    driver = start(starter, nodes, tmp_path, count=1)
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
    driver.wait_until(lambda: last_step(tmp_path) > before, 200)
    driver.terminate()
    assert driver.wait(200) == 75, driver.tail()
