"""Shows a run while it works: a live display on a terminal, JSON lines elsewhere.

It is told of every committed shard and knows nothing of storage, Ray or models. Rates cover the last minute,
and the time left follows from the candidates that remain.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines import logs
from pipelines.records import ShardCounts, ShardRecord

_WINDOW_SECONDS = 60.0


def visible(text: str) -> str:
    """`text` with what does not print as itself (control and bidi characters, lone surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def announce(stream: TextIO, text: str) -> None:
    """One line of text for people, or, where `stream` is no terminal, as a JSON line."""
    if not logs.is_display(stream):
        logs.write(stream, {"event": "message", "text": visible(text)})
        return
    stream.write(visible(text) + "\n")
    stream.flush()


class Progress:
    """A context manager that shows `num_shards` shards with `num_candidates` candidates being committed.

    `num_shards_done` shards with `counts_done` (their sum) were committed before this process started: they
    count as done, not as speed. On a terminal `stream` gets a live display; otherwise one JSON line at the
    start, one at the end and, as shards arrive, at most one in `interval_seconds`. Safe to use from several
    threads.
    """

    def __init__(
        self,
        num_shards: int,
        num_candidates: int,
        stream: TextIO,
        *,
        num_shards_done: int = 0,
        counts_done: ShardCounts | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_shards = num_shards
        self._num_candidates = num_candidates
        self._stream = stream
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._lock = threading.RLock()
        self._num_shards_done = num_shards_done
        self._num_candidates_done = self._num_pairs = self._num_refused = 0
        self._num_tokens = 0
        if counts_done is not None:
            self._add(counts_done)
        self._history = deque([self._totals()])
        self._last_line_at = float("-inf")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._history = deque([self._totals()])
        if logs.is_display(self._stream):
            console = Console(file=self._stream)
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)
            self._live.start()
        else:
            self._write_progress()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        else:
            self._write_progress()

    def update(self, record: ShardRecord) -> None:
        """Count one more committed shard."""
        with self._lock:
            self._num_shards_done += 1
            self._add(record.counts)
            self._history.append(self._totals())
            due = self._clock() - self._last_line_at >= self._interval_seconds
        if due and not self._live:
            self._write_progress()

    def message(self, text: str) -> None:
        """Show one line of text, which may hold ids and reasons from the data."""
        if self._live:
            self._live.console.print(Text(visible(text)))
        else:
            self._write_line({"event": "message", "text": visible(text)})

    def snapshot(self) -> dict[str, int | float | None]:
        """The numbers shown: shards, shards_total, pairs (scored), rates per second, refused and eta_seconds.

        `eta_seconds` is None while no speed is known.
        """
        with self._lock:
            now = self._clock()
            # Keep the last state from before the window, and always one earlier state to compare with, so
            # that shards rarer than one a minute still have a rate.
            while len(self._history) > 2 and self._history[1][0] <= now - _WINDOW_SECONDS:
                self._history.popleft()
            started_at, *before = self._history[0]
            _, *after = self._history[-1]
            seconds = now - started_at
            rates = [(b - a) / seconds if seconds > 0 else 0.0 for a, b in zip(before, after, strict=True)]
            candidates_per_second, pairs_per_second, tokens_per_second = rates
            remaining = max(self._num_candidates - self._num_candidates_done, 0)
            eta = remaining / candidates_per_second if candidates_per_second else None if remaining else 0.0
            return {
                "shards": self._num_shards_done,
                "shards_total": self._num_shards,
                "pairs": self._num_pairs,
                "pairs_per_second": round(pairs_per_second, 2),
                "tokens_per_second": round(tokens_per_second, 2),
                "refused": self._num_refused,
                "eta_seconds": None if eta is None else round(eta, 1),
            }

    def _add(self, counts: ShardCounts) -> None:
        self._num_candidates_done += counts.num_candidates
        self._num_pairs += counts.num_scored
        self._num_refused += sum(counts.refused.values())
        self._num_tokens += counts.num_tokens

    def _totals(self) -> tuple[float, int, int, int]:
        return self._clock(), self._num_candidates_done, self._num_pairs, self._num_tokens

    def _write_progress(self) -> None:
        with self._lock:
            self._last_line_at = self._clock()
            self._write_line({"event": "progress", **self.snapshot()})

    def _write_line(self, event: dict[str, int | float | str | None]) -> None:
        with self._lock:
            logs.write(self._stream, event)

    def _render(self) -> Group:
        now = self.snapshot()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(self._num_candidates, 1), completed=self._num_candidates_done, width=40),
            Text(f"{now['shards']:,} of {now['shards_total']:,} shards", style="bold"),
        )
        parts = [
            f"{now['pairs']:,} pairs",
            f"{now['pairs_per_second']:,.0f} pairs/s",
            f"{now['tokens_per_second']:,.0f} tokens/s",
            f"{now['refused']:,} refused",
            _time_left(now["eta_seconds"]),
        ]
        return Group(bar, Text(" · ".join(parts)))


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return "time left unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{rest:02d} left"
