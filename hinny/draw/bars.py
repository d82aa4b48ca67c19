"""Groups of bars over ranges of a size, on a logarithmic axis, as SVG that is the same every time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

INK, FAINT = "#1f2328", "#d5d9de"
"""Text and grid."""
FILLS = ("#0068a8", "#e69f00", "#00805c")
"""Told apart also without seeing red or green, and by light and dark besides."""
SIZE = (6.4, 3.4)
"""Inches."""
MOST_TICKS = 13
"""Labels of the x axis that have room beside each other."""
RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "hinny", "font.size": 9.5, "font.family": "sans-serif",
           "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
           "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Bars:
    """One series: a value for each range."""

    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with its words."""

    x: float
    label: str


def draw_bars(edges: Sequence[float], series: Sequence[Bars], *, title: str, x: str, y: str,
              mark: Mark | None = None) -> str:
    """The series (up to three) over the ranges between `edges`, powers of two that rise, as an SVG document.

    Values are shares: the y axis is in per cent. Axes are labelled `x` and `y`; the x axis has base 2.
    """
    assert len(series) <= len(FILLS), series
    assert all(len(one.values) == len(edges) - 1 for one in series), (edges, series)
    with rc_context(RC):
        canvas = Figure(figsize=SIZE)
        axes = canvas.add_axes((0.125, 0.15, 0.85, 0.66))
        axes.set_xscale("log", base=2)
        for k, one in enumerate(series):
            # equal parts of a range, as they look on the logarithmic axis
            left, right = ([low * (high / low) ** (0.08 + 0.84 * part / len(series)) for low, high in pairwise(edges)]
                           for part in (k, k + 1))
            axes.bar(left, [100 * value for value in one.values], align="edge", color=FILLS[k], label=one.label,
                     width=[stop - start for start, stop in zip(left, right, strict=True)])
        limits = (edges[0], edges[-1]) if mark is None else (min(edges[0], mark.x), max(edges[-1], mark.x * 1.05))
        axes.set_xlim(*limits)
        if mark is not None:
            axes.axvline(mark.x, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            # on the side where there is room
            far = mark.x > (limits[0] * limits[1]) ** 0.5
            axes.annotate(mark.label, (mark.x, 1.0), xycoords=("data", "axes fraction"), xytext=(-4 if far else 4, 0),
                          textcoords="offset points", fontsize=8.5, va="bottom", ha="right" if far else "left")
        # every edge, or as many as there is room for
        axes.xaxis.set_major_locator(FixedLocator(list(edges)[::-(-len(edges) // MOST_TICKS)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=3, width=0.7)
        canvas.text(0.125, 0.93, title, fontsize=10.5, fontweight="bold", ha="left")
        axes.legend(frameon=False, fontsize=8.5, ncols=len(series), loc="lower right", bbox_to_anchor=(1.0, 1.06))
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def binary(value: float) -> str:
    """A number of tokens in few characters: 16384 is "16K", 1048576 is "1M", 1000 is "1000"."""
    for step, letter in ((2**20, "M"), (2**10, "K")):
        if value >= step and value % step == 0:
            return f"{value / step:.0f}{letter}"
    return f"{value:g}"
