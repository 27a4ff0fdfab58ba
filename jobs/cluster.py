"""The Ray cluster of a job: the one that it names, or a local one that lives as long as the job."""

import contextlib
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray

from crossenc.errors import ConfigError
from jobs.runtime import StopSignal
from pipelines import execute


def connect(ray_address: str | None, needs: Callable[[int], Mapping[str, float]], stop: StopSignal) -> int:
    """Connects to the cluster that the job or RAY_ADDRESS names, or starts a local one; returns a node's cores.

    `needs` says how many CPUs and GPUs the job holds at once, given a node's cores. Raises ConfigError where this
    machine, as a local cluster, lacks the GPUs, and KeyboardInterrupt where the process was asked to stop meanwhile.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():  # the second phase of a run asks again, and so does a job's next run
        if address or not execute.describe_shortage(needs(_cores())):
            return _cores()
        ray.shutdown()  # a local Ray is as large as the first run needed, and this one needs more
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        _start_ray(stop, address=address, **quiet)
    else:
        # CPUs are only counted, not bound: with one to spare, reading and writing find room beside scoring.
        num_cpus = math.ceil(needs(_cores())["CPU"]) + 1
        _start_ray(stop, address="local", num_cpus=max(num_cpus, _cores()), include_dashboard=False, **quiet)
        shortage = execute.describe_shortage(needs(_cores()))
        if shortage:
            raise ConfigError(f"{shortage} on this machine; ask for fewer actors, workers or GPUs")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    stop.drain()
    return _cores()


def _start_ray(stop: StopSignal, **arguments: Any) -> None:
    """Calls ray.init, which leaves behind a handler of its own for SIGTERM."""
    with _without_log_level_line(), stop.handling_again_after():
        ray.init(**arguments)


@contextlib.contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Keeps off stderr the line in which Ray's core says that it found RAY_BACKEND_LOG_LEVEL; the rest is passed on."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught, os.fdopen(os.dup(2), "wb") as stderr:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            caught.seek(0)
            stderr.writelines(line for line in caught if b"RAY_BACKEND_LOG_LEVEL" not in line)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def disconnected_at_end() -> Iterator[None]:
    """Shuts Ray down when the block ends, however it ends, unless it ran before."""
    is_ours = not ray.is_initialized()
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()
