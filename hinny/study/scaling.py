"""Loss against size as a power law, fitted to the seeds of a study: the curve, its 95 % band, where two curves cross.

log(loss) = a + b log(x), least squares over all seeds of a line. With three sizes no third parameter, such as a loss
that no size goes below, can be told from noise: the curve holds between the sizes that were trained, not far beyond.
The band and the crossing come from 4,000 draws of (a, b) from their joint t distribution, the same draws every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hinny.study.collect import Table
from hinny.study.draw import Point, short

DRAWS, LEAST_SIZES = 4000, 3
BEYOND = 10.0
"""How many times the largest size a crossing is looked for."""


@dataclass(frozen=True)
class Fit:
    """The power law of one line. sizes: those that were trained; draws (DRAWS, 2): a and b."""

    a: float
    b: float
    sizes: tuple[float, ...]
    draws: np.ndarray

    def loss(self, x: float) -> tuple[float, float, float]:
        """The fitted loss at a size, and its 95 % band."""
        low, high = np.quantile(np.exp(self.draws[:, 0] + self.draws[:, 1] * math.log(x)), (0.025, 0.975))
        return math.exp(self.a + self.b * math.log(x)), float(low), float(high)


def fit(sizes: list[float], losses: list[float]) -> Fit | None:
    """The law of these points, one for each seed; None for fewer than three sizes, or no more points than two."""
    if len(set(sizes)) < LEAST_SIZES:
        return None
    x, y = np.log(np.array(sizes)), np.log(np.array(losses))
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    best = inverse @ design.T @ y
    freedom = len(x) - 2
    variance = float(((y - design @ best) ** 2).sum()) / freedom
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((DRAWS, 2)) @ np.linalg.cholesky(variance * inverse + 1e-30 * np.eye(2)).T
    draws = best + spread / np.sqrt(rng.chisquare(freedom, (DRAWS, 1)) / freedom)
    return Fit(float(best[0]), float(best[1]), tuple(sorted(set(sizes))), draws)


def fits(table: Table, lines: list[dict[str, Any]]) -> dict[int, Fit]:
    """Place of a line → its law, for those that have one."""
    found = {}
    for place, line in enumerate(lines):
        points = [(member["x"], figure.value) for member in line["members"]
                  for figure in table.find("held_out_loss_of_seed", member["recipe"])]
        if points and (one := fit([x for x, _ in points], [loss for _, loss in points])) is not None:
            found[place] = one
    return found


def band(one: Fit, n: int = 25) -> list[Point]:
    """The curve between the smallest and the largest size."""
    return [Point(float(x), *one.loss(float(x))) for x in np.geomspace(one.sizes[0], one.sizes[-1], n)]


def crossing(one: Fit, other: Fit) -> tuple[float | None, float]:
    """Where the two curves meet, and the share of draws that meet between the smallest size and ten times the largest.

    None where they do not meet there.
    """
    low, high = math.log(max(one.sizes[0], other.sizes[0])), math.log(BEYOND * min(one.sizes[-1], other.sizes[-1]))

    def meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return -a / b

    best = float(meet(np.array(one.a - other.a), np.array(one.b - other.b)))
    drawn = meet(one.draws[:, 0] - other.draws[::-1, 0], one.draws[:, 1] - other.draws[::-1, 1])
    share = float(((drawn >= low) & (drawn <= high)).mean())
    return (math.exp(best) if low <= best <= high else None), share


def fitted_sentence(lines: list[dict[str, Any]], found: dict[int, Fit]) -> str:
    """The laws' exponents, and where each line meets the first one."""
    parts = [f"{lines[place]['line']} falls as x^{one.b:.3f} ({_range(one)})" for place, one in found.items()]
    first, *others = found
    for place in others:
        at, share = crossing(found[first], found[place])
        pair = f"{lines[first]['line']} and {lines[place]['line']}"
        where = ("do not meet between the smallest size and ten times the largest" if at is None
                 else f"meet at {_size(at)}")
        parts.append(f"{pair} {where} ({round(100 * share)} % of draws meet there)")
    return f"Curves: power laws with 95 % bands, fitted to all seeds. {'; '.join(parts)}."


def _range(one: Fit) -> str:
    low, high = np.quantile(one.draws[:, 1], (0.025, 0.975))
    return f"95 %: {low:.3f} to {high:.3f}"


def _size(value: float) -> str:
    return short(float(f"{value:.2g}"))
