"""Kill tests can trust their helpers: who is dead, who is left, and that nothing outlives a test."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.processes import children, is_running, ray_workers, run_driver, wait_for

_TREE = """
import subprocess, sys, time
child = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("ready", flush=True)
time.sleep(600)
"""
_RAY_JOB = """
import time
import ray

@ray.remote
class ScoreShard:
    def score(self):
        time.sleep(600)

ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=100 << 20, include_dashboard=False)
ray.get(ScoreShard.remote().score.remote())
"""


@pytest.fixture
def drive(tmp_path):
    """Start `python -c code` with cleanup at the end of the test."""
    drivers = []

    def start(code: str):
        drivers.append(run_driver([sys.executable, "-c", code], os.environ, tmp_path, tmp_path / "logs"))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.cleanup()


def _is_ready(driver) -> bool:
    return driver.stdout_path.read_text() == "ready\n" and len(children(driver.pid)) == 2


def test_a_zombie_is_not_running():
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: not is_running(process.pid), 10, "the end of an empty program")
    os.kill(process.pid, 0)  # it has not been waited for: the kernel still knows it
    process.wait()
    assert not is_running(process.pid)
    assert is_running(os.getpid())


def test_kill_9_ends_the_driver_alone_and_cleanup_its_orphans(drive):
    driver = drive(_TREE)
    driver.wait_until(lambda: _is_ready(driver), 20)
    descendants = children(driver.pid)
    driver.kill9()
    assert driver.wait(1) == -signal.SIGKILL
    assert {process.pid for process in driver.survivors()} == {process.pid for process in descendants}
    driver.cleanup()
    assert [process for process in descendants if is_running(process.pid)] == []


def test_cleanup_leaves_other_processes_alone(drive):
    bystander = subprocess.Popen(["sleep", "600"])
    driver = drive(_TREE)
    driver.wait_until(lambda: _is_ready(driver), 20)
    driver.cleanup()
    assert is_running(bystander.pid)
    bystander.kill()
    bystander.wait()


def test_terminate_lets_the_driver_choose_its_exit_code(drive):
    driver = drive(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    driver.wait_until(lambda: driver.stdout_path.read_text() == "ready\n", 20)
    driver.terminate()
    assert driver.wait(10) == 75


def test_waiting_for_a_driver_that_ended_reports_its_last_words(drive):
    driver = drive("raise SystemExit('no such shard')")
    with pytest.raises(RuntimeError, match="no such shard"):
        driver.wait_until(lambda: False, 20)


def test_waiting_for_a_driver_that_goes_on_ends_in_time(drive):
    driver = drive("import time; time.sleep(600)")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        driver.wait_until(lambda: False, 0.3)
    with pytest.raises(TimeoutError, match=r"after 0\.3 s"):
        driver.wait(0.3)
    assert time.monotonic() - start < 5


@pytest.mark.faults
def test_a_local_ray_and_its_busy_actor_end_with_a_killed_driver(drive):
    driver = drive(_RAY_JOB)
    driver.wait_until(lambda: len(ray_workers(driver.pid, "ScoreShard.score")) == 1, 60)
    [actor] = ray_workers(driver.pid, "ScoreShard.score")
    core = [process for process in children(driver.pid) if process.name() in ("gcs_server", "raylet")]
    assert sorted(process.name() for process in core) == ["gcs_server", "raylet"]
    driver.kill9()
    wait_for(lambda: not any(is_running(process.pid) for process in core), 10, "the end of raylet and GCS")
    wait_for(lambda: not is_running(actor.pid), 30, "the end of the actor")
    # Ray's dashboard and environment agents stay for 60 s (measured, Ray 2.60): cleanup does not wait.
    driver.cleanup()
    assert driver.survivors() == []


@pytest.mark.faults
def test_cleanup_ends_a_whole_ray_at_once(drive):
    driver = drive(_RAY_JOB)
    driver.wait_until(lambda: len(ray_workers(driver.pid, "ScoreShard.score")) == 1, 60)
    processes: set[psutil.Process] = driver.remember_descendants()
    assert len(processes) > 3
    driver.cleanup()
    assert [process for process in processes if is_running(process.pid)] == []
