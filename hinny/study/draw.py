"""Draws a panel, some lines over one axis, as SVG that takes its colours from the page and is the same every time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

INK, FAINT = "#1f2328", "#d5d9de"
"""Text and grid; an inline drawing replaces them, and the series' colours, by the page's variables."""
PALETTE = ("#0068a8", "#b5578f", "#c85200", "#00805c", "#6b5b95", "#7a6a00", "#4d7c8a", "#8a4b2d")
"""Told apart also without seeing red or green, and by markers besides; dark values are in the page's style sheet."""
MARKERS = "osD^vPX<"
SIZE = (4.3, 3.0)
"""Inches; drawn at a text size that can be read at a phone's width."""
TEXT = 9.5
RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "hinny", "font.size": TEXT, "font.family": "sans-serif",
      "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
      "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Point:
    """A value at x with the range of its seeds or timings; `sure` false draws it dotted."""

    x: float
    value: float
    low: float
    high: float
    sure: bool = True


@dataclass(frozen=True)
class Series:
    """A line with its direct label."""

    label: str
    """Empty: none, where the line belongs to another in its colour."""
    points: list[Point]
    colour: int
    dashed: bool = False
    dots: bool = False
    """Points with their ranges, not joined."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes; the title is empty where it is the only one of its plot.

    Logarithmic axes: base 2 for x, ten for y.
    """

    title: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    limits: tuple[float, float] | None = None
    mark: tuple[float, str] | None = None
    """A vertical line at x with its label."""
    format_y: Callable[[float], str] | None = None
    format_x: Callable[[float], str] | None = None
    ticks: list[float] = field(default_factory=list)


def short(value: float) -> str:
    """A count in few characters: 16384 is "16K" where it is a multiple of 1024, 1500000 is "1.5M"."""
    for step, letter in ((2**20, "M"), (2**10, "K")):
        if value >= step and value % step == 0 and (step == 2**20 or value < 2**20):
            return f"{value / step:.0f}{letter}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def draw(panel: Panel) -> str:
    """The panel as an SVG document."""
    with matplotlib.rc_context(RC):
        canvas = Canvas(figsize=SIZE)
        axes = canvas.add_axes((0.135, 0.165, 0.565, 0.665 if panel.title else 0.73))
        for series in panel.series:
            _line(axes, series, bands=len(series.points) > 20, clip=_leaves(series, panel.limits))
        _axes(axes, panel)
        _labels(axes, panel)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _leaves(series: Series, limits: tuple[float, float] | None) -> bool:
    """Whether the line goes past the limits of y."""
    return limits is not None and not all(limits[0] <= p.value <= limits[1] for p in series.points)


def _line(axes: Axes, series: Series, bands: bool, clip: bool) -> None:
    colour = PALETTE[series.colour % len(PALETTE)]
    marker = None if bands or series.dashed else MARKERS[series.colour % len(MARKERS)]
    style: dict[str, Any] = {"color": colour, "linewidth": 1.0 if series.dashed else 1.6, "marker": marker,
                             "markersize": 4.5, "markeredgewidth": 0, "clip_on": bands or clip}
    x = [p.x for p in series.points]
    if series.dots:
        axes.vlines(x, [p.low for p in series.points], [p.high for p in series.points], color=colour, linewidth=1.2)
        axes.plot(x, [p.value for p in series.points], **{**style, "linestyle": "none"})
        return
    if not series.dashed:
        axes.fill_between(x, [p.low for p in series.points], [p.high for p in series.points],
                          color=colour, alpha=0.18, linewidth=0)
    sure = [p.value if p.sure else float("nan") for p in series.points]
    axes.plot(x, sure, linestyle=(0, (2, 2)) if series.dashed else "-", **style)
    if not all(p.sure for p in series.points):
        first = next(i for i, p in enumerate(series.points) if not p.sure)
        rest = series.points[max(0, first - 1):]
        axes.plot([p.x for p in rest], [p.value for p in rest], linestyle=(0, (1, 1.5)), markerfacecolor="none",
                  **{**style, "markeredgewidth": 0.8, "zorder": 1.5})


def _axes(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=TEXT + 0.5, fontweight="bold", x=-0.19, pad=22)
    axes.set_xlabel(panel.x)
    # the y label lies above the axis, level, so that nobody turns the head
    axes.text(-0.19, 1.045, panel.y, transform=axes.transAxes, fontsize=TEXT - 1, ha="left", va="bottom", alpha=0.75)
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.limits:
        axes.set_ylim(*panel.limits)
    if panel.ticks:
        axes.xaxis.set_major_locator(FixedLocator(panel.ticks))
    elif not panel.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: (panel.format_x or short)(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: (panel.format_y or short)(value)))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, width=0.7)
    if panel.mark:
        axes.axvline(panel.mark[0], color=INK, linewidth=0.7, linestyle=(0, (4, 3)), alpha=0.6)
        axes.annotate(panel.mark[1], (panel.mark[0], 1.0), xycoords=("data", "axes fraction"), xytext=(3, -1),
                      textcoords="offset points", fontsize=TEXT - 2, va="top", alpha=0.75)


def _labels(axes: Axes, panel: Panel) -> None:
    """Each line's name at its right end, in its colour, moved apart where ends are close."""
    ends = []
    for series in (one for one in panel.series if one.label):
        last = series.points[-1]
        height = axes.transAxes.inverted().transform(axes.transData.transform((last.x, last.value)))[1]
        ends.append((min(1.0, max(0.0, height)), series))
    ends.sort(key=lambda end: end[0])
    for (height, series), wanted in zip(ends, apart([h for h, _ in ends], 0.082), strict=True):
        colour = PALETTE[series.colour % len(PALETTE)]
        axes.annotate(series.label, (1.0, height), xycoords="axes fraction", xytext=(1.06, wanted),
                      textcoords="axes fraction", color=colour, fontsize=TEXT - 0.5, va="center",
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 1})


def apart(heights: list[float], gap: float) -> list[float]:
    """Ascending `heights` moved as little as needed to be `gap` apart and stay below 1 where possible."""
    placed = list(heights)
    for _ in range(100):
        for i in range(len(placed) - 1):
            if (short_by := gap - (placed[i + 1] - placed[i])) > 1e-6:
                placed[i] -= short_by / 2
                placed[i + 1] += short_by / 2
        if placed and placed[-1] > 1.0:
            placed[-1] = 1.0
    return placed


def inline(svg: str, prefix: str, alt: str) -> str:
    """The drawing as an element of a page: no prolog, own ids, the page's font and colours."""
    body = svg[svg.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    for colour, variable in _variables().items():
        body = body.replace(colour, variable)
    return body.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def standalone(svg: str) -> str:
    """The drawing as a file of its own: its text turns light on a dark page."""
    style = (f"<style>svg{{color:{INK};font-family:system-ui,sans-serif}}"
             "@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}</style>")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    return re.sub(r"(<svg [^>]*>)", rf"\1{style}", svg, count=1)


def _variables() -> dict[str, str]:
    return {INK: "currentColor", FAINT: "var(--faint)"} | {c: f"var(--s{i})" for i, c in enumerate(PALETTE)}
