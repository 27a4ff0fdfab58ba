"""What every job needs from its process: environment, signals, logging and exit codes.

The only module that configures logging. Ray itself is in cluster: not every command waits for it.
"""

import contextlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from crossenc.errors import ConfigError, CrossEncError, InputError, RunConflictError
from pipelines import logs
from pipelines.progress import visible
from pipelines.storage import redact

#: Exit codes: done; anything unexpected; bad configuration or input; stopped and resumable.
DONE, FAILED, BAD_INPUT, RESUMABLE = 0, 1, 2, 75
#: These make Ray unpickle what it finds inside Parquet files.
_UNSAFE = ("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA")


class StopSignal:
    """Remembers that SIGTERM or SIGINT asked this process to stop; a second request ends it at once.

    Until `drain` is called there is nothing to drain, and the first request interrupts as well. An interruption alone
    would not do: an exception that a signal raises inside a finaliser or a fork hook is lost.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._interrupts = True

    def __call__(self) -> bool:
        return self._event.is_set()

    def drain(self) -> None:
        """From now on a request is only remembered. Raises KeyboardInterrupt if there was one."""
        self._interrupts = False
        if self():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handles the signals while the block runs."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def handling_again_after(self) -> Iterator[None]:
        """Takes the signals back from a block that replaces their handlers, and remembers those that came meanwhile."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        with reader, writer:
            outer = signal.set_wakeup_fd(writer.fileno())  # Python writes a signal's number there, whoever handles it
            try:
                yield
            finally:
                signal.set_wakeup_fd(outer)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, self._handle)
                with contextlib.suppress(BlockingIOError):
                    if {signal.SIGTERM, signal.SIGINT} & set(reader.recv(4096)):
                        self._event.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(RESUMABLE)
        self._event.set()
        if self._interrupts:
            raise KeyboardInterrupt


def prepare() -> None:
    """Sets Ray's environment, begins the logs, and quiets the libraries.

    Raises ConfigError for an environment in which reading data could run code, and for an unknown format of logs.
    """
    for name in _UNSAFE:
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise ConfigError(f"{name} lets Parquet files run code when they are read; unset it")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A nice worker's threads wait for each other at every step in which one was not served: beside anything else that
    # runs on the machine, its cores stand idle.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # workers begin, and end, seconds earlier
    # Ray prints, as an error, that Ray Data keeps its own actors' arguments in the object store; see ray #53727.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    wanted = os.environ.get(logs.VARIABLE, "") or "text"
    if wanted not in ("text", "json"):
        raise ConfigError(f"{logs.VARIABLE} is {wanted!r}; set it to text or json")
    logs.begin(logs.Logs(is_json=wanted == "json"))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("ray").setLevel(logging.ERROR)


def run(job: Callable[[StopSignal], int]) -> int:
    """Runs a job and turns its errors into a message and an exit code."""
    stop = StopSignal()
    try:
        with stop.handling():
            prepare()
            with _last_words():
                return job(stop)
    except (InputError, RunConflictError) as error:
        return _report(str(error), BAD_INPUT)
    except CrossEncError as error:
        return _report(str(error), FAILED)
    except (KeyboardInterrupt, SystemExit):  # the latter is Ray's answer to SIGTERM while it starts
        return _report("interrupted; run the same command again to resume", RESUMABLE)


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
    """Where this process is ended within the block, another one says so: the kernel kills without a word, and Ray ends
    the processes of a cluster that is lost in the same way.
    """
    words = io.StringIO()
    _report(
        "this process was ended before it could say why: killed, out of memory, or its Ray cluster was lost; run the"
        " same command again to go on",
        FAILED,
        words,
    )
    shell = ["sh", "-c", 'read -r ended || printf %s "$1" >&2', "sh", words.getvalue()]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True) as witness:
        try:
            yield
        finally:
            witness.communicate(b"ended\n")


def _report(message: str, code: int, stream: TextIO | None = None) -> int:
    stream = stream or sys.stderr
    if logs.current().is_json:
        logs.write(stream, {"event": "error", "level": "ERROR", "text": message, "exit_code": code})
    else:
        lines = [visible(line) for line in redact(message, logs.current().options).splitlines()]
        stream.write("error: " + "\n".join(lines) + "\n")
    return code
