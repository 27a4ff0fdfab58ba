"""Shows a training run while it works: a bar and a growing table on a terminal, JSON lines elsewhere.

It is told of figures and validations, and knows nothing of storage, Ray or models.
"""

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crossenc.evaluation.metrics import display_name
from pipelines import logs
from pipelines.checkpoints import LogPoint
from pipelines.progress import announce, visible
from pipelines.train_board import Figures

_INTERVAL_SECONDS = 10.0


class TrainProgress:
    """A context manager; what it shows last is the state at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Progress | None = None
        self._phase = "preparing data"
        self._done = self._total = 0
        self._figures = Figures()
        self._first: tuple[float, int] | None = None
        self._written = -math.inf

    def __enter__(self) -> Self:
        if logs.is_display(self._stream):
            columns = (
                TextColumn("{task.fields[phase]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._bar.add_task("", total=None, phase=self._phase, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        else:
            self._write({"event": "progress", **self.snapshot()})

    def prepared(self, num_parts_done: int, num_parts: int, text: str) -> None:
        """Takes how far the preparation of data is."""
        self._phase, self._done, self._total = "preparing data", num_parts_done, num_parts
        self._show(text)

    def trained(self, figures: Figures) -> None:
        """Takes how far training is."""
        if figures.step != self._figures.step or self._phase != "training":
            self._figures = figures
            self._phase, self._done, self._total = "training", figures.step, figures.num_steps
            if self._first is None or figures.step < self._first[1]:  # begun, or begun again
                self._first = time.monotonic(), figures.step
            self._show(_figures_in_words(figures))

    def validated(self, point: LogPoint) -> None:
        """Shows a row of the table of validations."""
        shown = {display_name(name).replace("_", " "): value for name, value in _measures(point).items()}
        values = " · ".join(f"{name} {value:.4f}" for name, value in shown.items())
        if logs.is_display(self._stream):
            self.say(f"epoch {point.epoch:.2f} · step {point.step:,} · {values}")
        else:
            measures = {name: value if math.isfinite(value) else None for name, value in _measures(point).items()}
            self._write({"event": "validation", "epoch": point.epoch, "step": point.step, **measures})

    def say(self, text: str) -> None:
        """Shows one line."""
        if self._bar is not None:
            self._bar.console.print(visible(text), markup=False, highlight=False)
        else:
            announce(self._stream, text)

    def snapshot(self) -> dict[str, Any]:
        """The numbers shown; `eta_seconds` is None while no speed is known."""
        figures, now = self._figures, time.monotonic()
        done = figures.step - self._first[1] if self._first else 0
        seconds = now - self._first[0] if self._first else 0.0
        left = figures.num_steps - figures.step
        return {
            "phase": self._phase,
            "done": self._done,
            "total": self._total,
            "epoch": round(figures.epoch, 3),
            "loss": _finite(figures.loss),
            "learning_rate": figures.learning_rate,
            "pairs_per_second": _finite(figures.pairs_per_second),
            "tokens_per_second": _finite(figures.tokens_per_second),
            "workers": figures.num_workers,
            "eta_seconds": round(left * seconds / done, 1) if done and seconds else None,
        }

    @property
    def place(self) -> tuple[str, int]:
        """How far the run is: what it is at, and the parts or steps of it that are done."""
        return self._phase, self._done

    def _show(self, text: str) -> None:
        if self._bar is not None:
            task = self._bar.task_ids[0]
            if self._bar.tasks[0].fields["phase"] != self._phase:
                self._bar.reset(task)
            self._bar.update(task, total=self._total, completed=self._done, phase=self._phase, text=text)
        elif time.monotonic() - self._written > _INTERVAL_SECONDS:
            self._written = time.monotonic()
            self._write({"event": "progress", **self.snapshot()})

    def _write(self, event: Mapping[str, Any]) -> None:
        logs.write(self._stream, event)


def _measures(point: LogPoint) -> dict[str, float]:
    return {name: value for name, value in point.values.items() if name != "seconds"}


def _figures_in_words(figures: Figures) -> str:
    parts = [f"epoch {figures.epoch:.2f}"]
    if figures.loss is not None:
        parts.append(f"loss {figures.loss:.4f}")
    if figures.learning_rate is not None:
        parts.append(f"learning rate {figures.learning_rate:.2e}")
    if figures.pairs_per_second is not None and figures.tokens_per_second is not None:
        parts.append(f"{figures.pairs_per_second:,.0f} pairs/s · {figures.tokens_per_second:,.0f} tokens/s")
    return " · ".join(parts)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
