"""Shows a job of units while it works: a bar on a terminal, JSON lines elsewhere.

It is told of every unit that is done and knows nothing of storage or of what is made.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import logs
from pipelines.progress import announce, visible


class ShownCounts(Protocol):
    """What is known of a unit: its candidates, and what is to be shown, by name."""

    @property
    def num_candidates(self) -> int: ...

    def shown(self) -> dict[str, int]: ...


class UnitProgress:
    """Shows the run while it works: a bar on a terminal, JSON lines elsewhere."""

    _INTERVAL_SECONDS = 10.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Progress | None = None
        self._shown: Counter[str] = Counter()
        self._num_units = self._num_done = 0
        self._num_candidates = self._num_candidates_done = self._num_before = 0
        self._started = self._written = time.monotonic()

    def expect(self, num_units: int, num_candidates: int, done: Sequence[ShownCounts]) -> None:
        """Takes note of how much there is to do in all, and of the units that were done before."""
        self._num_units, self._num_candidates = num_units, num_candidates
        for counts in done:
            self._add(counts)
        self._num_before = self._num_candidates_done
        self._started = time.monotonic()
        if logs.is_display(self._stream):
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bar.add_task("", total=self._num_units, completed=self._num_done, text="")
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        else:
            self._write({"event": "progress", **self.snapshot()})

    def update(self, counts: ShownCounts) -> None:
        """Counts one more unit."""
        self._add(counts)
        now = self.snapshot()
        if self._bar is not None:
            text = "".join(f"{number:,} {name} · " for name, number in self._shown.items())
            text += f"{now['candidates_per_second']:,.0f} candidates/s"
            self._bar.update(self._bar.task_ids[0], completed=self._num_done, text=text)
        elif time.monotonic() - self._written > self._INTERVAL_SECONDS:
            self._write({"event": "progress", **now})

    def snapshot(self) -> dict[str, Any]:
        """The numbers shown; `eta_seconds` is None while no speed is known."""
        seconds = time.monotonic() - self._started
        rate = (self._num_candidates_done - self._num_before) / seconds if seconds else 0.0
        left = max(0, self._num_candidates - self._num_candidates_done)
        return {
            "shards": self._num_done,
            "shards_total": self._num_units,
            **self._shown,
            "candidates_per_second": round(rate, 1),
            "eta_seconds": round(left / rate, 1) if rate else None,
        }

    def say(self, text: str) -> None:
        """Shows one line."""
        if self._bar is not None:
            self._bar.console.print(visible(text), markup=False, highlight=False)
        else:
            announce(self._stream, text)

    def _add(self, counts: ShownCounts) -> None:
        self._num_done += 1
        self._num_candidates_done += counts.num_candidates
        self._shown.update(counts.shown())

    def _write(self, event: Mapping[str, Any]) -> None:
        self._written = time.monotonic()
        logs.write(self._stream, event)
