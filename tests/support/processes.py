"""Driver processes that a test starts, watches, kills and cleans up after.

Knows Linux, /proc and the titles that Ray gives its workers; does not know what the driver does.
Only processes started here, or their descendants, are ever signalled.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil


def wait_for(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    """Poll `condition` until it holds; TimeoutError names `what` did not happen in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_seconds:g} s")
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether `pid` executes; a zombie, which still answers `kill -0`, counts as dead."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state = re.search(r"^State:\s+(\S)", status, re.MULTILINE)
    return state is not None and state[1] not in "ZX"


def children(pid: int) -> list[psutil.Process]:
    """All living descendants of `pid`, at any depth; empty when `pid` itself is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ray_workers(pid: int, name_contains: str = "") -> list[psutil.Process]:
    """Ray task and actor processes below `pid` whose title holds `name_contains`.

    Ray titles a busy worker `ray::<task or Actor.method>` and one without work `ray::IDLE`.
    """
    titles = ((process, _title(process)) for process in children(pid))
    return [process for process, title in titles if title.startswith("ray::") and name_contains in title]


def run_driver(args: Sequence[str], env: Mapping[str, str], cwd: Path, log_folder: Path) -> "DriverProcess":
    """Start `args` in a process group of its own; stdout and stderr become files in `log_folder`."""
    log_folder.mkdir(parents=True, exist_ok=True)
    stdout, stderr = log_folder / "stdout.txt", log_folder / "stderr.txt"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            list(args),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            process_group=0,
        )
    return DriverProcess(process, stdout, stderr)


@dataclass
class DriverProcess:
    """A started driver and every descendant seen so far; a context manager that cleans up."""

    process: subprocess.Popen[bytes]
    stdout_path: Path
    stderr_path: Path
    _seen: set[psutil.Process] = field(default_factory=set)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until(self, predicate: Callable[[], bool], timeout_seconds: float) -> None:
        """Wait for `predicate`; a driver that ends first is a RuntimeError with its last output."""

        def ready() -> bool:
            self.remember_descendants()
            ended = self.process.poll() is not None
            if predicate():
                return True
            if ended:
                raise RuntimeError(f"the driver ended with {self.process.returncode}:\n{self.tail()}")
            return False

        wait_for(ready, timeout_seconds, f"the awaited state of {self.process.args!r}")

    def wait(self, timeout_seconds: float) -> int:
        """The exit status (negative: killed by that signal); TimeoutError with the last output otherwise."""
        deadline = time.monotonic() + timeout_seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"still running after {timeout_seconds:g} s:\n{self.tail()}")
            self.remember_descendants()
            time.sleep(0.1)
        return self.process.returncode

    def kill9(self) -> None:
        """SIGKILL the driver alone, as the kernel's OOM killer would; descendants are remembered first."""
        self.remember_descendants()
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM the driver alone, as a spot machine that is taken back would."""
        self.remember_descendants()
        self.process.terminate()

    def remember_descendants(self) -> set[psutil.Process]:
        """All descendants seen so far, dead or alive; they stay ours after the driver has died."""
        self._seen.update(children(self.pid))
        return set(self._seen)

    def survivors(self) -> list[psutil.Process]:
        """Descendants that still execute, including those started by orphaned descendants."""
        alive = {process for process in self.remember_descendants() if _executes(process)}
        for process in list(alive):
            alive.update(child for child in children(process.pid) if _executes(child))
        self._seen |= alive
        return sorted(alive, key=lambda process: process.pid)

    def cleanup(self) -> None:
        """SIGKILL the driver and every survivor, and wait for them; safe to call again."""
        if self.process.poll() is None:
            self.kill9()

        def none_left() -> bool:
            for process in self.survivors():
                _kill(process)
            return not self.survivors()

        wait_for(none_left, 10, f"the end of all descendants of {self.pid}")

    def tail(self, num_chars: int = 4000) -> str:
        """The end of stdout and stderr, for messages."""
        out, err = (path.read_text(errors="replace")[-num_chars:] for path in (self.stdout_path, self.stderr_path))
        return f"--- stdout\n{out}\n--- stderr\n{err}"

    def __enter__(self) -> "DriverProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cleanup()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""  # it ended between the listing and this look


def _executes(process: psutil.Process) -> bool:
    # psutil compares start times, so a recycled pid is not taken for the old process.
    return process.is_running() and is_running(process.pid)


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return  # it ended by itself in the meantime


def peak_memory_bytes() -> int:
    """The most memory that this process has held. (Its ru_maxrss would start at that of whoever started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
