"""Where names go: those of points beside each its own, clear of the others' names, points and ranges; those of lines
apart from each other.
"""

from __future__ import annotations

import math
from functools import cache

from matplotlib.textpath import TextPath

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""
RINGS = (7.0, 13.0, 21.0, 31.0, 43.0, 57.0, 73.0)
"""Points between a marker's middle and its name: the nearest first."""
DIRECTIONS = 16
TOUCHING, CROSSED = 1000.0, 30.0
"""Cost of covering anything named or measured, and of covering a line."""


@cache
def text_width(text: str, size: float) -> float:
    """Inches of the text in a face wider than those of most systems."""
    return float(TextPath((0, 0), text.replace("$", "S") or " ", size=size).get_extents().width) / 72 * 1.04


def place(spots: list[tuple[float, float, str]], taken: list[Box], lines: list[Box], frame: Box,
          size: float) -> list[tuple[float, float, bool]]:
    """For each spot (x, y, name) the left middle of its name, and whether it is so far that a line must lead to it.

    All in points. Names keep inside `frame`, clear of the boxes `taken` and of each other, and of `lines` where there
    is room. Each is put where it costs least beside those put before; three rounds let all move once more.
    """
    names: list[Box | None] = [None] * len(spots)
    chosen: list[tuple[float, float, bool]] = [(0.0, 0.0, False)] * len(spots)
    order = sorted(range(len(spots)), key=lambda i: -sum(math.dist(spots[i][:2], other[:2]) < 60 for other in spots))
    for _ in range(3):
        for i in order:
            others = [box for j, box in enumerate(names) if box is not None and j != i]
            best = min(_candidates(*spots[i], frame, size), default=None, key=lambda one: (
                one[2] + TOUCHING * sum(_overlap(one[0], box) for box in [*others, *taken])
                + CROSSED * sum(_overlap(one[0], box) > 0 for box in lines)))
            if best is not None:
                names[i], chosen[i] = best[0], best[1]
            else:
                chosen[i] = (spots[i][0], spots[i][1] + RINGS[0], False)
    return chosen


def _candidates(x: float, y: float, name: str, frame: Box,
                size: float) -> list[tuple[Box, tuple[float, float, bool], float]]:
    """Boxes for the name around its point that lie in the frame, where its text begins, and what distance costs."""
    width, height = 72 * text_width(name, size), 1.15 * size
    found = []
    for ring, away in enumerate(RINGS):
        for turn in range(DIRECTIONS):
            across, up = (part(2 * math.pi * turn / DIRECTIONS) for part in (math.cos, math.sin))
            # the box's nearest part lies `away` from the point: left, right and level names begin at their edge
            left = x + away * across - width * (1 - across) / 2
            middle = y + away * up + height / 2 * up
            box = (left, middle - height / 2, left + width, middle + height / 2)
            if box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]:
                # to the right reads best, then to the left
                found.append((box, (left, middle, ring > 1), away * 2 + 4 * abs(up) + (across < -0.5)))
    return found


def _overlap(a: Box, b: Box) -> float:
    """The shared area, plus one where there is some."""
    across, up = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return 1 + across * up if across > 0 and up > 0 else 0.0


def apart(heights: list[float], gap: float) -> list[float]:
    """Ascending `heights` moved as little as needed to be `gap` apart and stay between 0 and 1 where possible."""
    # without their gaps the places only have to rise: each run of heights that falls becomes its mean
    runs: list[tuple[float, int]] = []
    for i, height in enumerate(heights):
        runs.append((height - i * gap, 1))
        while len(runs) > 1 and runs[-2][0] > runs[-1][0]:
            (one, few), (other, more) = runs[-2:]
            runs[-2:] = [((one * few + other * more) / (few + more), few + more)]
    level = [value for value, number in runs for _ in range(number)]
    top = 1.0 - (len(heights) - 1) * gap
    return [min(max(value, 0.0), top) + i * gap for i, value in enumerate(level)]
