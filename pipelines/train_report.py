"""The report of a training run: one HTML page without scripts and without anything loaded from elsewhere.

It turns a TrainSummary into text and knows nothing of storage, Ray or models. Equal summaries give equal pages.
What comes from data and settings stays text. Settings are shown as they are given: secrets must be out of them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from crossenc.evaluation.metrics import display_name
from crossenc.loop.lists import LabelStatistics
from pipelines.checkpoints import LogPoint
from pipelines.pages import (
    FULL_INCHES,
    HALF_INCHES,
    INK,
    MINUS,
    MUTED,
    SECOND_SERIES,
    SERIES,
    UNKNOWN,
    compact,
    figure_style,
    load_template,
    new_axes,
    share,
    signed,
    to_svg,
    unit,
)
from pipelines.progress import visible
from pipelines.train_logs import TRAINING_LOSS, VALIDATION_LOSS, measure_names, one_a_step

#: A curve with more points than this is drawn by the means of neighbours.
_MOST_POINTS = 600
#: matplotlib's sums overflow near the largest float, and so large a figure would flatten the curve anyway.
_LARGEST_DRAWN = 1e30
_MOST_MEASURES_DRAWN = 2
#: Curves with fewer points have them marked.
_FEW_POINTS = 40
#: The name of the figure, of the curve on it, and of what it is of.
_CURVES = (
    ("loss", TRAINING_LOSS, "training loss"),
    ("validation_loss", VALIDATION_LOSS, "validation loss"),
    ("learning_rate", "learning_rate", "learning rate"),
    ("gradient_norm", "gradient_norm", "gradient norm"),
    ("pairs", "pairs_per_second", "pairs per second"),
    ("tokens", "tokens_per_second", "tokens per second"),
)
#: Figures in which the best step is marked.
_VALIDATED = {"loss", "validation_loss", "measures"}

#: Steps and values.
_Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What a side, training or validation, read. `refused` counts rows and documents by reason.

    Where both sides are one input, its refused rows stand with the training data.
    """

    num_rows: int
    num_lists: int
    num_pairs: int
    num_tokens: int
    refused: Mapping[str, int]
    statistics: LabelStatistics | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """A training run, as its report shows it.

    `measure` is what the best checkpoint was chosen by: a name in the logs' values, "validation loss", or "" where
    nothing was validated. A point of `logs` may have the keys of pipelines.train_logs.TRAINING_FIGURES,
    "validation_loss", and measures by name; step 0 is before training. `settings` are plain values, without secrets.
    """

    model_name: str
    output: str
    num_steps: int
    num_epochs: int
    best_step: int
    measure: str
    logs: tuple[LogPoint, ...]
    settings: Mapping[str, Any]
    loss_name: str
    loss_parameters: Mapping[str, Any]
    forward_kind: str
    warnings: tuple[str, ...]
    num_workers: int
    seconds: float
    train: DataSummary
    validation: DataSummary | None
    lineage: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of validation before training, at the best step and at the last one; None where it is not known.

    `by` is best less before.
    """

    key: str
    before: float | None
    best: float | None
    last: float | None

    @property
    def by(self) -> float | None:
        return None if self.before is None or self.best is None else self.best - self.before

    @property
    def verdict(self) -> str:
        """One of "better", "worse", "the same", and "" where that cannot be told."""
        if self.by is None or isnan(self.by):
            return ""
        gain = -self.by if self.key == VALIDATION_LOSS else self.by
        return "better" if gain > 0 else "worse" if gain < 0 else "the same"


def render(summary: TrainSummary) -> str:
    """The page as one string. Works without validation, with a single point, and with none."""
    points = one_a_step(summary.logs)
    changes = _changes(summary, points)
    measures = measure_names(points, first=summary.measure)
    sides = [side for side in (summary.train, summary.validation) if side is not None]
    return load_template("train_report.html.jinja").render(
        summary=summary,
        headline=headline(summary),
        first=changes[0] if changes and changes[0].best is not None else None,
        changes=changes,
        figure=figure,
        difference=_difference,
        name=_name,
        rates={key: _mean(points, f"{key}_per_second") for key in ("pairs", "tokens")},
        columns=[*([VALIDATION_LOSS] if _has(points, VALIDATION_LOSS) else []), *measures],
        validations=_validations(points),
        data=list(zip(*(_data_rows(side) for side in sides), strict=True)),
        refused=_refused(sides),
        settings=flat(summary.settings),
        loss_parameters=flat(summary.loss_parameters),
        figures=_figures(points, summary, measures),
        hidden={name: _num_hidden(points, [key]) for name, key, _ in _CURVES}
        | {"measures": _num_hidden(points, measures[:_MOST_MEASURES_DRAWN])},
        lineage=sorted(summary.lineage.items()),
    )


def headline(summary: TrainSummary) -> str:
    """The outcome in words: which checkpoint was kept, and what became better or worse than before training."""
    points = one_a_step(summary.logs)
    epoch = next((point.epoch for point in points if point.step == summary.best_step), None)
    place = f"step {summary.best_step:,} of {summary.num_steps:,}"
    place += "" if epoch is None else f", epoch {epoch:.2f} of {summary.num_epochs:,}"
    if not summary.measure:
        losses = [figure(TRAINING_LOSS, p.values[TRAINING_LOSS]) for p in points if TRAINING_LOSS in p.values]
        fell = f"; training loss {losses[0]} → {losses[-1]}" if len(losses) > 1 else ""
        return f"Kept: {place}, the last one, as nothing was validated{fell}"
    first = _changes(summary, points)[0]
    shown = [_name(first.key), figure(first.key, first.best)]
    if first.before is None:
        return f"Best: {place}, {' '.join(shown)}; before training was not measured"
    shown[1:] = [figure(first.key, first.before), "→", figure(first.key, first.best)]
    by = f", {_difference(first)}" if first.by is not None and isfinite(first.by) else ""
    return f"Best: {place}, {' '.join(shown)}{by}" + (f": {first.verdict}" if first.verdict else "")


def figure(key: str, value: float | None) -> str:
    """A figure of the log: losses and the like with four decimals, measures with three, NaN as NaN."""
    if value is None:
        return UNKNOWN
    if not isfinite(value):
        return "NaN" if isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    if key not in (TRAINING_LOSS, VALIDATION_LOSS):
        return unit(value)
    text = f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return text.replace("-", MINUS)


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (name, value) by name: those inside others as `workers.count`, values as in YAML or JSON."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return sorted(rows)


def _name(key: str) -> str:
    return "validation loss" if key == VALIDATION_LOSS else display_name(key)


def _difference(change: Change) -> str:
    if change.by is None or not isfinite(change.by):
        return UNKNOWN
    if change.key != VALIDATION_LOSS:
        return signed(change.by)
    text = figure(change.key, change.by)
    return text if change.by <= 0 else f"+{text}"


def _changes(summary: TrainSummary, points: Sequence[LogPoint]) -> list[Change]:
    """What validation found before, at the best step and at last: first what the best was chosen by."""
    if not summary.measure:
        return []
    chosen = VALIDATION_LOSS if summary.measure == "validation loss" else summary.measure
    keys = [chosen, *(key for key in (*measure_names(points), VALIDATION_LOSS) if key != chosen and _has(points, key))]
    found = {point.step: point.values for point in points}
    last = max((point.step for point in points if _is_validation(point)), default=-1)
    steps = (0, summary.best_step, last)
    return [Change(key, *(found.get(step, {}).get(key) for step in steps)) for key in keys]


def _has(points: Sequence[LogPoint], key: str) -> bool:
    return any(key in point.values for point in points)


def _is_validation(point: LogPoint) -> bool:
    return VALIDATION_LOSS in point.values or bool(measure_names([point]))


def _validations(points: Sequence[LogPoint]) -> list[tuple[LogPoint, float | None]]:
    """The points at which validation ran, each with the training loss that was the newest then."""
    rows: list[tuple[LogPoint, float | None]] = []
    newest: float | None = None
    for point in points:
        newest = point.values.get(TRAINING_LOSS, newest)
        if _is_validation(point):
            rows.append((point, newest))
    return rows


def _mean(points: Sequence[LogPoint], key: str) -> float | None:
    found = [value for point in points if isfinite(value := point.values.get(key, np.nan))]
    return float(np.mean(found)) if found else None


def _data_rows(side: DataSummary) -> list[tuple[str, str]]:
    """(what, how many) of one side; of every side the same rows."""
    labels = side.statistics
    rows = [(name, f"{getattr(side, f'num_{name.lower()}'):,}") for name in ("Rows", "Lists", "Pairs", "Tokens")]
    rows.append(("Pairs in a list, mean", _ratio(side.num_pairs, side.num_lists)))
    rows.append(("Tokens in a pair, mean", _ratio(side.num_tokens, side.num_pairs)))
    described = ("Labels", "Distinct labels", "Pairs with a label above 0", "Lists whose labels are all equal")
    if labels is None or not side.num_pairs:
        return rows + [(name, UNKNOWN) for name in described]
    values = (
        f"{labels.minimum:.4g} to {labels.maximum:.4g}, mean {labels.mean:.4g}".replace("-", MINUS),
        "10 or more" if labels.num_distinct >= 10 else str(labels.num_distinct),
        f"{labels.num_positive:,} ({share(labels.num_positive, side.num_pairs)})",
        f"{labels.num_single_label_lists:,} ({share(labels.num_single_label_lists, labels.num_lists)})",
    )
    return rows + list(zip(described, values, strict=True))


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:,.1f}" if whole else UNKNOWN


def _refused(sides: Sequence[DataSummary]) -> list[tuple[str, list[int]]]:
    """(reason, number of each side), the most frequent first."""
    reasons = {reason for side in sides for reason in side.refused}
    rows = [(reason, [side.refused.get(reason, 0) for side in sides]) for reason in reasons]
    return sorted(rows, key=lambda row: (-sum(row[1]), row[0]))


def _figures(points: Sequence[LogPoint], summary: TrainSummary, measures: Sequence[str]) -> dict[str, Markup]:
    """The figures that there are points for, by name, as inline SVG. All have the same scale of steps."""
    last_step = max([1, summary.num_steps, *(point.step for point in points)])
    best_step = summary.best_step if summary.measure else None
    curves = {name: {label: _curve(points, key)} for name, key, label in _CURVES}
    curves["measures"] = {display_name(key): _curve(points, key) for key in measures[:_MOST_MEASURES_DRAWN]}
    with figure_style():
        return {
            name: _figure(shown, last_step, best_step if name in _VALIDATED else None, name)
            for name, found in curves.items()
            if (shown := {label: curve for label, curve in found.items() if len(curve[0])})
        }


def _figure(curves: Mapping[str, _Curve], last_step: int, best_step: int | None, name: str) -> Markup:
    """Curves by their labels, over steps."""
    width_inches = FULL_INCHES if name == "loss" else HALF_INCHES
    drawing, axes = new_axes(width_inches, x_label="step", y_label="", counts=False)
    for (steps, values), colour in zip(curves.values(), (SERIES, SECOND_SERIES), strict=False):
        marker = "o" if len(steps) < _FEW_POINTS else ""
        axes.plot(_thinned(steps), _thinned(values), color=colour, linewidth=1.5, marker=marker, markersize=4)
    if len(curves) > 1:
        legend = axes.legend(axes.lines, [visible(label) for label in curves], frameon=False, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name is no formula
    if name not in _VALIDATED - {"loss"} and all((values >= 0).all() for _, values in curves.values()):
        axes.set_ylim(bottom=0)
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    if best_step is not None:
        axes.axvline(best_step, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        above = axes.get_xaxis_transform()  # steps across, parts of the height upwards
        axes.text(best_step, 1.03, f"best: step {best_step:,}", transform=above, ha="center", color=MUTED)
    return to_svg(drawing, f"{' and '.join(curves)} over steps")


def _curve(points: Sequence[LogPoint], key: str) -> _Curve:
    """Steps and values, those that can be drawn.

    The validation loss before training would flatten the rest of its curve, and is left out where there is a rest.
    """
    known = [(point.step, point.values[key]) for point in points if key in point.values]
    if key == VALIDATION_LOSS and len(known) > 2:
        known = [(step, value) for step, value in known if step > 0]
    drawn = [(step, value) for step, value in known if _can_be_drawn(value)]
    steps, values = np.array(drawn, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _num_hidden(points: Sequence[LogPoint], keys: Sequence[str]) -> int:
    """Points that no curve can show."""
    values = [point.values[key] for point in points for key in keys if key in point.values]
    return sum(not _can_be_drawn(value) for value in values)


def _can_be_drawn(value: float) -> bool:
    return abs(value) < _LARGEST_DRAWN  # which NaN is not


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(values) <= _MOST_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, _MOST_POINTS)])
