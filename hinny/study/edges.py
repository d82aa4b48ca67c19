"""Values far from all others: the range of y leaves them out, and they stand at its edge as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

if TYPE_CHECKING:
    from hinny.study.draw import Panel, Series

FAR = 4.0
"""A gap so many times as wide as all values below it tells those above it apart."""
LEAST = 4
"""Different values below such a gap."""
NOTE = "Losses far above the others stand at the edge, with an arrow."


def near(values: Sequence[float]) -> list[float]:
    """The values, of which less is better, without those that are far above all others and would leave these no room.
    """
    ordered = sorted(set(values))
    for below, value in enumerate(ordered[:-1]):
        if below + 1 >= LEAST and ordered[below + 1] - value > FAR * (value - ordered[0]):
            return [one for one in values if one <= value]
    return list(values)


def leaves(series: Series, limits: tuple[float, float] | None) -> bool:
    """Whether the line goes past the limits of y."""
    return limits is not None and not all(limits[0] <= p.value <= limits[1] for p in series.points)


def edge_note(panels: Sequence[Panel]) -> str:
    """What a caption says of such values, if there are any."""
    return NOTE if any(leaves(series, panel.limits) for panel in panels for series in panel.series) else ""


def mark(axes: Axes, series: Series, limits: tuple[float, float], colour: str, size: float,
         format_y: Callable[[float], str]) -> None:
    """An arrow with the number where a point is above the limits."""
    low, high = axes.get_xlim()
    for p in series.points:
        if p.value > limits[1]:
            right = p.x - low > 0.8 * (high - low)
            number, arrow = format_y(p.value), "\N{UPWARDS ARROW}"
            axes.annotate(f"{number} {arrow}" if right else f"{arrow} {number}",
                          (p.x, limits[1]), xytext=(3 if right else -3, -1), textcoords="offset points",
                          ha="right" if right else "left", va="top", color=colour, fontsize=size)
