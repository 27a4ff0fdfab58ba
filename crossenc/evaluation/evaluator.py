"""What evaluators share: how they are called, name their metrics, keep a CSV file and tell the model card.

An evaluator is called as `evaluator(model, output_path, epoch, steps)` and returns values by metric name. It knows a
model by `predict` alone, and no framework.
"""

import csv
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crossenc.errors import InputError, ScoreError

logger = logging.getLogger(__name__)


class Predicts(Protocol):
    """What an evaluator needs of a model; CrossEncoder has it."""

    @property
    def predict(self) -> Callable[..., Any]: ...


class BaseEvaluator:
    """What an evaluator of one's own derives from; it has to define `__call__`.

    `primary_metric` names the value that decides which model is best, high being good when `greater_is_better`.
    It gets the evaluator's name as prefix with the first call, as the metrics do.
    """

    greater_is_better = True
    primary_metric: str | None = None

    def __call__(
        self, model: Any, output_path: str | Path | None = None, epoch: int = -1, steps: int = -1
    ) -> float | dict[str, float]:
        """Evaluate `model`: values by metric name, or a single value.

        A CSV row goes to `output_path` where one is given. `epoch` and `steps` say when in the training this is, -1
        being after all of it.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(model, output_path, epoch, steps)")

    @property
    def description(self) -> str:
        """The class name as words: `Cross Encoder Reranking`."""
        name = re.sub("^CE(?=[A-Z])", "CrossEncoder", type(self).__name__).split("Evaluator")[0]
        return re.sub("([a-z])([A-Z])", r"\1 \2", name)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that a model card shows."""
        return {}

    def prefix_name_to_metrics(self, metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The metrics as floats where they are numbers, with `name` and `_` before each name, if there is one.

        The primary metric, where it is one of them, gets the same prefix.
        """
        prefix = f"{name}_" if name else ""
        if self.primary_metric is not None and self.primary_metric in metrics:
            self.primary_metric = prefix + self.primary_metric
        return {prefix + key: value if isinstance(value, str) else float(value) for key, value in metrics.items()}

    def store_metrics_in_model_card_data(
        self, model: Any, metrics: Mapping[str, Any], epoch: int = 0, step: int = 0
    ) -> None:
        """Tell the model's card, where it has one."""
        card = getattr(model, "model_card_data", None)
        if card is not None:
            card.set_evaluation_metrics(self, dict(metrics), epoch, step)


class SequentialEvaluator(BaseEvaluator):
    """Several evaluators one after the other, with all their metrics together.

    `main_score_function` makes `sequential_score`, the primary metric, of the list of their primary values; the last
    one by default.
    """

    def __init__(
        self,
        evaluators: Iterable[Callable[..., Any]],
        main_score_function: Callable[[list[float]], float] = lambda scores: scores[-1],
    ) -> None:
        super().__init__()
        self.evaluators = list(evaluators)
        self.main_score_function = main_score_function
        self.primary_metric = "sequential_score"

    def __call__(
        self, model: Any, output_path: str | Path | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        results: dict[str, float] = {}
        scores: list[float] = []
        for number, evaluator in enumerate(self.evaluators):
            found = evaluator(model, output_path, epoch, steps)
            values = dict(found) if isinstance(found, Mapping) else {f"evaluator_{number}": float(found)}
            scores.append(values[getattr(evaluator, "primary_metric", None) or next(iter(values))])
            results |= values
        results["sequential_score"] = self.main_score_function(scores) if scores else 0.0
        return results


def predict(
    model: Predicts, pairs: Sequence[Sequence[str]], prompt_name: str | None, batch_size: int, show_progress_bar: bool
) -> NDArray[np.floating[Any]]:
    """The model's scores [P] or [P, L] of all pairs, by one call.

    Raises ScoreError when a score is not finite, InputError when there are no pairs.
    """
    if not len(pairs):
        raise InputError("there is nothing to evaluate: give at least one pair")
    options = {} if prompt_name is None else {"prompt_name": prompt_name}
    # Before training a new head is measured as well: what comes out then is the figure to beat.
    with getattr(model, "new_head_allowed", nullcontext)():
        scores: NDArray[np.floating[Any]] = np.asarray(
            model.predict(
                pairs, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=show_progress_bar, **options
            )
        )
    broken = ~np.isfinite(scores).reshape(len(pairs), -1).all(axis=1)
    if broken.any():
        raise ScoreError(
            f"the model gave {broken.sum()} of {len(pairs)} pairs a score that is not finite, first pair "
            f"{int(broken.argmax())}: its weights are damaged, or half precision is too narrow for it"
        )
    return scores


def single_scores(scores: NDArray[np.floating[Any]], evaluator: BaseEvaluator) -> NDArray[np.floating[Any]]:
    """The scores [P] of a model with one label; raises InputError for those of one with several."""
    if scores.ndim != 1:
        raise InputError(
            f"{type(evaluator).__name__} needs a model with one label, and this one has {scores.shape[-1]}: "
            "use CrossEncoderClassificationEvaluator"
        )
    return scores


def append_csv(output_path: str | Path | None, file_name: str, headers: Sequence[str], row: Sequence[object]) -> None:
    """Add a row to a CSV file in `output_path`, with a line of headers when the file is new. None writes nothing."""
    if output_path is None:
        return
    path = Path(output_path) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(headers)
        writer.writerow(row)


def csv_name(class_name: str, name: str, ending: str) -> str:
    """`Class_name_ending`, or `Class_ending` without a name; a name never leads to another folder."""
    return "_".join([class_name, *([re.sub(r"[/\\]", "_", name)] if name else []), ending])


def log_start(evaluator: BaseEvaluator, name: str, epoch: int, steps: int) -> None:
    """Say in the log which evaluation begins, and when in the training that is."""
    moment = "" if epoch == -1 else f" after epoch {epoch}" if steps == -1 else f" in epoch {epoch}, step {steps}"
    logger.info("%s on %s%s", type(evaluator).__name__, name or "unnamed data", moment)


def wants_progress(show_progress_bar: bool | None) -> bool:
    """`show_progress_bar`, or, when None, whether the log shows information."""
    return logger.isEnabledFor(logging.INFO) if show_progress_bar is None else show_progress_bar
