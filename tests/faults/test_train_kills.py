"""Training runs whose workers and drivers are killed, and that end with the weights of an undisturbed run."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load, load_file

from crossenc.testing import tiny_checkpoint
from tests.pipelines.test_train import largest_difference, write_lists
from tests.support.filesystems import small_disk
from tests.support.processes import DriverProcess, ray_workers
from tests.support.rerank_driver import drivers

pytestmark = pytest.mark.timeout(900)


class Scene:
    """Data, a model with dropout, and the weights of a run that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tiny_checkpoint(folder / "model")
        write_lists(folder / "train.parquet", 80)
        self._weights: dict = {}

    def job(self, folder: Path, **more: object) -> str:
        settings = {
            "train": str(self._folder / "train.parquet"),
            "validation": 0.2,
            "model": str(self._folder / "model"),
            "output": str(folder / "out"),
            "batch_lists": 4,
            "epochs": 10,
            "learning_rate": 0.001,
            "checkpoint_minutes": 0,
            "keep_checkpoints": 3,
        }
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(settings | more))
        return str(path)

    def weights(self) -> dict:
        if not self._weights:
            folder = self._folder / "undisturbed"
            folder.mkdir()
            with drivers(folder) as starter:
                driver = starter.start(self.job(folder), module="jobs.train")
                assert driver.wait(300) == 0, driver.tail()
            self._weights = load_file(folder / "out" / "model" / "model.safetensors")
        return self._weights


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def starter(tmp_path: Path):
    with drivers(tmp_path) as starter:
        yield starter


def last_step(folder: Path) -> int:
    names = [path.stem for path in (folder / "out" / "checkpoints").glob("step-*.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def workers(driver: DriverProcess) -> list:
    return ray_workers(driver.pid, "TrainWorker")


@pytest.mark.faults
def test_a_worker_that_is_killed_costs_the_steps_since_the_last_checkpoint_and_nothing_else(scene, starter, tmp_path):
    driver = starter.start(scene.job(tmp_path), module="jobs.train")
    driver.wait_until(lambda: last_step(tmp_path) >= 3, 200)
    [worker] = workers(driver)
    worker.send_signal(signal.SIGKILL)
    assert driver.wait(300) == 0, driver.tail()
    lines = [json.loads(line) for line in driver.stderr_path.read_text().splitlines() if line.startswith("{")]
    assert any(str(line.get("text", "")).startswith("going on after step") for line in lines)
    assert largest_difference(load_file(tmp_path / "out" / "model" / "model.safetensors"), scene.weights()) < 1e-6


@pytest.mark.faults
def test_a_driver_killed_three_times_ends_with_the_weights_of_an_undisturbed_run(scene, starter, tmp_path):
    job = scene.job(tmp_path)
    for _ in range(3):
        driver = starter.start(job, module="jobs.train")
        wanted = last_step(tmp_path) + 4
        driver.wait_until(lambda wanted=wanted: last_step(tmp_path) >= wanted, 300)
        driver.kill9()
        driver.cleanup()
    driver = starter.start(job, module="jobs.train")
    assert driver.wait(300) == 0, driver.tail()
    assert largest_difference(load_file(tmp_path / "out" / "model" / "model.safetensors"), scene.weights()) < 1e-6


@pytest.mark.faults
def test_a_driver_told_to_stop_stores_a_checkpoint_and_says_how_to_resume(scene, starter, tmp_path):
    job = scene.job(tmp_path)
    driver = starter.start(job, module="jobs.train")
    driver.wait_until(lambda: last_step(tmp_path) > 0, 200)
    driver.terminate()
    assert driver.wait(200) == 75, driver.tail()
    assert "run the same command again to resume" in driver.stdout_path.read_text()
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    driver = starter.start(job, module="jobs.train")
    assert driver.wait(300) == 0, driver.tail()
    assert largest_difference(load_file(tmp_path / "out" / "model" / "model.safetensors"), scene.weights()) < 1e-6


@pytest.mark.faults
def test_a_full_disk_ends_the_run_with_a_remedy_and_freeing_space_lets_it_finish(scene, starter, tmp_path):
    with small_disk(megabytes=3) as disk:
        filler = disk / "filler"
        filler.write_bytes(b"x" * int(2.7 * 2**20))
        job = scene.job(tmp_path, output=str(disk / "out"))
        driver = starter.start(job, module="jobs.train")
        assert driver.wait(300) == 1, driver.tail()
        assert "space" in driver.stderr_path.read_text().splitlines()[-1]
        filler.unlink()
        driver = starter.start(job, module="jobs.train")
        assert driver.wait(300) == 0, driver.tail()
        weights = load((disk / "out" / "model" / "model.safetensors").read_bytes())  # a mapped file keeps the disk busy
    assert largest_difference(weights, scene.weights()) < 1e-6
