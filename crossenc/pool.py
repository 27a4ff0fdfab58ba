"""Scoring on several devices of one machine: a process for each, that loads the model once and takes chunks of pairs.

For a whole night's work on a cluster there is the rerank job; this is for one call that should use every device.
"""

import itertools
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from crossenc.adapters import adapters_are_off
from crossenc.errors import ConfigError

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

#: Chunks a device gets on average: enough that all end at about the same time.
_CHUNKS_PER_DEVICE = 10
_MAX_CHUNK_PAIRS = 5000
_NUM_CPU_PROCESSES = 4

Task = Callable[["CrossEncoder", Sequence[Any]], NDArray[np.float32]]
_model: "CrossEncoder"


def default_devices() -> list[str]:
    """Every CUDA device, or on a machine without one four processes on the CPU."""
    if torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu"] * _NUM_CPU_PROCESSES


class Pool:
    """Processes that hold copies of a model, one for each of `devices`; a context manager. `close` ends them."""

    def __init__(self, model: "CrossEncoder", devices: Sequence[str | torch.device]) -> None:
        """Copies the model through a temporary folder. Raises ConfigError for no devices."""
        if not devices:
            raise ConfigError("a pool needs at least one device")
        names = [str(device) for device in devices]
        if adapters_are_off(model.model):
            raise ConfigError(
                "the processes of a pool would use the adapters, which are disabled: delete or enable them"
            )
        self.num_devices = len(devices)
        self._folder = tempfile.TemporaryDirectory(prefix="crossenc-pool-")
        model.save_pretrained(self._folder.name)
        num_on_cpu = sum(name.startswith("cpu") for name in names)
        num_threads = max(1, torch.get_num_threads() // max(1, num_on_cpu))
        settings: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "backend": model.get_backend()}
        settings["max_batch_tokens"] = model.max_batch_tokens
        if model.onnx_network is not None:
            network = model.onnx_network
            settings["model_kwargs"] = {"file_name": network.path.name, "provider": network.provider}
        self._processes = [
            ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_load,
                initargs=(self._folder.name, name, settings, num_threads, model.compile_settings),
            )
            for name in names
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def map(self, task: Task, items: Sequence[Any], chunk_size: int | None) -> list[NDArray[np.float32]]:
        """`task(model, chunk)` of consecutive chunks of `items`, in their order, each on the device that is free.

        The first error of a process is raised at once; chunks that have not begun are dropped then.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(f"chunk_size is {chunk_size}: give a number of pairs, or None")
        size = chunk_size or max(1, min(_MAX_CHUNK_PAIRS, -(-len(items) // (self.num_devices * _CHUNKS_PER_DEVICE))))
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(chunks)
        todo, lock, errors = itertools.count(), threading.Lock(), list[BaseException]()

        def work(process: ProcessPoolExecutor) -> None:
            while not errors:
                with lock:
                    number = next(todo)
                if number >= len(chunks):
                    return
                future: Future[NDArray[np.float32]] = process.submit(_run, task, chunks[number])
                try:
                    results[number] = future.result()
                except BaseException as error:  # raised again in the calling thread
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(process,)) for process in self._processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.shutdown(cancel_futures=True)
        self._folder.cleanup()


def _load(
    folder: str,
    device: str,
    settings: Mapping[str, Any],
    num_threads: int,
    compile_settings: Mapping[str, Any] | None,
) -> None:
    global _model
    from crossenc.model import CrossEncoder

    torch.set_num_threads(num_threads)
    _model = CrossEncoder(folder, device=device, **settings)
    if compile_settings is not None:
        _model.compile(**compile_settings)


def _run(task: Task, chunk: Sequence[Any]) -> NDArray[np.float32]:
    return task(_model, chunk)
