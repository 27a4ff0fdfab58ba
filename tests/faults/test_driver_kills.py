"""Runs that end early (killed, told to stop, out of disk) and what the next run of the same command makes of them.

Every driver is a process with a Ray of its own. The oracle is an undisturbed run of the same job.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import status as status_job
from pipelines import status
from tests.support.collections import make_collection, part_bytes, parts, visible_files, with_bad_rows, write_job
from tests.support.filesystems import small_disk
from tests.support.models import NAN
from tests.support.processes import DriverProcess, ray_workers
from tests.support.rerank_driver import Drivers, drivers, undisturbed

pytestmark = pytest.mark.timeout(900)
#: With it a shard of 20 candidates takes about half a second, so that a kill finds work under way.
SLOW = ("--seconds-per-pair", "0.025")
NUM_SHARDS = 12


class Scene:
    """One collection as pairs and shuffled, and what runs over it write when nobody disturbs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        collection = with_bad_rows(make_collection(folder / "in", num_queries=24), marker=NAN)
        common = {"shard_candidates": 20, "scoring": {"cpus_per_actor": 1}}
        self._settings = {layout: {**collection.write(layout), **common} for layout in ("pairs", "shuffled")}
        self._oracles: dict[str, dict[str, bytes]] = {}

    def job(self, folder: Path, layout: str = "pairs", **more: object) -> str:
        """A job file in `folder`, with `folder`/out as output unless told otherwise."""
        return write_job(folder / "job.yaml", **{"output": str(folder / "out"), **self._settings[layout], **more})

    def oracle(self, layout: str = "pairs") -> dict[str, bytes]:
        """The bytes of every table of an undisturbed run."""
        if layout not in self._oracles:
            folder = self._folder / layout
            folder.mkdir()
            self._oracles[layout] = part_bytes(undisturbed(self.job(folder, layout)))
            assert any(path.startswith("quarantine/") for path in self._oracles[layout])
        return self._oracles[layout]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Drivers]:
    with drivers(tmp_path) as starter:
        yield starter


def stderr_events(driver: DriverProcess) -> list[dict[str, object]]:
    """The JSON lines on a driver's stderr; every other line must be its one error."""
    lines = [line for line in driver.stderr_path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    errors = [line for line in lines if not line.startswith("{")]
    assert all(line.startswith("error: ") for line in errors), errors
    return [json.loads(line) for line in lines if line.startswith("{")]


def messages(driver: DriverProcess) -> str:
    return "\n".join(str(event["text"]) for event in stderr_events(driver) if event["event"] == "message")


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_killed_driver_is_resumed_to_the_bytes_of_an_undisturbed_run(scene, starter, tmp_path, capsys, times):
    job, output = scene.job(tmp_path), tmp_path / "out"
    committed: dict[str, tuple[int, int]] = {}
    for _ in range(times):
        driver = starter.start(job, *SLOW)
        wanted = len(committed) + 2
        driver.wait_until(lambda wanted=wanted: len(parts(output)) >= wanted, 200)
        low = len(parts(output))
        running = status.look(str(output))
        assert low <= running.num_shards_done <= len(parts(output))
        assert running.state == "running" and f"pid {driver.pid}" in running.detail
        driver.kill9()
        assert status.look(str(output)).state == "resumable"
        driver.cleanup()
        now = parts(output)
        assert {name: now[name] for name in committed} == committed  # a committed part is never written again
        assert len(committed) < len(now) < NUM_SHARDS
        assert stderr_events(driver)
        assert not (output / "_SUCCESS").exists()
        committed = now

    driver = starter.start(job)
    assert driver.wait(200) == 0, driver.tail()
    assert "looking whether it is still alive" not in messages(driver)  # a dead process of this machine is known dead
    first, *_, last = [event for event in stderr_events(driver) if event["event"] == "progress"]
    assert (first["shards"], last["shards"], last["shards_total"]) == (len(committed), NUM_SHARDS, NUM_SHARDS)
    assert {name: parts(output)[name] for name in committed} == committed
    assert part_bytes(output) == scene.oracle()

    assert status_job.run(str(output), as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["num_shards_done"], shown["num_candidates"]) == ("finished", NUM_SHARDS, 240)
    assert (shown["num_scored"], shown["refused"]) == (238, {"document_missing": 1, "score_not_finite": 1})


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_a_driver_told_to_stop_finishes_what_is_in_work_and_says_how_to_resume(scene, starter, tmp_path, number):
    job, output = scene.job(tmp_path), tmp_path / "out"
    driver = starter.start(job, *SLOW)
    driver.wait_until(lambda: len(parts(output)) >= 1, 200)
    driver.process.send_signal(number)
    assert driver.wait(60) == 75, driver.tail()
    assert "shards in work are finished first" in messages(driver)
    assert "stopped; run the same command again to resume" in driver.stdout_path.read_text()
    before = parts(output)
    assert 1 <= len(before) < NUM_SHARDS
    assert status.look(str(output)).state == "resumable"
    if number == signal.SIGTERM:
        driver = starter.run(job)
        assert driver.wait(0) == 0, driver.tail()
        assert {name: parts(output)[name] for name in before} == before
        assert part_bytes(output) == scene.oracle()


@pytest.mark.faults
def test_a_second_sigterm_ends_the_driver_at_once(scene, starter, tmp_path):
    output = tmp_path / "out"
    driver = starter.start(scene.job(tmp_path), "--seconds-per-pair", "3")  # one shard takes a minute
    driver.wait_until(lambda: bool(ray_workers(driver.pid, "ScoreShards")), 200)
    driver.terminate()
    driver.wait_until(lambda: "stopping" in messages(driver), 60)
    driver.terminate()
    assert driver.wait(10) == 75
    assert parts(output) == {}


@pytest.mark.faults
def test_a_drain_that_takes_too_long_is_cut_short(scene, starter, tmp_path):
    driver = starter.start(scene.job(tmp_path, drain_seconds=1), "--seconds-per-pair", "3")
    driver.wait_until(lambda: bool(ray_workers(driver.pid, "ScoreShards")), 200)
    driver.terminate()
    assert driver.wait(60) == 75, driver.tail()
    assert "stopped; run the same command again to resume" in driver.stdout_path.read_text()


def test_sigterm_before_the_cluster_is_up_ends_the_driver_as_resumable(scene, starter, tmp_path):
    driver = starter.start(scene.job(tmp_path))
    driver.wait_until(lambda: (tmp_path / "out" / "_run" / "plan.json").exists(), 200)
    driver.terminate()
    assert driver.wait(60) == 75, driver.tail()  # Ray's own handler may leave a traceback, hit in a finaliser
    assert "resume" in driver.tail()


STEPS = [
    ("after", "shards-*"),
    ("after", "epoch-*"),
    ("after", "plan.json"),
    ("after", "records-*"),
    ("before", "_manifest.json"),
    ("after", "_manifest.json"),
    ("after", "report.html"),
]


@pytest.mark.faults
def test_a_driver_killed_at_one_step_after_the_other_ends_like_an_undisturbed_one(scene, starter, tmp_path):
    job, output = scene.job(tmp_path), tmp_path / "out"
    for when, name in [("after", "plan.json"), ("before", "_manifest.json"), ("after", "report.html")]:
        driver = starter.run(job, "--die", when, name)
        assert driver.wait(0) == -signal.SIGKILL, driver.tail()
        assert not (output / "_SUCCESS").exists()
    driver = starter.run(job)
    assert driver.wait(0) == 0, driver.tail()
    assert part_bytes(output) == scene.oracle()
    assert (output / "_SUCCESS").exists()


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["pairs", "shuffled"])
@pytest.mark.parametrize(("when", "name"), STEPS)
def test_a_driver_killed_at_any_step_is_resumed_to_the_same_bytes(scene, starter, tmp_path, layout, when, name):
    job, output = scene.job(tmp_path, layout), tmp_path / "out"
    driver = starter.run(job, "--die", when, name)
    assert driver.wait(0) == -signal.SIGKILL, driver.tail()
    assert not (output / "_SUCCESS").exists()
    driver = starter.run(job)
    assert driver.wait(0) == 0, driver.tail()
    assert part_bytes(output) == scene.oracle(layout)


@pytest.mark.faults
def test_two_phases_killed_in_each_are_resumed_to_the_bytes_of_an_undisturbed_run(scene, starter, tmp_path):
    job, output = scene.job(tmp_path, "shuffled"), tmp_path / "out"
    driver = starter.start(job, *SLOW)
    driver.wait_until(lambda: len(list(output.glob("_run/scored/part-*"))) >= 2, 200)
    driver.kill9()
    driver.cleanup()
    driver = starter.start(job, *SLOW)
    driver.wait_until(lambda: len(list(output.glob("_run/scored/part-*"))) == NUM_SHARDS, 200)
    driver.kill9()
    driver.cleanup()
    driver = starter.run(job)
    assert driver.wait(0) == 0, driver.tail()
    assert part_bytes(output) == scene.oracle("shuffled")


@pytest.mark.faults
@pytest.mark.parametrize("when", ["before", "publish"])
def test_a_worker_that_dies_in_the_middle_of_a_commit_costs_nothing(scene, starter, tmp_path, when):
    job, output, mark = scene.job(tmp_path), tmp_path / "out", tmp_path / "died"
    driver = starter.run(job, "--worker-dies", when, str(mark))
    assert driver.wait(0) == 0, driver.tail()
    assert mark.exists()
    assert part_bytes(output) == scene.oracle()
    assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} == visible_files(output)


@pytest.mark.faults
def test_a_full_disk_ends_the_run_with_a_remedy_and_freeing_space_lets_it_finish(scene, starter, tmp_path):
    with small_disk(megabytes=1) as disk:
        job, output, ballast = scene.job(tmp_path, output=str(disk / "out")), disk / "out", disk / "ballast"
        ballast.write_bytes(b"x" * (880 << 10))
        driver = starter.run(job)
        assert driver.wait(0) == 1, driver.tail()
        [error] = [line for line in driver.stderr_path.read_text().splitlines() if line.startswith("error:")]
        assert "no space is left" in error and "run the same command again" in error
        stderr_events(driver)
        before = parts(output)
        assert 0 < len(before) < NUM_SHARDS
        assert {path: data for path, data in part_bytes(output).items() if path.startswith("results/")}.items() <= (
            scene.oracle().items()
        )
        ballast.unlink()
        driver = starter.run(job)
        assert driver.wait(0) == 0, driver.tail()
        assert {name: parts(output)[name] for name in before} == before
        assert part_bytes(output) == scene.oracle()
        assert {"_SUCCESS", "_manifest.json", "report.html"} <= visible_files(output)
