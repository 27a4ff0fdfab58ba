"""The report of an evaluation: one HTML page that says which system is better, where, and on which queries it fails.

It turns an Evaluation into text and knows nothing of storage, Ray or models. Equal evaluations give equal pages; texts
of queries and documents are data and stay text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from crossenc.evaluation.metrics import display_name
from crossenc.evaluation.results import (
    FIRST_STAGE,
    CollectionResult,
    Difference,
    Evaluation,
    SegmentFigure,
    SystemResult,
)
from pipelines.evaluation_losses import Loss
from pipelines.pages import (
    FULL_INCHES,
    HALF_INCHES,
    LINE,
    MANY_SERIES,
    MUTED,
    figure_style,
    load_template,
    new_axes,
    p_value,
    signed,
    to_svg,
    unit,
)

#: A difference is called better or worse when Holm's corrected p is below this.
_ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything that report.html shows. `differences` are collection -> system -> of each query, to the baseline."""

    evaluation: Evaluation
    differences: Mapping[str, Mapping[str, Sequence[float]]]
    losses: tuple[Loss, ...]
    output: str
    inputs: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, str]


def render(page: Page) -> str:
    """The page as one string."""
    found = page.evaluation
    names = list(dict.fromkeys(system.system for one in found.collections for system in one.systems))
    with figure_style():
        figures = {one.collection: _figures(one, page, _colours(names)) for one in found.collections}
    return load_template("evaluation.html.jinja").render(
        page=page,
        evaluation=found,
        main=found.measures[0],
        names=names,
        means=_means(found, names),
        figures=figures,
        losses=_by_system(page.losses),
        p=lambda value: p_value(nan if value is None else value),
        verdict=verdict,
        sentence=sentence,
        depth_words=depth_words,
        segment_rows=segment_rows,
        title=_title,
        the=lambda name: "the first stage" if name == FIRST_STAGE else name,
    )


def verdict(difference: Difference | None) -> str:
    """One of "better", "worse", "no significant difference" and "too few queries to tell"; empty for no comparison."""
    if difference is None:
        return ""
    if difference.p_holm is None:
        return "too few queries to tell"
    if difference.p_holm >= _ALPHA:
        return "no significant difference"
    return "better" if difference.mean > 0 else "worse"


def sentence(measure: str, system: SystemResult, baseline: SystemResult) -> str:
    """The main result of a system in words, with its interval and what the test says."""
    figure = system.figure(measure)
    change = figure.difference
    if change is None:
        return f"{display_name(measure)} {unit(figure.value.mean)}"
    interval = "" if change.low is None or change.high is None else f" [{unit(change.low)}, {unit(change.high)}]"
    before = baseline.figure(measure).value.mean
    return (
        f"{display_name(measure)} {unit(before)} → {unit(figure.value.mean)}, {signed(change.mean)}{interval}: better"
        f" on {change.num_better:,}, worse on {change.num_worse:,} queries, {verdict(change)}"
    )


def depth_words(system: SystemResult) -> str:
    """What a system's depths say: whether it beats the first stage at each, and where more is worse."""
    best = max(system.depths, key=lambda point: point.mean)
    deepest = system.depths[-1]
    losing = [point for point in system.depths if point.difference.mean < 0]
    words = "beats the first stage at every depth"
    if losing:
        depths = ", ".join(f"{point.depth:,}" for point in losing)
        words = f"is below the first stage when it orders the top {depths}"
    elif any(point.difference.mean == 0 for point in system.depths):
        words = "is not below the first stage at any depth"
    if best.mean > deepest.mean:
        words += f"; best at the top {best.depth:,}, and {unit(best.mean - deepest.mean)} lower at the deepest"
    return words


def segment_rows(collection: CollectionResult) -> list[tuple[SegmentFigure, list[SegmentFigure]]]:
    """Each segment, as the first system has it, with the figures of all systems."""
    return [(figures[0], list(figures)) for figures in zip(*(s.segments for s in collection.systems), strict=True)]


def _means(found: Evaluation, names: Sequence[str]) -> dict[str, float | None]:
    """Each system's main measure, averaged over the collections; None where it is not on all of them."""
    means: dict[str, float | None] = {}
    for name in names:
        values = [
            system.figures[0].value.mean for one in found.collections for system in one.systems if system.system == name
        ]
        means[name] = sum(values) / len(values) if len(values) == len(found.collections) else None
    return means


def _by_system(losses: Sequence[Loss]) -> dict[tuple[str, str], list[Loss]]:
    grouped: dict[tuple[str, str], list[Loss]] = {}
    for loss in losses:
        grouped.setdefault((loss.collection, loss.system), []).append(loss)
    return grouped


def _colours(names: Sequence[str]) -> dict[str, str]:
    """The first stage in grey, the others in colours that can be told apart, as far as there are any."""
    others = [name for name in names if name != FIRST_STAGE]
    return {FIRST_STAGE: MUTED} | {name: MANY_SERIES[number % len(MANY_SERIES)] for number, name in enumerate(others)}


def _figures(collection: CollectionResult, page: Page, colours: Mapping[str, str]) -> dict[str, Markup]:
    """The figures that there is data for, by name, as inline SVG."""
    name, measure = collection.collection, display_name(page.evaluation.measures[0])
    figures = {"means": _means_figure(collection, measure, colours)}
    if any(system.depths for system in collection.systems):
        figures["depths"] = _depths_figure(collection, measure, colours)
    differences = {
        system: values for system, values in page.differences[name].items() if system != page.evaluation.baseline
    }
    if differences:
        figures["differences"] = _differences_figure(name, differences, measure, colours)
    return figures


def _means_figure(collection: CollectionResult, measure: str, colours: Mapping[str, str]) -> Markup:
    """Each system's mean with its interval, one below the other."""
    figure, axes = new_axes(HALF_INCHES, x_label=measure, y_label="mean and 95 % interval")
    figure.set_figheight(max(1.5, 0.7 + 0.34 * len(collection.systems)))
    for place, system in enumerate(collection.systems):
        value = system.figures[0].value
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [place, place], color=colours[system.system], linewidth=2.2, alpha=0.6)
        axes.plot([value.mean], [place], "o", color=colours[system.system], markersize=6)
    axes.set_yticks(range(len(collection.systems)), [_title(system.system) for system in collection.systems])
    axes.set_ylim(len(collection.systems) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return to_svg(figure, f"Mean {measure} of each system on {collection.collection}")


def _depths_figure(collection: CollectionResult, measure: str, colours: Mapping[str, str]) -> Markup:
    """The main measure by depth, and the first stage's as a line."""
    figure, axes = new_axes(HALF_INCHES, x_label="documents that the system orders, from the top", y_label=measure)
    first = collection.system(FIRST_STAGE).figures[0].value.mean
    axes.axhline(first, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    systems = [system for system in collection.systems if system.depths]
    for system in systems:
        means = [point.mean for point in system.depths]
        depths = [point.depth for point in system.depths]
        axes.plot(depths, means, "o-", color=colours[system.system], linewidth=1.6, markersize=4.5)
    depths = sorted({point.depth for system in systems for point in system.depths})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(depths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(depths[0] * 0.85, depths[-1] * 1.18)
    _measured(axes)
    return to_svg(figure, f"{measure} by depth on {collection.collection}")


def _differences_figure(
    collection: str, differences: Mapping[str, Sequence[float]], measure: str, colours: Mapping[str, str]
) -> Markup:
    """The differences of all queries to the baseline, the largest gain first: where it crosses 0, losses begin."""
    figure, axes = new_axes(FULL_INCHES, x_label="queries, the largest gain first", y_label=f"change of {measure}")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for system, values in differences.items():
        falling = np.sort(np.array(values))[::-1]
        edges = np.arange(len(falling) + 1)
        axes.stairs(falling, edges, baseline=None, color=colours[system], linewidth=1.6)
        if len(differences) == 1:
            axes.stairs(falling, edges, fill=True, color=colours[system], alpha=0.2, linewidth=0)
    axes.set_xlim(0, max(map(len, differences.values())))
    _measured(axes)
    return to_svg(figure, f"Change of {measure} by query on {collection}")


def _measured(axes: Axes) -> None:
    """Ticks of a measure, as the tables write it."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))


def _title(name: str) -> str:
    return "First stage" if name == FIRST_STAGE else name
