"""What the project's pages share: the template's surroundings, formats of figures, and plots as inline SVG.

A page is one HTML file without scripts and without anything loaded from elsewhere, and is the same for the same
facts. Knows nothing of what the pages say.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from crossenc.evaluation.metrics import display_name
from pipelines.progress import visible

#: Colours that the figures are drawn in, and the page's variables that replace them: light and dark need
#: other ones.
COLOURS = {
    "#101010": "var(--ink)",
    "#606060": "var(--muted)",
    "#d0d0d0": "var(--line)",
    "#3060d0": "var(--series)",
    "#12927f": "var(--stage-2)",
    "#c98212": "var(--stage-3)",
    "#8a56c2": "var(--stage-4)",
    "#c0392b": "var(--stage-5)",
    "#4d7c0f": "var(--stage-6)",
    "#b83280": "var(--stage-7)",
}
INK, MUTED, LINE, SERIES, SECOND_SERIES, *_ = COLOURS
#: Series that can be told apart.
MANY_SERIES = tuple(COLOURS)[3:]
#: Figures are drawn in points and scaled to the page: a half figure is this wide, a full one twice that and
#: the gap.
HALF_INCHES, FULL_INCHES = 5.6, 11.5
#: A minus sign as wide as a plus, and a dash for what is not known.
MINUS, UNKNOWN = "\N{MINUS SIGN}", "\N{EN DASH}"


def load_template(name: str) -> Template:
    """A template of this package. What it is given stays text: control characters are shown, the rest is escaped."""
    environment = Environment(
        loader=PackageLoader("pipelines", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "rate": rate,
        "duration": duration,
        "measure": display_name,
        "unit": unit,
        "signed": signed,
    }
    environment.globals |= {"share": share, "unknown": UNKNOWN}
    return environment.get_template(name)


def unit(value: float) -> str:
    """Three decimals without the leading zero, as measures between 0 and 1 are usually printed."""
    text = f"{abs(value):.3f}"
    sign = MINUS if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0") else text)


def signed(value: float) -> str:
    """As `unit`, with a plus before what is above 0."""
    text = unit(value)
    return text if text.startswith(MINUS) or text == ".000" else f"+{text}"


def p_value(p: float) -> str:
    """A p value in words; a dash for NaN."""
    if isnan(p):
        return UNKNOWN
    return "p < .001" if p < 0.001 else "p > .999" if p > 0.999 else f"p = {unit(p)}"


def share(part: float, whole: float) -> str:
    """A percentage with one decimal; never 0.0 % of something nor 100.0 % of less than all."""
    if not whole:
        return UNKNOWN
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= percent < 100 else f"{percent:.1f} %"


def rate(value: float) -> str:
    """A rate: whole from 100 on, three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in its two largest units, or in seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def compact(value: float, _position: int = 0) -> str:
    """An axis label: 1500 is 1.5k, 2000000 is 2M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


@contextmanager
def figure_style() -> Iterator[None]:
    """Figures of the pages are made inside: a user's matplotlibrc must not change them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 8})
        yield


def new_axes(width_inches: float, x_label: str, y_label: str, *, counts: bool = True) -> tuple[Figure, Axes]:
    """A figure with one quiet set of axes: horizontal grid lines, counts (or other figures) in short form, no box."""
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
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=counts))
    axes.yaxis.set_major_formatter(FuncFormatter(compact))
    return figure, axes


def to_svg(figure: Figure, label: str) -> Markup:
    """The figure as an inline SVG that takes its width, font and colours from the page."""
    label = visible(label)
    matplotlib.rcParams["svg.hashsalt"] = label  # makes ids the same every time, and unlike other figures'
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    opening = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
    told = escape(label)
    text = opening.sub(lambda found: f'<svg viewBox="{found[1]}" role="img" aria-label="{told}">', text, count=1)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # the same in every figure, and ids must be unique in a page
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return Markup(text)
