"""The rerank job as a process of its own, with a fake model: what kill tests start, kill and start again.

    python -m tests.support.rerank_driver job.yaml [--seconds-per-pair 0.01] [--set a=b ...] [--new-run]
        [--constant pipelines.lease.TAKEOVER_SECONDS=3 ...] [--on-load raise|kill]
        [--retry-seconds 2] [--score-log FILE] [--die before|after PATTERN] [--worker-dies before|publish MARK]

--retry-seconds: how long storage is retried, in all processes of the run.
--score-log: scorers note there when they begin and end a shard.
--die: the driver is killed before or after it stores the first file whose name matches.
--worker-dies: one committing process is killed, "before" the part (its side files are stored), or when the part is
written aside and not yet "publish"ed. MARK is a file that it creates, so that only one process dies.
"""

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from tests.support.processes import DriverProcess, run_driver

ROOT = Path(__file__).resolve().parents[2]


class Drivers:
    """Starts drivers whose Ray lives in a folder of its own; `ray_folder` holds its logs until the end."""

    def __init__(self, logs: Path, ray_folder: Path) -> None:
        self._logs, self.ray_folder = logs, ray_folder
        self._started: list[DriverProcess] = []

    def start(self, *args: str, module: str = "tests.support.rerank_driver", **env: str) -> DriverProcess:
        """Runs `python -m module args` with `env` added to the environment."""
        logs = self._logs / f"driver-{len(self._started)}"
        everything = {**os.environ, "RAY_TMPDIR": str(self.ray_folder), **env}
        self._started.append(run_driver([sys.executable, "-m", module, *args], everything, ROOT, logs))
        return self._started[-1]

    def run(self, *args: str, timeout_seconds: float = 200, **env: str) -> DriverProcess:
        """Starts a driver and waits for its end; everything that it left behind is killed."""
        driver = self.start(*args, **env)
        driver.wait(timeout_seconds)
        driver.cleanup()
        return driver

    def cleanup(self) -> None:
        for driver in self._started:
            driver.cleanup()


@contextmanager
def drivers(logs: Path) -> Iterator[Drivers]:
    """A starter of drivers; at the end of the block nothing that they started is left."""
    # pytest's own folders are too long for the names of Ray's sockets.
    with TemporaryDirectory(prefix="ray-") as ray_folder:
        starter = Drivers(logs, Path(ray_folder))
        try:
            yield starter
        finally:
            starter.cleanup()


def undisturbed(job: str) -> Path:
    """Runs a job in this process, on the Ray of all tests, with nobody to disturb it; returns its output folder."""
    from jobs import config
    from pipelines.config import RerankConfig
    from pipelines.rerank import rerank
    from tests.support.models import StumblingModel

    settings = config.load(RerankConfig, job)
    outcome = rerank(settings, connect=lambda: 2, stream=io.StringIO(), model=StumblingModel())
    assert outcome.state == "done", outcome.message
    return Path(settings.output)


@dataclass(frozen=True)
class Deadly:
    """A function that kills its process before or after it is called for a file whose name matches `pattern`.

    With `mark`, only the first process to create that file is killed.
    """

    function: Callable[..., Any]
    when: str
    pattern: str
    mark: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hit = any(fnmatch(str(getattr(arg, "name", "")), self.pattern) for arg in args)
        if hit and self.when == "before":
            self._die()
        result = self.function(*args, **kwargs)
        if hit and self.when == "after":
            self._die()
        return result

    def _die(self) -> None:
        if self.mark:
            try:
                Path(self.mark).touch(exist_ok=False)
            except FileExistsError:
                return
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def deadly_puts(when: str, pattern: str) -> Iterator[None]:
    """Makes `put` and `put_new` deadly wherever this process's pipelines modules use them."""
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("pipelines.")]:
            for name in ("put", "put_new"):
                if module.__name__ != "pipelines.storage" and hasattr(module, name):
                    deadly = Deadly(getattr(module, name), when, pattern)
                    stack.enter_context(mock.patch.object(module, name, deadly))
        yield


def deadly_commit(when: str, mark: str) -> mock._patch:
    """Replaces the committing stage by one in whose process the commit of a part is deadly, once."""
    from pipelines import stages

    class DeadlyCommit(stages.Commit):
        def __call__(self, batch: Any) -> Any:
            import pipelines.commit

            module, name = (pipelines.commit, "put_new") if when == "before" else (os, "link")
            with mock.patch.object(module, name, Deadly(getattr(module, name), "before", "part-*", mark)):
                return super().__call__(batch)

    return mock.patch("pipelines.execute.Commit", DeadlyCommit)


def main() -> int:
    from jobs import rerank
    from tests.support.models import ImpatientModel, StumblingModel

    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--seconds-per-pair", type=float, default=0.0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--new-run", action="store_true")
    parser.add_argument("--constant", dest="constants", action="append", default=[])
    parser.add_argument("--on-load", choices=["raise", "kill"], default="")
    parser.add_argument("--retry-seconds", type=float)
    parser.add_argument("--score-log", default="")
    parser.add_argument("--die", nargs=2, metavar=("WHEN", "PATTERN"))
    parser.add_argument("--worker-dies", nargs=2, metavar=("WHEN", "MARK"))
    given = parser.parse_args()
    model = StumblingModel(seconds_per_pair=given.seconds_per_pair, on_load=given.on_load, score_log=given.score_log)
    if given.retry_seconds is not None:
        model = ImpatientModel(
            seconds_per_pair=given.seconds_per_pair, on_load=given.on_load, retry_seconds=given.retry_seconds
        )
    for constant in given.constants:
        name, _, value = constant.partition("=")
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, float(value))
    with ExitStack() as stack:
        if given.die:
            stack.enter_context(deadly_puts(*given.die))
        if given.worker_dies:
            stack.enter_context(deadly_commit(*given.worker_dies))
        return rerank.run(given.job, tuple(given.overrides), new_run=given.new_run, model=model)


if __name__ == "__main__":
    raise SystemExit(main())
