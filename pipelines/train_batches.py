"""Batches of a training run, read ahead of the steps that learn from them. Knows nothing of Ray and of models."""

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossenc.loop.lists import TokenizedLists
from crossenc.loop.order import Order, share

#: Batches that are ready before they are asked for.
_AHEAD = 4
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's part of a step. The numbers are those of the whole batch, of all workers."""

    step: int
    lists: TokenizedLists
    num_lists: int
    num_pairs: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of a run: pairs and tokens of each, int64 [N], and how to read some of them by number."""

    num_pairs: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    read: Callable[[NDArray[np.int64]], TokenizedLists]


def read_ahead(lists: Lists, order: Order, first: int, rank: int, num_workers: int) -> Generator[Batch]:
    """The batches of worker `rank` from step `first` on. A thread reads them; close the generator to end it.

    Raises what reading raises. `order` must not be asked for batches meanwhile.
    """
    ready: queue.Queue[Any] = queue.Queue(_AHEAD)
    ended = threading.Event()

    def offer(item: Any) -> bool:
        while not ended.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for step in range(first, order.num_steps):
                if not offer(_batch(lists, order.batch(step), step, rank, num_workers)):
                    return
            offer(None)
        except BaseException as error:  # raised again by whoever waits
            offer(error)

    reader = threading.Thread(target=read, name="batches", daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        reader.join()


def _batch(lists: Lists, batch: NDArray[np.int64], step: int, rank: int, num_workers: int) -> Batch:
    own = share(batch, lists.num_tokens, num_workers)[rank]
    if len(own):
        found = lists.read(own)
    else:  # nothing left for this worker: a list that counts nothing keeps it in step
        shortest = lists.read(batch[[int(np.argmin(lists.num_tokens[batch]))]])
        found = replace(shortest, weights=np.zeros_like(shortest.weights))
    return Batch(step, found, len(batch), int(lists.num_pairs[batch].sum()), int(lists.num_tokens[batch].sum()))
