"""Draws a panel, some lines over one axis, as SVG that takes its colours from the page and is the same every time."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hinny.study.beside import apart, place, text_width
from hinny.study.edges import leaves, mark
from hinny.study.rows import ROW, Row, draw_rows

INK, FAINT, GREY = "#1f2328", "#d5d9de", "#a9b0b8"
"""Text, grid and lines in the background; an inline drawing replaces them, and the series' colours, by the page's
variables."""
PALETTE = ("#0068a8", "#b5578f", "#c85200", "#00805c", "#6b5b95", "#7a6a00", "#4d7c8a", "#8a4b2d")
"""Told apart also without seeing red or green, and by markers besides; dark values are in the page's style sheet."""
MARKERS = "osD^vPX<"
WIDTH, HEIGHT = 4.3, 1.995
"""Inches of a panel and of its axes: the least; drawn at a text size that can be read at a phone's width."""
LEFT, BOTTOM, ABOVE, BARE = 0.58, 0.495, 0.51, 0.315
"""Inches around the axes; above them with a title, and without."""
SIDE, NARROW, LINE = 1.29, 1.9, 0.164
"""Inches: the least room for labels at the right, the least width of the axes, a label's height."""
TEXT = 9.5
RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "hinny", "font.size": TEXT, "font.family": "sans-serif",
      "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
      "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


@dataclass(frozen=True)
class Point:
    """A value at x with the range of its seeds or timings; `sure` false draws it dotted."""

    x: float
    value: float
    low: float
    high: float
    sure: bool = True
    across: tuple[float, float] | None = None
    """The range of x, in a panel of points."""


@dataclass(frozen=True)
class Series:
    """A line with its direct label; in a panel of points its one point."""

    label: str
    """Empty: none, where the line belongs to another in its colour."""
    points: list[Point]
    colour: int
    dashed: bool = False
    dots: bool = False
    """Points with their ranges, not joined."""
    muted: bool = False
    """Thin and grey, for those beside which others are to be seen."""
    ink: bool = False
    """In the text's colour: no model's."""
    mark: int | None = None
    """The marker's place among those of one colour; None: the colour's own."""
    shade: float = 1.0
    """How strong the line is beside others of its colour."""
    model: str = ""
    """The recipe whose figures these are; empty for chance levels and for lines of several models."""


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
    across: tuple[float, float] | None = None
    """Limits of x."""
    front: list[tuple[float, float]] | None = None
    """Points in place of lines, each named beside it, and this line of steps through the best of them."""
    higher: bool = False
    """Whether higher values are better."""
    rows: bool = False
    """The lines are single points, drawn as rows over one level axis, that of their values."""
    by_end: bool = False
    """Whether lines are ranked by where they end, and not by their means."""


def short(value: float, digits: int = 3) -> str:
    """A count in few characters: 16384 is "16K" where it is a multiple of 1024, 1500000 is "1.5M"."""
    for step, letter in ((2**20, "M"), (2**10, "K")):
        if value >= step and value % step == 0 and (step == 2**20 or value < 2**20):
            return f"{value / step:.0f}{letter}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def draw(panel: Panel) -> str:
    """The panel as an SVG document."""
    labels = [series.label for series in panel.series if series.label]
    # as high as the labels need, and as wide as the longest
    high = max(HEIGHT if panel.title else HEIGHT + ABOVE - BARE, LINE * (len(labels) + 1))
    side = max([SIDE if labels else BARE, *(text_width(label, TEXT - 0.5) + 0.3 for label in labels)])
    if panel.front is not None:
        side, high = 0.1, max(high, 2.5, 1.2 + LINE * min(len(panel.series), 14))
    left = LEFT
    if panel.rows:
        left, side, high = side, 0.25, ROW * len(panel.series) + 0.1
    width = max(WIDTH, left + NARROW + side)
    tall = BOTTOM + high + (ABOVE if panel.title else BARE)
    with matplotlib.rc_context(RC):
        canvas = Canvas(figsize=(width, tall))
        axes = canvas.add_axes((left / width, BOTTOM / tall, (width - left - side) / width, high / tall))
        if panel.front is None and not panel.rows:
            for series in panel.series:
                _line(axes, series, bands=len(series.points) > 20, clip=leaves(series, panel.limits))
        _axes(axes, panel, left)
        for series in (one for one in panel.series if panel.limits and not panel.log_x and leaves(one, panel.limits)):
            mark(axes, series, panel.limits or (0, 1), _colour(series), TEXT - 1, panel.format_y or short)
        if panel.rows:
            draw_rows(axes, [_row(series) for series in panel.series], TEXT - 0.5)
        elif panel.front is None:
            _labels(axes, panel, LINE / high)
        else:
            _points(axes, panel, panel.front)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def marker(colour: int, mark: int | None = None) -> str:
    """A series' marker: those that share a colour, past the palette's end or by their `mark`, differ in it."""
    return MARKERS[(colour + colour // len(PALETTE) if mark is None else mark) % len(MARKERS)]


def _colour(series: Series) -> str:
    return INK if series.ink else GREY if series.muted else PALETTE[series.colour % len(PALETTE)]


def _line(axes: Axes, series: Series, bands: bool, clip: bool) -> None:
    colour = _colour(series)
    shape = None if bands or series.dashed or series.muted else marker(series.colour, series.mark)
    style: dict[str, Any] = {"color": colour, "linewidth": 1.0 if series.dashed or series.muted else 1.6,
                             "marker": shape, "markersize": 4.5, "markeredgewidth": 0, "clip_on": bands or clip,
                             "alpha": series.shade if series.shade < 1 else None}
    x = [p.x for p in series.points]
    if series.dots:
        axes.vlines(x, [p.low for p in series.points], [p.high for p in series.points], color=colour, linewidth=1.2)
        axes.plot(x, [p.value for p in series.points], **{**style, "linestyle": "none"})
        return
    if not series.dashed and not series.muted:
        axes.fill_between(x, [p.low for p in series.points], [p.high for p in series.points],
                          color=colour, alpha=0.18 * series.shade, linewidth=0)
    sure = [p.value if p.sure else float("nan") for p in series.points]
    axes.plot(x, sure, linestyle=(0, (2, 2)) if series.dashed else "-", **style)
    if not all(p.sure for p in series.points):
        first = next(i for i, p in enumerate(series.points) if not p.sure)
        rest = series.points[max(0, first - 1):]
        axes.plot([p.x for p in rest], [p.value for p in rest], linestyle=(0, (1, 1.5)), markerfacecolor="none",
                  **{**style, "markeredgewidth": 0.8, "zorder": 1.5})


def _row(series: Series) -> Row:
    (p,) = series.points
    return Row(series.label, _colour(series), marker(series.colour, series.mark), p.value, p.low,
               p.high)


def _axes(axes: Axes, panel: Panel, left: float) -> None:
    inches = axes.get_window_extent().width / axes.figure.dpi
    edge = -(left - 0.12) / inches
    axes.set_title(panel.title, loc="left", fontsize=TEXT + 0.5, fontweight="bold", x=edge, pad=22)
    axes.set_xlabel(panel.x)
    # the y label lies above the axis, level, so that nobody turns the head
    axes.annotate(panel.y, (edge, 1.0), xycoords="axes fraction", xytext=(0, 6.5), textcoords="offset points",
                  fontsize=TEXT - 1, ha="left", va="bottom", alpha=0.75)
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.limits:
        axes.set_ylim(*panel.limits)
    if panel.across:
        axes.set_xlim(*panel.across)
    if panel.ticks:
        axes.xaxis.set_major_locator(FixedLocator(panel.ticks))
    elif not panel.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: (panel.format_x or short)(value)))
    digits = _digits(axes) if panel.format_y is None else 0
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: (panel.format_y or partial(short, digits=digits))(
        value)))
    axes.grid(axis="x" if panel.rows else "y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, width=0.7)
    if panel.mark:
        _mark(axes, panel, *panel.mark)


def _digits(axes: Axes) -> int:
    """Digits by which the numbers beside the axis of y differ, three at least."""
    low, high = axes.get_ylim()
    places = [place for place in axes.yaxis.get_majorticklocs() if low <= place <= high]
    return next(d for d in range(3, 18) if len({short(place, d) for place in places}) == len(places) or d == 17)


def _mark(axes: Axes, panel: Panel, x: float, words: str) -> None:
    """A broken upright line with its words, on the side and at the height where they cover least of the lines."""
    axes.axvline(x, color=INK, linewidth=0.7, linestyle=(0, (4, 3)), alpha=0.6)
    box, points = axes.get_window_extent(), axes.figure.dpi / 72
    at = float(axes.transData.transform((x, axes.get_ylim()[0]))[0])
    wide, high = (text_width(words, TEXT - 2) * 72 + 3) * points, (TEXT - 1) * points
    lines = [axes.transData.transform([(p.x, p.value) for p in s.points]) for s in panel.series]
    sampled = [a + (b - a) * part / 20 for line in lines
               for a, b in pairwise([*line, line[-1]]) for part in range(20)]

    def covered(side: int, up: float) -> tuple[float, float]:
        left, top = (at if side > 0 else at - wide), box.y0 + up * box.height
        if left < box.x0 or left + wide > box.x1 + 4 * points:
            return float("inf"), 0.0
        inside = sum(left <= px <= left + wide and top - high <= py <= top + 2 * points for px, py in sampled)
        return inside, -up - 0.01 * side

    side, up = min(((side, up / 20) for side in (1, -1) for up in range(20, 1, -1)), key=lambda one: covered(*one))
    axes.annotate(words, (x, up), xycoords=("data", "axes fraction"), xytext=(3 * side, -1), fontsize=TEXT - 2,
                  textcoords="offset points", va="top", ha="left" if side > 0 else "right", alpha=0.75)


def _labels(axes: Axes, panel: Panel, gap: float) -> None:
    """Each line's name at its right end, in its colour, moved apart where ends are close."""
    ends = []
    for series in (one for one in panel.series if one.label):
        last = series.points[-1]
        height = axes.transAxes.inverted().transform(axes.transData.transform((last.x, last.value)))[1]
        ends.append((min(1.0, max(0.0, height)), series))
    ends.sort(key=lambda end: end[0])
    for (height, series), wanted in zip(ends, apart([h for h, _ in ends], gap), strict=True):
        colour = _colour(series)
        axes.annotate(series.label, (1.0, height), xycoords="axes fraction", xytext=(1.06, wanted),
                      textcoords="axes fraction", color=colour, fontsize=TEXT - 0.5, va="center",
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 1,
                                  "relpos": (0, 0.5)})


def _points(axes: Axes, panel: Panel, front: list[tuple[float, float]]) -> None:
    """Points with the ranges of both axes, the front's steps, and each name beside its point, clear of the others."""
    left = axes.get_xlim()[0]
    top = axes.get_ylim()[1]
    steps = [(left, front[0][1]), *((x, y) for before, after in pairwise(front)
                                    for x, y in (before, (before[0], after[1]))), front[-1], (front[-1][0], top)]
    axes.plot(*zip(*steps, strict=True), color=INK, linewidth=1.0, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
    taken, spots, scale = [], [], 72 / axes.figure.dpi
    for series in panel.series:
        (p,), colour = series.points, _colour(series)
        low, high = p.across or (p.x, p.x)
        axes.errorbar([p.x], [p.value], xerr=[[p.x - low], [high - p.x]], yerr=[[p.value - p.low], [p.high - p.value]],
                      fmt=marker(series.colour, series.mark), color=colour, markersize=4.5 if series.muted else 6.5,
                      markeredgewidth=0, elinewidth=0.8 if series.muted else 1.1)
        ends = axes.transData.transform([(low, p.value), (high, p.value), (p.x, p.low), (p.x, p.high)])
        (x0, y), (x1, _), (x, y0), (_, y1) = ([float(v) * scale for v in end] for end in ends)
        taken += [(x0 - 3, y - 2, x1 + 3, y + 2), (x - 2, y0 - 2, x + 2, y1 + 2), (x - 5, y - 5, x + 5, y + 5)]
        spots += [(x, y, series.label)] if series.label else []
    box = axes.get_window_extent()
    frame = ((box.x0 + 3) * scale, (box.y0 + 2) * scale, box.x1 * scale, (box.y1 + 6) * scale)
    inside = [axes.transData.transform(step) * scale for step in steps]
    line = [(min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1)
            for a, b in pairwise(inside)]
    named = [series for series in panel.series if series.label]
    for series, (lx, ly, far) in zip(named, place(spots, taken, line, frame, TEXT - 0.5), strict=True):
        colour = _colour(series)
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if far else None
        axes.annotate(series.label, (series.points[0].x, series.points[0].value), xytext=(lx, ly), color=colour,
                      textcoords="figure points", fontsize=TEXT - 0.5, ha="left", va="center", arrowprops=arrow)
