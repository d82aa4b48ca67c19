"""Loss against size as a power law, fitted to the seeds of a study: the curve, its 95 % band, where two curves cross.

log(loss) = a + b log(x), least squares over all seeds of a line. With three sizes no third parameter, such as a loss
that no size goes below, can be told from noise: the curve holds between the sizes that were trained, not far beyond.
The band and the crossing come from 4,000 draws of (a, b) from their joint t distribution, the same draws every time.
It takes the seeds of all sizes as independent: where seeds of one size deviate together from the law, or one seed does
at all sizes, fewer than 19 of 20 bands hold the true curve.
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
"""Up to how many times the largest size a crossing is looked for."""


@dataclass(frozen=True)
class Fit:
    """The power law of one line. sizes: those that were trained; draws (DRAWS, 2): a and b."""

    a: float
    b: float
    sizes: tuple[float, ...]
    draws: np.ndarray
    bent: bool = False
    """Whether the sizes deviate from the law by more than the spread of their seeds explains, at 5 %."""

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
    return Fit(float(best[0]), float(best[1]), tuple(sorted(set(sizes))), draws, _bent(x, y, design @ best))


def _bent(x: np.ndarray, y: np.ndarray, fitted: np.ndarray) -> bool:
    """The test of lack of fit: the sizes' means about the law against the seeds about their mean."""
    _, place, number = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(place, y) / number
    within, between = len(x) - len(number), len(number) - 2
    if within == 0:
        return False
    seeds, sizes = float(((y - means[place]) ** 2).sum()), float(((means[place] - fitted) ** 2).sum())
    chance = np.random.default_rng(0).f(between, within, 100_000)
    return sizes / between > float(np.quantile(chance, 0.95)) * seeds / within + 1e-20


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


@dataclass(frozen=True)
class Crossing:
    """Where two curves meet. at: None where nowhere up to BEYOND times the largest size that both have."""

    at: float | None
    inside: bool
    """Whether that is between the sizes that both have."""
    unsure: tuple[float, float] | None
    """The sizes between which the 95 % band of the curves' difference holds zero; None if it does at no such size."""
    share: float
    """Of the draws, those that meet up to BEYOND times the largest size."""


def crossing(one: Fit, other: Fit, n: int = 200) -> Crossing | None:
    """Where the two curves meet; None for lines that have no range of sizes in common."""
    least, most = max(one.sizes[0], other.sizes[0]), min(one.sizes[-1], other.sizes[-1])
    if least >= most:
        return None
    # the draws of two lines are made of the same numbers: in another order they are independent
    drawn, places = one.draws - other.draws[::-1], np.log(np.geomspace(least, most, n))
    low, high = np.quantile(drawn[:, :1] + drawn[:, 1:] * places, (0.025, 0.975), axis=0)

    def meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return -a / b

    where = float(meet(np.array(one.a - other.a), np.array(one.b - other.b)))
    every, end = meet(drawn[:, 0], drawn[:, 1]), math.log(BEYOND * most)
    inside = bool(places[0] <= where <= places[-1])
    zero = [*places[(low <= 0) & (high >= 0)], *([where] if inside else [])]
    return Crossing(math.exp(where) if places[0] <= where <= end else None, inside,
                    (math.exp(min(zero)), math.exp(max(zero))) if zero else None,
                    float(((every >= places[0]) & (every <= end)).mean()))


def pair_sentence(name: str, other: str, one: Fit, two: Fit) -> str:
    """Where two curves meet, as part of a sentence; past the sizes that were trained it says so."""
    found = crossing(one, two)
    if found is None:
        return f"{name} and {other} have no sizes in common"
    least, most = max(one.sizes[0], two.sizes[0]), min(one.sizes[-1], two.sizes[-1])
    ends = found.unsure and (found.unsure[0] <= least * 1.001, found.unsure[1] >= most * 0.999)
    if ends == (True, True):
        return f"{name} and {other} are not told apart at any size trained"
    unsure = found.unsure and ends and " ".join((
        "not told apart from", f"{_size(found.unsure[0])}{' or less' if ends[0] else ''}",
        "to", f"{_size(found.unsure[1])}{' or more' if ends[1] else ''}"))
    if found.inside:
        assert found.at is not None
        below = name if one.loss(most)[0] < two.loss(most)[0] else other
        return f"{name} and {other} meet at {_size(found.at)} ({unsure}), past which {below} is lower"
    below, above = (name, other) if one.loss(most)[0] < two.loss(most)[0] else (other, name)
    text = f"{below} is below {above} between the sizes trained" + (f" ({unsure})" if unsure else "")
    if found.at is None:
        return text
    return (f"{text}; extended past the largest, which nothing here tests, the curves meet at {_size(found.at)} "
            f"({round(100 * found.share)} % of draws meet up to {BEYOND:.0f} times it)")


def _size(value: float) -> str:
    return short(float(f"{value:.2g}"))
