"""Processes that work on units side by side on this machine. Knows how to run them, not what a unit is.

Units are independent and their files depend on nothing else, so how many processes there are changes no byte.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from crossenc.errors import CrossEncError
from pipelines import logs

Item = TypeVar("Item")
Result = TypeVar("Result")
Context = TypeVar("Context")

_context: Any = None  # of this process, if it is a worker


def run(
    function: Callable[[Item, Context], Result],
    items: Iterable[Item],
    context: Context,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> Iterator[Result]:
    """Calls `function(item, context)` for each item and yields results as they come.

    Once `should_stop()` says yes, calls under way are finished and the rest is left. With one worker everything
    happens in this process. Raises what a call raises, CrossEncError where a process died.
    """
    if num_workers == 1:
        for item in items:
            if should_stop():
                return
            yield function(item, context)
        return
    spawn = multiprocessing.get_context("spawn")
    waiting = iter(items)
    pending: set[Future[Result]] = set()
    with ProcessPoolExecutor(num_workers, spawn, _begin, (context, logs.current())) as pool:
        try:
            while True:
                if should_stop():
                    waiting = iter(())
                    pending = {future for future in pending if not future.cancel()}
                while len(pending) < 2 * num_workers:
                    try:
                        pending.add(pool.submit(_call, function, next(waiting)))
                    except StopIteration:
                        break
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise CrossEncError(
                "a worker process died, perhaps for want of memory; lower workers or shard_candidates and run the same"
                " command again, it continues"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(context: Any, like: logs.Logs) -> None:
    """Makes a process ready: it logs as its parent does, leaves signals to it, and ends when it is gone."""
    global _context
    _context = context
    logs.begin(like)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray sends a job that it stops, and all below it, the latter
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(function: Callable[[Any, Any], Result], item: Any) -> Result:
    return function(item, _context)
