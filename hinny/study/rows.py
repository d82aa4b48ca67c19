"""Models below each other, each with its figure and range on one level axis: for what is known at one place alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

if TYPE_CHECKING:
    from hinny.study.draw import Panel

ROW = 0.215
"""Inches of a row."""


@dataclass(frozen=True)
class Row:
    """A model's name, colour and marker, its figure and the range of it."""

    label: str
    colour: str
    marker: str
    value: float
    low: float
    high: float


def as_rows(panel: Panel, where: str, *, from_zero: bool = False) -> Panel:
    """The panel with a row for each of its lines, if all have one point at one x; `where` names that x."""
    places = {p.x for series in panel.series for p in series.points}
    if len(places) > 1:
        return panel
    low = min(p.low for series in panel.series for p in series.points)
    high = max(p.high for series in panel.series for p in series.points)
    room = 0.06 * (high - low or high)
    title = f"{panel.title}, {where}" if panel.title else f"{where[0].upper()}{where[1:]}"
    return replace(panel, title=title, rows=True, x=panel.y, y="", log_x=False, log_y=False, limits=None, mark=None,
                   ticks=[], across=(0.0 if from_zero else max(0.0, low - room), high + room))


def draw_rows(axes: Axes, rows: list[Row], size: float) -> None:
    """The rows, from the top in their order."""
    places = [-float(place) for place in range(len(rows))]
    for y, row in zip(places, rows, strict=True):
        axes.hlines(y, row.low, row.high, color=row.colour, linewidth=1.6)
        axes.plot([row.value], [y], color=row.colour, marker=row.marker, markersize=5.5, markeredgewidth=0,
                  linestyle="none", clip_on=False)
    axes.set_yticks(places, [row.label for row in rows], fontsize=size)
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_color(row.colour)
    axes.set_ylim(places[-1] - 0.6, 0.6)
    axes.spines["left"].set_visible(False)
