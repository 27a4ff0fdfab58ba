"""What every job needs from its process: environment, Ray, signals, logging and exit codes.

The only module that reads the environment for Ray, and the only one that configures logging.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import ray

from crossenc.errors import ConfigError, CrossEncError, InputError, RunConflictError
from pipelines.progress import visible
from pipelines.storage import redact

#: Exit codes: done; anything unexpected; bad configuration or input; stopped and resumable.
DONE, FAILED, BAD_INPUT, RESUMABLE = 0, 1, 2, 75
#: Logical CPUs of a local cluster beyond the cores, so that reading and writing always find room beside scoring.
_EXTRA_CPUS = 2
#: These make Ray unpickle what it finds inside Parquet files.
_UNSAFE = ("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA")


class StopSignal:
    """Remembers that the process was asked to stop; a second request ends it at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        return self._event.is_set()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(RESUMABLE)
        self._event.set()


def prepare() -> None:
    """Quiets the libraries and refuses an environment in which reading data could run code."""
    for name in _UNSAFE:
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise ConfigError(f"{name} lets Parquet files run code when they are read; unset it")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray prints, as an error, that Ray Data keeps its own actors' arguments in the object store; see ray #53727.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("ray").setLevel(logging.ERROR)


def connect(address: str | None, stop: StopSignal) -> int:
    """Connects to the cluster at `address` (or RAY_ADDRESS), or starts a local one; returns the cores of a node.

    The handlers for SIGTERM and SIGINT are set here, because starting Ray replaces them.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                address="local",
                num_cpus=_cores() + _EXTRA_CPUS,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, stop.handle)
    signal.signal(signal.SIGINT, stop.handle)
    return _cores()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def disconnected_at_end() -> Iterator[None]:
    """Shuts Ray down when the block ends, however it ends."""
    try:
        yield
    finally:
        ray.shutdown()


def run(job: Callable[[], int]) -> int:
    """Runs a job and turns its errors into a message and an exit code."""
    try:
        prepare()
        return job()
    except (InputError, RunConflictError) as error:
        return _report(error, BAD_INPUT)
    except CrossEncError as error:
        return _report(error, FAILED)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        return RESUMABLE


def _report(error: Exception, code: int) -> int:
    lines = [visible(line) for line in redact(str(error)).splitlines()]
    sys.stderr.write("error: " + "\n".join(lines) + "\n")
    return code
