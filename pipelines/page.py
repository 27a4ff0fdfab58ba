"""What all reports share: a page without scripts and without anything loaded from elsewhere, its numbers and figures.

Equal data gives equal pages. What comes from data (ids, paths, texts) stays text: control characters are shown as
escapes, jinja escapes the rest. It knows nothing of what a page is about.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from importlib import resources
from math import isnan

import matplotlib
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from crossenc.evaluation.metrics import display_name
from pipelines.progress import visible

#: Colours that the figures are drawn in, and the page's variables that replace them: light and dark need
#: other ones.
_COLOURS = {
    "#101010": "var(--ink)",
    "#606060": "var(--muted)",
    "#d0d0d0": "var(--line)",
    "#3060d0": "var(--series)",
    **{f"#00{n}000": f"var(--stage-{n})" for n in range(1, 9)},
}
INK, MUTED, LINE, SERIES, *_ = _COLOURS
#: Eight series that can be told apart.
SERIES_COLOURS = tuple(_COLOURS)[4:]
#: Figures are drawn in points and scaled to the page: a half figure is this wide, a full one twice that and
#: the gap.
HALF_INCHES, FULL_INCHES = 5.6, 11.5
#: A minus sign as wide as a plus, and a dash for what is not known.
MINUS, UNKNOWN = "\N{MINUS SIGN}", "\N{EN DASH}"


def environment() -> Environment:
    """Where the pages' templates are rendered: everything is escaped, and numbers have the filters below."""
    folder = resources.files("pipelines")
    made = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters["count"] = lambda number: f"{number:,}"
    made.filters["measure"] = display_name
    made.filters |= {"unit": unit, "signed": signed}
    made.globals |= {"p_value": p_value, "unknown": UNKNOWN}
    return made


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Draws the figures of the block alike on every machine: a user's matplotlibrc must not change a page."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 8})
        yield


def unit(value: float) -> str:
    """Three decimals without the leading zero, as measures between 0 and 1 are usually printed."""
    text = f"{abs(value):.3f}"
    sign = MINUS if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0") else text)


def signed(value: float) -> str:
    """The same with its sign, for differences."""
    text = unit(value)
    return text if text.startswith(MINUS) or text == ".000" else f"+{text}"


def p_value(p: float) -> str:
    """A p value in words; a dash for NaN."""
    if isnan(p):
        return UNKNOWN
    return "p < .001" if p < 0.001 else "p > .999" if p > 0.999 else f"p = {unit(p)}"


def compact(value: float, _position: int = 0) -> str:
    """An axis label: 1500 is 1.5k, 2000000 is 2M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def quiet_axes(width_inches: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure with one quiet set of axes: horizontal grid lines, counts in short form, no box."""
    figure = Figure(figsize=(width_inches, 2.7), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="both", length=0, labelcolor=MUTED, pad=5)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK)
    axes.set_title(y_label, color=INK, loc="left", fontsize="medium")  # beside the axis it would need turning
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(compact))
    return figure, axes


def svg(figure: Figure, label: str) -> Markup:
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
