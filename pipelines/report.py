"""The report of a finished run: one HTML page without scripts and without anything loaded from elsewhere.

It turns a RunSummary into text and knows nothing of storage, Ray or models. Equal summaries give equal pages.
What comes from data (ids, paths, reasons) stays text: control characters are shown as escapes, jinja escapes
the rest.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from math import isnan

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from crossenc.evaluation.metrics import display_name
from pipelines.progress import visible
from pipelines.records import LENGTH_EDGES, MeasureComparison, RunSummary, StageSeconds

#: A difference is called better or worse when the randomisation test's p is below this.
_ALPHA = 0.05
#: Colours that the figures are drawn in, and the page's variables that replace them: light and dark need
#: other ones.
_COLOURS = {
    "#101010": "var(--ink)",
    "#606060": "var(--muted)",
    "#d0d0d0": "var(--line)",
    "#3060d0": "var(--series)",
}
_INK, _MUTED, _LINE, _SERIES = _COLOURS
#: Figures are drawn in points and scaled to the page: a half figure is this wide, a full one twice that and
#: the gap.
_HALF_INCHES, _FULL_INCHES = 5.6, 11.5
_MOST_TIME_BINS = 60
#: A minus sign as wide as a plus, and a dash for what is not known.
_MINUS, _UNKNOWN = "\N{MINUS SIGN}", "\N{EN DASH}"


def render(summary: RunSummary) -> str:
    """The page as one string. Works with nothing scored, with a single shard and without timings."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "rate": _rate,
        "duration": _duration,
        "measure": display_name,
        "unit": _unit,
        "signed": _signed,
    }
    environment.globals |= {
        "share": _share,
        "verdict": verdict,
        "sentence": sentence,
        "p_value": _p_value,
        "unknown": _UNKNOWN,
    }
    template = resources.files("pipelines").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        summary=summary,
        counts=summary.counts,
        rates=_rates(summary),
        num_refused=sum(summary.counts.refused.values()),
        refused=sorted(summary.counts.refused.items(), key=lambda item: (-item[1], item[0])),
        tracks=_tracks(summary.evaluation),
        stages=_stages(summary.seconds),
        figures=_figures(summary),
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
    change = f"{_unit(c.before)} → {_unit(c.after)}, {_signed(c.after - c.before)}"
    interval = "" if isnan(c.low) else f" [{_unit(c.low)}, {_unit(c.high)}]"
    queries = f"better on {c.num_better:,} {'query' if c.num_better == 1 else 'queries'}, worse on {c.num_worse:,}"
    tested = "" if isnan(c.p_randomisation) else f", {_p_value(c.p_randomisation)}"
    return f"{display_name(c.measure)} {change}{interval}, {queries}{tested}: {verdict(c)}"


def _unit(value: float) -> str:
    """Three decimals without the leading zero, as measures between 0 and 1 are usually printed."""
    text = f"{abs(value):.3f}"
    sign = _MINUS if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0") else text)


def _signed(value: float) -> str:
    text = _unit(value)
    return text if text.startswith(_MINUS) or text == ".000" else f"+{text}"


def _p_value(p: float) -> str:
    if isnan(p):
        return _UNKNOWN
    return "p < .001" if p < 0.001 else "p > .999" if p > 0.999 else f"p = {_unit(p)}"


def _share(part: float, whole: float) -> str:
    """A percentage with one decimal; never 0.0 % of something nor 100.0 % of less than all."""
    if not whole:
        return _UNKNOWN
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= percent < 100 else f"{percent:.1f} %"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _compact(value: float, _position: int = 0) -> str:
    """An axis label: 1500 is 1.5k, 2000000 is 2M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _rates(summary: RunSummary) -> tuple[float, float] | None:
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
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 8})
        if sum(summary.counts.score_histogram):
            figures["scores"] = _score_figure(summary.counts.score_histogram, summary.score_range)
        if sum(summary.counts.length_histogram):
            figures["lengths"] = _length_figure(summary.counts.length_histogram)
        if len({finished_at for finished_at, _ in summary.throughput}) > 1:
            figures["throughput"] = _throughput_figure(summary)
    return figures


def _score_figure(histogram: Sequence[int], score_range: tuple[float, float]) -> Markup:
    edges = np.linspace(*score_range, len(histogram) + 1)
    figure, axes = _axes(_HALF_INCHES, x_label="model score", y_label="pairs")
    axes.bar(edges[:-1], histogram, width=np.diff(edges), align="edge", color=_SERIES, linewidth=0)
    axes.set_xlim(*score_range)
    return _svg(figure, "Histogram of model scores")


def _length_figure(histogram: Sequence[int]) -> Markup:
    names = [*map(str, LENGTH_EDGES), "more"]
    filled = np.flatnonzero(histogram)
    shown = slice(int(filled[0]), int(filled[-1]) + 1)
    figure, axes = _axes(_HALF_INCHES, x_label="tokens in the pair, up to", y_label="pairs")
    places = range(len(histogram))[shown]
    axes.bar(places, histogram[shown], width=0.82, color=_SERIES, linewidth=0)
    axes.set_xticks(places, names[shown])
    axes.set_xlim(places[0] - 0.7, places[-1] + 0.7)
    return _svg(figure, "Histogram of pair lengths in tokens")


def _throughput_figure(summary: RunSummary) -> Markup:
    """Pairs per second over time; a shard's pairs count where it finished."""
    finished_at, pairs = (np.array(column, dtype=np.float64) for column in zip(*summary.throughput, strict=True))
    end = finished_at.max()
    start = min(finished_at.min(), end - summary.elapsed_seconds)
    num_bins = min(max(len(pairs) // 4, 1), _MOST_TIME_BINS)
    in_bin, edges = np.histogram(finished_at - start, bins=num_bins, range=(0, end - start), weights=pairs)
    seconds_per_unit, unit = next(
        (size, name)
        for size, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if end - start >= 3 * size or size == 1
    )
    figure, axes = _axes(_FULL_INCHES, x_label=f"{unit} since the start", y_label="pairs per second")
    rates = in_bin / np.diff(edges)
    axes.stairs(rates, edges / seconds_per_unit, fill=True, color=_SERIES, alpha=0.25, linewidth=0)
    axes.stairs(rates, edges / seconds_per_unit, baseline=None, color=_SERIES, linewidth=1.5)
    axes.set_xlim(0, edges[-1] / seconds_per_unit)
    return _svg(figure, "Pairs per second over time")


def _axes(width_inches: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure with one quiet set of axes: horizontal grid lines, counts in short form, no box."""
    figure = Figure(figsize=(width_inches, 2.7), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(axis="both", length=0, labelcolor=_MUTED, pad=5)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=_INK)
    axes.set_title(y_label, color=_INK, loc="left", fontsize="medium")  # beside the axis it would need turning
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_compact))
    return figure, axes


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an inline SVG that takes its width, font and colours from the page."""
    matplotlib.rcParams["svg.hashsalt"] = label  # makes ids the same every time, and unlike other figures'
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{label}">',
        text,
        count=1,
    )
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # the same in every figure, and ids must be unique in a page
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return Markup(text)
