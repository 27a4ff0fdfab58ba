"""The log of a training run as others read it: one point a step, validations told apart, rows for the model card.

Plain data: knows no storage and no training.
"""

from collections.abc import Sequence

from crossenc.card import LogRow
from crossenc.evaluation.metrics import display_name
from pipelines.checkpoints import LogPoint

TRAINING_LOSS, VALIDATION_LOSS = "loss", "validation_loss"
#: What training says of its own steps. Every other figure of a point is what validation found.
TRAINING_FIGURES = (
    TRAINING_LOSS,
    "learning_rate",
    "gradient_norm",
    "pairs_per_second",
    "tokens_per_second",
    "seconds",
)


def one_a_step(logs: Sequence[LogPoint]) -> list[LogPoint]:
    """The points by step, those of one step as one; where they disagree, the later one in `logs` counts."""
    points: dict[int, LogPoint] = {}
    for point in logs:
        before = points[point.step].values if point.step in points else {}
        points[point.step] = LogPoint(point.step, point.epoch, {**before, **point.values})
    return [points[step] for step in sorted(points)]


def measure_names(logs: Sequence[LogPoint], first: str = "") -> list[str]:
    """The measures that validation found, by name, but `first` before all others."""
    names = {name for point in logs for name in point.values} - {*TRAINING_FIGURES, VALIDATION_LOSS}
    return sorted(names, key=lambda name: (name != first, name.lower(), name))


def card_logs(logs: Sequence[LogPoint]) -> list[LogRow]:
    """Rows of a model card's table of logs: losses and measures by step, without speeds and settings of steps."""
    columns = {TRAINING_LOSS: "Training Loss", VALIDATION_LOSS: "Validation Loss"}
    columns |= {name: display_name(name) for name in measure_names(logs)}
    rows = [
        LogRow(point.epoch, point.step, {columns[name]: point.values[name] for name in columns if name in point.values})
        for point in one_a_step(logs)
    ]
    return [row for row in rows if row.values]
