"""What workers and driver of a training run tell each other while it goes on: an actor that both can reach.

It holds the latest figures, messages for people, and how training ended. It knows no model and no storage.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import ray

from pipelines.checkpoints import LogPoint

EndingState = Literal["done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Ending:
    """How the workers left off: after the last step, when told to stop, or for good with an error in words."""

    state: EndingState
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How far training is. Rates are of all workers, over the steps since the figures before."""

    step: int = 0
    num_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    pairs_per_second: float | None = None
    tokens_per_second: float | None = None
    num_workers: int = 0
    forward_kind: str = ""


@dataclass(frozen=True, slots=True)
class News:
    """What the driver has not heard yet."""

    figures: Figures
    messages: tuple[str, ...]
    validations: tuple[LogPoint, ...]
    ending: Ending | None


class Board:
    """The actor itself. Workers post, the driver reads; what is read is forgotten."""

    def __init__(self) -> None:
        self._news = News(Figures(), (), (), None)
        self._stop = False
        self._errors: set[str] = set()

    def post(self, figures: Figures) -> bool:
        """Takes the latest figures; says whether training is to stop."""
        self._news = replace(self._news, figures=figures)
        return self._stop

    def say(self, message: str) -> None:
        self._news = replace(self._news, messages=(*self._news.messages, message))

    def validated(self, point: LogPoint) -> None:
        """Takes a row for the table of validations."""
        self._news = replace(self._news, validations=(*self._news.validations, point))

    def end(self, ending: Ending) -> None:
        """The first ending counts."""
        if self._news.ending is None:
            self._news = replace(self._news, ending=ending)

    def comes_again(self, error: str) -> bool:
        """Takes an error of a worker, with its place; says whether that was there before."""
        is_known = error in self._errors
        self._errors.add(error)
        return is_known

    def ending(self) -> Ending | None:
        return self._news.ending

    def read(self) -> News:
        news = self._news
        self._news = replace(news, messages=(), validations=())
        return news

    def stop(self) -> None:
        """Wishes training to stop after the step that it is in."""
        self._stop = True


def start() -> Any:
    """A board on the driver's own node, which goes with the driver."""
    node = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(Board).remote()
