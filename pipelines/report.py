"""The report of a finished run: one HTML page without scripts and without anything loaded from elsewhere.

It turns a RunSummary into text and knows nothing of storage, Ray or models. Equal summaries give equal pages.
What comes from data (ids, paths, reasons) stays text: control characters are shown as escapes, jinja escapes
the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan

import numpy as np
from markupsafe import Markup

from crossenc.evaluation.metrics import display_name
from pipelines.pages import (
    FULL_INCHES,
    HALF_INCHES,
    SERIES,
    figure_style,
    load_template,
    new_axes,
    p_value,
    signed,
    to_svg,
    unit,
)
from pipelines.records import LENGTH_EDGES, MeasureComparison, RunSummary, StageSeconds

#: A difference is called better or worse when the randomisation test's p is below this.
_ALPHA = 0.05
_MOST_TIME_BINS = 60


def render(summary: RunSummary) -> str:
    """The page as one string. Works with nothing scored, with a single shard and without timings."""
    return load_template("report.html.jinja").render(
        summary=summary,
        counts=summary.counts,
        rates=rates(summary),
        num_refused=sum(summary.counts.refused.values()),
        refused=sorted(summary.counts.refused.items(), key=lambda item: (-item[1], item[0])),
        tracks=_tracks(summary.evaluation),
        stages=_stages(summary.seconds),
        figures=_figures(summary),
        verdict=verdict,
        sentence=sentence,
        p_value=p_value,
    )


def verdict(comparison: MeasureComparison) -> str:
    """One of "better", "worse", "no significant difference" and "too few queries to tell"."""
    if isnan(comparison.p_randomisation):
        return "too few queries to tell"
    if comparison.p_randomisation >= _ALPHA:
        return "no significant difference"
    return "better" if comparison.after > comparison.before else "worse"


def sentence(comparison: MeasureComparison) -> str:
    """A comparison in words, for example `MRR@10 .476 → .815, +.339 [.300, .377], better ...: better`."""
    c = comparison
    change = f"{unit(c.before)} → {unit(c.after)}, {signed(c.after - c.before)}"
    interval = "" if isnan(c.low) else f" [{unit(c.low)}, {unit(c.high)}]"
    queries = f"better on {c.num_better:,} {'query' if c.num_better == 1 else 'queries'}, worse on {c.num_worse:,}"
    tested = "" if isnan(c.p_randomisation) else f", {p_value(c.p_randomisation)}"
    return f"{display_name(c.measure)} {change}{interval}, {queries}{tested}: {verdict(c)}"


def rates(summary: RunSummary) -> tuple[float, float] | None:
    """Pairs and tokens per second of this process, or None when no timing is known.

    A resumed run's shards may be older than the process, so only those that finished within its time count.
    Tokens are estimated by the mean length of the run's pairs.
    """
    if not summary.throughput or summary.elapsed_seconds <= 0 or not summary.counts.num_scored:
        return None
    last = max(finished_at for finished_at, _ in summary.throughput)
    pairs = sum(pairs for at, pairs in summary.throughput if at >= last - summary.elapsed_seconds)
    pairs_per_second = pairs / summary.elapsed_seconds
    return pairs_per_second, pairs_per_second * summary.counts.num_tokens / summary.counts.num_scored


def _tracks(evaluation: Sequence[MeasureComparison]) -> list[Mapping[str, float] | None]:
    """Where each interval, its mean and zero lie on a scale common to all measures, in percent."""
    known = [c for c in evaluation if not isnan(c.low)]
    low = min([0.0, *(c.low for c in known)])
    span = max([0.0, *(c.high for c in known)]) - low or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * (value - low) / span, 2)

    return [
        None
        if isnan(c.low)
        else {"zero": place(0), "low": place(c.low), "mean": place(c.after - c.before), "high": place(c.high)}
        for c in evaluation
    ]


def _stages(seconds: StageSeconds) -> list[tuple[str, float, float]]:
    """(stage, seconds, percent of all stages) for each stage; empty when nothing was timed."""
    stages = list(asdict(seconds).items())
    total = sum(spent for _, spent in stages)
    return [(name, spent, round(100 * spent / total, 2)) for name, spent in stages] if total else []


def _figures(summary: RunSummary) -> dict[str, Markup]:
    """The figures that there is data for, by name, as inline SVG."""
    figures: dict[str, Markup] = {}
    with figure_style():
        if sum(summary.counts.score_histogram):
            figures["scores"] = _score_figure(summary.counts.score_histogram, summary.score_range)
        if sum(summary.counts.length_histogram):
            figures["lengths"] = _length_figure(summary.counts.length_histogram)
        if len({finished_at for finished_at, _ in summary.throughput}) > 1:
            figures["throughput"] = _throughput_figure(summary)
    return figures


def _score_figure(histogram: Sequence[int], score_range: tuple[float, float]) -> Markup:
    edges = np.linspace(*score_range, len(histogram) + 1)
    figure, axes = new_axes(HALF_INCHES, x_label="model score", y_label="pairs")
    axes.bar(edges[:-1], histogram, width=np.diff(edges), align="edge", color=SERIES, linewidth=0)
    axes.set_xlim(*score_range)
    return to_svg(figure, "Histogram of model scores")


def _length_figure(histogram: Sequence[int]) -> Markup:
    names = [*map(str, LENGTH_EDGES), "more"]
    filled = np.flatnonzero(histogram)
    shown = slice(int(filled[0]), int(filled[-1]) + 1)
    figure, axes = new_axes(HALF_INCHES, x_label="tokens in the pair, up to", y_label="pairs")
    places = range(len(histogram))[shown]
    axes.bar(places, histogram[shown], width=0.82, color=SERIES, linewidth=0)
    axes.set_xticks(places, names[shown])
    axes.set_xlim(places[0] - 0.7, places[-1] + 0.7)
    return to_svg(figure, "Histogram of pair lengths in tokens")


def _throughput_figure(summary: RunSummary) -> Markup:
    """Pairs per second over time; a shard's pairs count where it finished."""
    finished_at, pairs = (np.array(column, dtype=np.float64) for column in zip(*summary.throughput, strict=True))
    end = finished_at.max()
    start = min(finished_at.min(), end - summary.elapsed_seconds)
    num_bins = min(max(len(pairs) // 4, 1), _MOST_TIME_BINS)
    in_bin, edges = np.histogram(finished_at - start, bins=num_bins, range=(0, end - start), weights=pairs)
    seconds_per_unit, unit_name = next(
        (size, name)
        for size, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if end - start >= 3 * size or size == 1
    )
    figure, axes = new_axes(FULL_INCHES, x_label=f"{unit_name} since the start", y_label="pairs per second")
    per_second = in_bin / np.diff(edges)
    axes.stairs(per_second, edges / seconds_per_unit, fill=True, color=SERIES, alpha=0.25, linewidth=0)
    axes.stairs(per_second, edges / seconds_per_unit, baseline=None, color=SERIES, linewidth=1.5)
    axes.set_xlim(0, edges[-1] / seconds_per_unit)
    return to_svg(figure, "Pairs per second over time")
