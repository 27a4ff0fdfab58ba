"""Batches of a training run, read ahead of the steps that learn from them. Knows nothing of Ray and of models."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossenc.loop.lists import TokenizedLists
from crossenc.loop.order import Order, share

#: Batches that are ready before they are asked for.
_AHEAD = 4
#: Tokens, and steps, behind them whose lists begin to be read.
_EXPECTED_TOKENS, _EXPECTED_STEPS = 4_000_000, 256
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
    """The lists of a run: pairs and tokens of each, int64 [N], and how to read some of them by number.

    `expect` is told which ones will be read soon; it returns at once.
    """

    num_pairs: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    read: Callable[[NDArray[np.int64]], TokenizedLists]
    expect: Callable[[NDArray[np.int64]], None]


@dataclass(frozen=True, slots=True)
class _Share:
    """What a worker will read for a step: its own lists, or where none is left for it, one that counts nothing."""

    step: int
    batch: NDArray[np.int64]
    numbers: NDArray[np.int64]
    is_own: bool


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
        steps = range(first, order.num_steps)
        try:
            for one in _expected(lists, (_share(lists, order, step, rank, num_workers) for step in steps)):
                if not offer(_read(lists, one)):
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


def _share(lists: Lists, order: Order, step: int, rank: int, num_workers: int) -> _Share:
    batch = order.batch(step)
    own = share(batch, lists.num_tokens, num_workers)[rank]
    shortest = batch[[int(np.argmin(lists.num_tokens[batch]))]]
    return _Share(step, batch, own if len(own) else shortest, len(own) > 0)


def _expected(lists: Lists, shares: Iterator[_Share]) -> Iterator[_Share]:
    """The same shares, some steps after their lists were announced."""
    waiting: deque[tuple[_Share, int]] = deque()
    num_tokens = 0
    for one in shares:
        lists.expect(one.numbers)
        waiting.append((one, int(lists.num_tokens[one.batch].sum())))
        num_tokens += waiting[-1][1]
        while num_tokens > _EXPECTED_TOKENS or len(waiting) > _EXPECTED_STEPS:
            first, its_tokens = waiting.popleft()
            num_tokens -= its_tokens
            yield first
    yield from (one for one, _ in waiting)


def _read(lists: Lists, one: _Share) -> Batch:
    """A worker's part of a step. A list that is not its own counts nothing, and keeps it in step with the others."""
    found, batch = lists.read(one.numbers), one.batch
    if not one.is_own:
        found = replace(found, weights=np.zeros_like(found.weights))
    return Batch(one.step, found, len(batch), int(lists.num_pairs[batch].sum()), int(lists.num_tokens[batch].sum()))
