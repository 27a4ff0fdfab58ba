"""Runs on a cluster of three nodes that lose nodes, raylets, actors, their driver and the control service.

The pipeline is a process of its own on the head, which takes no work. The oracle is an undisturbed run on a local Ray.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.test_driver_kills import messages
from tests.support.collections import (
    Collection,
    make_collection,
    part_bytes,
    parts,
    read_quarantine,
    with_bad_rows,
    write_job,
)
from tests.support.models import NAN
from tests.support.processes import DriverProcess, children, wait_for
from tests.support.ray_nodes import Nodes, WorkerNode, ray_nodes
from tests.support.rerank_driver import Drivers, drivers, undisturbed

pytestmark = pytest.mark.timeout(900)
#: With it a shard of 20 candidates takes about half a second.
SLOW = ("--seconds-per-pair", "0.025")


class Scene:
    """One job, what an undisturbed run of it writes, and drivers of it on a cluster."""

    def __init__(self, folder: Path) -> None:
        collection = with_bad_rows(make_collection(folder / "in", num_queries=80), marker=NAN)
        self.settings = collection.write("pairs") | {"shard_candidates": 20}
        self.oracle = oracle_of(folder, self.settings)

    def job(self, folder: Path, **more: object) -> str:
        scoring = {"actors": 2, "cpus_per_actor": 1}
        return write_job(
            folder / "job.yaml", output=str(folder / "out"), **self.settings, **{"scoring": scoring} | more
        )


def oracle_of(folder: Path, settings: dict[str, object]) -> dict[str, bytes]:
    """The bytes of every table of a run that nobody disturbs."""
    return part_bytes(undisturbed(write_job(folder / "oracle.yaml", output=str(folder / "oracle"), **settings)))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ray_nodes(tmp_path / "nodes") as nodes:
        yield nodes


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Drivers]:
    with drivers(tmp_path) as starter:
        yield starter


def begin(starter: Drivers, nodes: Nodes, job: str, *args: str) -> DriverProcess:
    """A driver on the cluster, when it has committed two shards."""
    output = Path(job).parent / "out"
    before = len(parts(output))
    driver = starter.start(job, *(args or SLOW), **nodes.driver_env)
    driver.wait_until(lambda: len(parts(output)) >= before + 2, 200)
    return driver


def scoring_node(nodes: Nodes) -> WorkerNode:
    """A node on which a scoring actor lives."""
    wait_for(lambda: any(node.actors("ScoreShards") for node in nodes.workers), 120, "a scoring actor")
    return next(node for node in nodes.workers if node.actors("ScoreShards"))


def check(scene: Scene, driver: DriverProcess, folder: Path, timeout_seconds: float = 300) -> None:
    """The driver ends well, with the bytes of an undisturbed run."""
    assert driver.wait(timeout_seconds) == 0, driver.tail()
    assert part_bytes(folder / "out") == scene.oracle
    assert (folder / "out" / "_SUCCESS").exists()


@pytest.mark.faults
def test_a_killed_raylet_costs_nothing(scene, nodes, starter, tmp_path):
    driver = begin(starter, nodes, scene.job(tmp_path))
    scoring_node(nodes).kill_raylet()
    nodes.add()
    check(scene, driver, tmp_path)


@pytest.mark.faults
def test_nodes_that_are_lost_and_replaced_one_after_the_other_cost_nothing(scene, nodes, starter, tmp_path):
    driver = begin(starter, nodes, scene.job(tmp_path))
    for _ in range(2):
        nodes.remove(scoring_node(nodes))
        nodes.add()
        done = len(parts(tmp_path / "out"))
        driver.wait_until(lambda done=done: len(parts(tmp_path / "out")) > done, 200)
    check(scene, driver, tmp_path)


@pytest.mark.faults
def test_all_scoring_actors_killed_in_turn_cost_nothing(scene, nodes, starter, tmp_path):
    driver = begin(starter, nodes, scene.job(tmp_path))
    killed = set()
    for _ in range(3):
        for actor in [actor for node in nodes.workers for actor in node.actors("ScoreShards")]:
            actor.send_signal(signal.SIGKILL)
            killed.add(actor.pid)
            time.sleep(1)
        scoring_node(nodes)
    assert len(killed) >= 3
    check(scene, driver, tmp_path)


@pytest.mark.faults
def test_a_slow_scoring_process_holds_up_its_own_shard_alone(scene, nodes, starter, tmp_path):
    driver = begin(starter, nodes, scene.job(tmp_path))
    actor = scoring_node(nodes).actors("ScoreShards")[0]
    actor.suspend()
    before = len(parts(tmp_path / "out"))
    driver.wait_until(lambda: len(parts(tmp_path / "out")) >= before + 5, 200)
    actor.resume()
    check(scene, driver, tmp_path)


@pytest.mark.faults
def test_a_node_that_stands_still_is_given_up_and_does_no_harm_when_it_comes_back(
    scene, starter, tmp_path, monkeypatch
):
    """Its connections stay open, so that Ray waits for answers until it has asked for a sign of life: 7 minutes."""
    monkeypatch.setenv("RAY_grpc_client_keepalive_time_ms", "20000")
    monkeypatch.setenv("RAY_grpc_client_keepalive_timeout_ms", "5000")
    with ray_nodes(tmp_path / "nodes") as nodes:
        driver = begin(starter, nodes, scene.job(tmp_path))
        node = scoring_node(nodes)
        frozen = [psutil.Process(node.raylet_pid), *children(node.raylet_pid)]
        for process in frozen:
            process.suspend()
        nodes.workers.remove(node)
        nodes.add()
        before = len(parts(tmp_path / "out"))
        driver.wait_until(lambda: len(parts(tmp_path / "out")) >= before + 5, 300)
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        check(scene, driver, tmp_path)


@pytest.mark.faults
def test_a_node_that_is_announced_to_be_taken_back_costs_nothing(scene, nodes, starter, tmp_path):
    driver = begin(starter, nodes, scene.job(tmp_path))
    node = scoring_node(nodes)
    nodes.drain(node, seconds=5)
    nodes.add()
    time.sleep(5)
    nodes.remove(node)
    check(scene, driver, tmp_path)


@pytest.mark.faults
def test_a_shard_is_not_blamed_for_nodes_that_are_taken_back_while_it_is_scored(tmp_path, starter):
    settings = Collection(make_collection(tmp_path / "in", num_queries=2).pairs, tmp_path / "in").write("pairs")
    job = write_job(tmp_path / "job.yaml", output=str(tmp_path / "out"), scoring={"cpus_per_actor": 1}, **settings)
    log = tmp_path / "scored.txt"
    log.touch()
    with ray_nodes(tmp_path / "nodes", num_workers=1) as nodes:
        driver = starter.start(job, "--seconds-per-pair", "0.3", "--score-log", str(log), **nodes.driver_env)
        for number in range(1, 7):  # more often than a shard that kills its processes is tried
            driver.wait_until(lambda number=number: log.read_text().count("begin") >= number, 200)
            nodes.remove(nodes.workers[0])
            nodes.add()
        assert driver.wait(300) == 0, driver.tail()
    assert log.read_text().count("end") == 1
    assert read_quarantine(tmp_path / "out").empty


@pytest.mark.faults
def test_a_killed_driver_is_resumed_on_the_same_cluster(scene, nodes, starter, tmp_path):
    job = scene.job(tmp_path)
    driver = begin(starter, nodes, job)
    driver.kill9()
    before = parts(tmp_path / "out")
    driver = begin(starter, nodes, job)
    check(scene, driver, tmp_path)
    assert {name: parts(tmp_path / "out")[name] for name in before} == before


@pytest.mark.faults
def test_the_death_of_the_control_service_ends_the_run_with_a_message_and_another_cluster_goes_on(
    scene, starter, tmp_path
):
    job = scene.job(tmp_path)
    with ray_nodes(tmp_path / "first") as nodes:
        driver = begin(starter, nodes, job)
        nodes.kill_gcs()
        assert driver.wait(300) == 1, driver.tail()
        wait_for(lambda: "run the same command again" in driver.tail(), 10, "the last words")
        driver.cleanup()
    before = parts(tmp_path / "out")
    with ray_nodes(tmp_path / "second") as nodes:
        check(scene, starter.start(job, **nodes.driver_env), tmp_path)
    assert {name: parts(tmp_path / "out")[name] for name in before} == before


@pytest.mark.faults
@pytest.mark.usefixtures("ray_cluster")
def test_shards_larger_together_than_the_object_store_are_held_back_not_lost(starter, tmp_path):
    """200 MB of columns that are passed through, for stores of 80 MB, the smallest that Ray makes."""
    collection = make_collection(tmp_path / "in", num_queries=500)
    ballast = np.random.default_rng(0).bytes(20_000 * len(collection.pairs))
    pairs = collection.pairs.assign(ballast=[ballast[i : i + 20_000] for i in range(0, len(ballast), 20_000)])
    settings = Collection(pairs, tmp_path / "in").write("pairs")
    settings |= {"shard_candidates": 250, "pass_through": ["ballast"]}
    oracle = oracle_of(tmp_path, settings)
    scoring = {"actors": 2, "cpus_per_actor": 1}
    job = write_job(tmp_path / "job.yaml", output=str(tmp_path / "out"), scoring=scoring, **settings)
    with ray_nodes(tmp_path / "nodes", object_store_mb=80) as nodes:
        driver = starter.start(job, "--seconds-per-pair", "0.004", **nodes.driver_env)
        assert driver.wait(400) == 0, driver.tail()
    assert part_bytes(tmp_path / "out") == oracle


@pytest.mark.faults
def test_a_cluster_with_too_few_cpus_is_complained_of_and_a_larger_node_lets_it_finish(scene, starter, tmp_path):
    job = scene.job(tmp_path, scoring={"actors": 2, "cpus_per_actor": 2})
    with ray_nodes(tmp_path / "nodes", num_cpus=1) as nodes:
        driver = starter.start(job, "--constant", "pipelines.silence.FIRST_SECONDS=3", **nodes.driver_env)
        driver.wait_until(lambda: "CPUs are needed and Ray has 2; add a node, or" in messages(driver), 120)
        assert parts(tmp_path / "out") == {}
        nodes.add(num_cpus=6)
        check(scene, driver, tmp_path)
    assert all(isinstance(json.loads(line), dict) for line in driver.stderr_path.read_text().splitlines())
