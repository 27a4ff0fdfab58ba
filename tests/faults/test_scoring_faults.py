"""Scoring that fails: killed actors, models that break, and documents that take their scoring process with them.

Every driver is a process with a Ray of its own. The oracle is an undisturbed run of the same job.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from crossenc.testing import tiny_checkpoint
from tests.support import rerank_driver
from tests.support.collections import (
    Collection,
    make_collection,
    part_bytes,
    parts,
    read_quarantine,
    read_results,
    write_job,
)
from tests.support.models import KILL, NAN, QUIT, RAISE
from tests.support.processes import DriverProcess, children, is_running, ray_workers, wait_for
from tests.support.rerank_driver import Drivers, drivers

pytestmark = pytest.mark.timeout(900)
#: Candidates in a shard: few, because every crash halves what is left of one.
SHARD = {"shard_candidates": 5, "scoring": {"cpus_per_actor": 1}}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return make_collection(tmp_path_factory.mktemp("scoring") / "in", num_queries=16, depth=5)


@pytest.fixture(scope="module")
def settings(collection: Collection) -> dict[str, object]:
    """Everything in a job but its output. Written once: a file that is written again is another input."""
    return collection.write("pairs") | SHARD


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Drivers]:
    with drivers(tmp_path) as starter:
        yield starter


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The output of a run that nothing disturbs."""
    return rerank_driver.undisturbed(make_job(tmp_path_factory.mktemp("oracle"), settings))


def make_job(folder: Path, settings: dict[str, object]) -> str:
    return write_job(folder / "job.yaml", output=str(folder / "out"), **settings)


def scoring_actors(driver: DriverProcess) -> list[psutil.Process]:
    return ray_workers(driver.pid, "ScoreShards")


def error_line(driver: DriverProcess) -> str:
    """The one line on stderr that is no JSON."""
    lines = driver.stderr_path.read_text().splitlines()
    [error] = [line for line in lines if not line.startswith("{")]
    assert all(json.loads(line) for line in lines if line != error)
    return error


def test_a_killed_scoring_actor_costs_nothing(settings, undisturbed, starter, tmp_path):
    job = make_job(tmp_path, settings)
    driver = starter.start(job, "--seconds-per-pair", "0.1")
    driver.wait_until(lambda: len(parts(tmp_path / "out")) >= 1 and bool(scoring_actors(driver)), 200)
    [actor] = scoring_actors(driver)
    actor.kill()
    driver.wait_until(lambda: not is_running(actor.pid), 10)
    assert len(parts(tmp_path / "out")) < 16
    assert driver.wait(200) == 0, driver.tail()
    assert part_bytes(tmp_path / "out") == part_bytes(undisturbed)


@pytest.mark.faults
def test_actors_that_are_killed_again_and_again_cost_nothing(settings, undisturbed, starter, tmp_path):
    job = make_job(tmp_path, settings | {"scoring": {"cpus_per_actor": 1, "actors": 2}})
    driver = starter.start(job, "--seconds-per-pair", "0.1")
    killed: set[int] = set()
    for wanted in range(2, 14, 2):  # all actors that there are, six times, each time after two more commits
        driver.wait_until(lambda wanted=wanted: len(parts(tmp_path / "out")) >= wanted, 200)
        driver.wait_until(lambda: bool(scoring_actors(driver)), 60)
        for actor in scoring_actors(driver):
            killed.add(actor.pid)
            actor.kill()
    assert len(killed) >= 6
    assert driver.wait(200) == 0, driver.tail()
    assert part_bytes(tmp_path / "out") == part_bytes(undisturbed)


@pytest.mark.faults
def test_memory_that_something_else_takes_for_a_while_costs_nothing(settings, undisturbed, starter, tmp_path):
    """Ray ends the run's processes while the machine is short of memory, as this test makes it."""
    memory = psutil.virtual_memory()
    short = (memory.total - memory.available + (4 << 30)) / memory.total
    driver = starter.start(
        make_job(tmp_path, settings),
        "--seconds-per-pair",
        "0.4",
        RAY_memory_usage_threshold=f"{short:.3f}",
        RAY_memory_monitor_refresh_ms="100",
    )
    driver.wait_until(lambda: len(parts(tmp_path / "out")) >= 2 and bool(scoring_actors(driver)), 200)
    [actor] = scoring_actors(driver)
    ballast = np.ones(5 << 27)  # 5 GiB
    driver.wait_until(lambda: not is_running(actor.pid), 60)
    del ballast
    assert len(parts(tmp_path / "out")) < 16
    assert driver.wait(200) == 0, driver.tail()
    assert part_bytes(tmp_path / "out") == part_bytes(undisturbed)


@pytest.mark.faults
def test_the_death_of_the_only_node_ends_the_run_with_a_message_and_the_next_one_goes_on(
    settings, undisturbed, starter, tmp_path
):
    job = make_job(tmp_path, settings)
    driver = starter.start(job, "--seconds-per-pair", "0.1")
    driver.wait_until(lambda: len(parts(tmp_path / "out")) >= 2, 200)
    [raylet] = [process for process in children(driver.pid) if process.name() == "raylet"]
    raylet.kill()
    assert driver.wait(200) == 1, driver.tail()
    wait_for(lambda: "run the same command again" in driver.tail(), 10, "the last words")
    driver.cleanup()
    before = parts(tmp_path / "out")
    assert starter.run(job).wait(0) == 0
    assert {name: parts(tmp_path / "out")[name] for name in before} == before
    assert part_bytes(tmp_path / "out") == part_bytes(undisturbed)


def test_documents_that_end_the_scoring_process_are_refused_alone_and_all_others_ranked(
    collection, undisturbed, starter, tmp_path
):
    markers = {7: KILL, 33: QUIT, 58: RAISE, 72: NAN}
    pairs = collection.pairs.copy()
    for row, marker in markers.items():
        pairs.loc[row, "text"] = f"{pairs.loc[row, 'text']} {marker}"
    driver = starter.run(make_job(tmp_path, Collection(pairs, tmp_path / "bad").write("pairs") | SHARD))
    assert driver.wait(0) == 0, driver.tail()
    quarantine = read_quarantine(tmp_path / "out")
    crash, raised, nan = "scoring_crash", "scoring_error", "score_not_finite"
    assert dict(zip(quarantine.row, quarantine.reason, strict=True)) == {
        7: crash,
        33: crash,
        58: raised,
        72: nan,
    }
    assert quarantine.detail.tolist()[:3] == [
        "the process ended with code -9",
        "the process ended with code 0",
        "RuntimeError: this document cannot be scored",
    ]
    bad = pairs.loc[list(markers), ["query_id", "doc_id"]]
    oracle = read_results(undisturbed).merge(bad, how="left", indicator=True).query("_merge == 'left_only'")
    results = read_results(tmp_path / "out")
    assert results.doc_id.tolist() == oracle.doc_id.tolist()
    np.testing.assert_array_equal(results.score, oracle.score)


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_error(settings, starter, tmp_path):
    job = make_job(tmp_path, settings)
    driver = starter.run(job, "--on-load", "raise")
    assert driver.wait(0) == 1, driver.tail()
    assert "cannot be loaded on this node: RuntimeError: this model cannot be loaded" in error_line(driver)
    assert parts(tmp_path / "out") == {}


@pytest.mark.faults
def test_a_model_whose_loading_kills_the_process_ends_the_run_after_a_few_attempts(settings, starter, tmp_path):
    job = make_job(tmp_path, settings)
    driver = starter.run(job, "--on-load", "kill")
    assert driver.wait(0) == 1, driver.tail()
    assert "loading the model ended the scoring process 4 times" in error_line(driver)
    assert parts(tmp_path / "out") == {}


@pytest.mark.faults
def test_a_checkpoint_that_gives_nan_is_refused_before_anything_is_committed(settings, starter, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_checkpoint(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["bert.embeddings.LayerNorm.weight"][:] = 3e38  # finite, and everything after it overflows
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    driver = starter.start(make_job(tmp_path, settings | {"model": str(model)}), module="jobs.rerank")
    assert driver.wait(200) == 1, driver.tail()
    assert "gives nan for an ordinary pair: its weights are damaged" in error_line(driver)
    assert parts(tmp_path / "out") == {}
