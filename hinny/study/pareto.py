"""Quality against speed: which models no other beats on both, by their means and with their ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hinny.study.collect import Figure, Table
from hinny.study.colours import drawn
from hinny.study.draw import Panel, Point, Series
from hinny.study.figures import Plot, limits, seeds_note
from hinny.study.summary import Score, comparable, mean, said

MANY = 8
"""Models up to which every point has its name."""
NAMED = 4
"""Models that a sentence has room for."""
WIDE = 4.0
"""Ratio of speeds beyond which their axis is logarithmic."""


@dataclass(frozen=True)
class Spot:
    """A model's speed, more is better, and loss, less is better."""

    name: str
    speed: Score
    loss: Score


def front(spots: list[Spot]) -> list[Spot]:
    """The spots whose means no other's beat: nobody is as fast and as good and in one of them better; slowest first."""
    return sorted((one for one in spots if not any(
        other.speed.value >= one.speed.value and other.loss.value <= one.loss.value
        and (other.speed.value, other.loss.value) != (one.speed.value, one.loss.value) for other in spots)),
        key=lambda one: (one.speed.value, one.loss.value))


def unbeaten(spots: list[Spot]) -> list[Spot]:
    """The spots that nobody beats on both beyond doubt: with a slowest timing above their fastest and a worst seed
    below their best."""
    return [one for one in spots if not any(
        other.speed.low > one.speed.high and other.loss.high < one.loss.low for other in spots)]


def pareto(table: Table) -> Plot | None:
    """The plot of held-out loss against training and decode speed, as far as two models have both."""
    contexts = [f.number("context") for f in table.find("decode")]
    longest = max(contexts, default=0)
    parts = [("Training", "tokens/s, training", lambda name: table.find("train", name)),
             (f"Decoding after {longest:,} tokens", "tokens/s, decoding", lambda name: [
                 f for f in table.curve("decode", name, "context")[-1:] if f.number("context") == longest])]
    shown = [(title, x, *found) for title, x, pick in parts if len((found := _spots(table, pick))[0]) > 1]
    if not shown:
        return None
    series = [_named(table, spots) for _, _, spots, _ in shown]
    bounds = limits(series, pad=0.12)
    panels = [_panel(title, x, spots, lines, bounds) for (title, x, spots, _), lines in zip(shown, series, strict=True)]
    figures = list({id(f): f for *_, used in shown for f in used}.values())
    losses = [f for f in figures if f.what == "held_out_loss"]
    note = seeds_note(losses).partition(".")[0] if {f.seeds for f in losses} == {1} else "upright bars span the seeds"
    told = " ".join(_sentence(table, title, spots) for title, _, spots, _ in shown)
    grey = " In grey, without a name: beaten on both beyond all ranges." if any(
        one.muted for part in series for one in part) else ""
    caption = ("Held-out loss (lower is better) against tokens per second (more is better): the lower right is best. "
               f"The broken line is the Pareto front of the means. {told} Level bars span repeated timings, {note}."
               f"{grey}")
    return Plot("pareto", "Quality against speed", caption, panels, figures)


def _spots(table: Table, pick: Callable[[str], list[Figure]]) -> tuple[list[Spot], list[Figure]]:
    """A spot for each model that has both figures, and those figures."""
    spots, used = [], []
    if not comparable([f for name in table.about["recipes"] for f in pick(name)]):
        return [], []
    for name in table.about["recipes"]:
        loss, speed = table.find("held_out_loss", name), pick(name)
        if loss and speed:
            spots.append(Spot(name, mean(speed), mean(loss)))
            used += [*loss, *speed]
    return spots, used


def _named(table: Table, spots: list[Spot]) -> list[Series]:
    """A point for each spot; where there are many those that are clearly beaten are grey and have no name."""
    kept = unbeaten(spots) if len(spots) > MANY else spots
    series = [drawn(table, s.name, [Point(s.speed.value, s.loss.value, s.loss.low, s.loss.high,
                                          across=(s.speed.low, s.speed.high))], muted=s not in kept) for s in spots]
    return sorted((replace(one, label="") if one.muted else one for one in series), key=lambda one: not one.muted)


def _panel(title: str, x: str, spots: list[Spot], series: list[Series], bounds: tuple[float, float]) -> Panel:
    low, high = min(s.speed.low for s in spots), max(s.speed.high for s in spots)
    line = [(s.speed.value, s.loss.value) for s in front(spots)]
    if high / max(low, 1e-9) > WIDE and low > 0:
        room = (high / low) ** 0.07
        across = (low / room, high * room)
        return Panel(title, x, "held-out loss, nats/token", series, log_x=True, limits=bounds, across=across,
                     ticks=steps(*across), front=line)
    room = 0.07 * (high - low or high)
    return Panel(title, x, "held-out loss, nats/token", series, limits=bounds, across=(low - room, high + room),
                 front=line)


def steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten between `low` and `high`, where a logarithmic axis has its labels."""
    return [v for power in range(-3, 12) for digit in (1, 2, 5) if low <= (v := digit * 10.0 ** power) <= high]


def _sentence(table: Table, title: str, spots: list[Spot]) -> str:
    best = [s.name for s in front(spots)]
    near = [s.name for s in unbeaten(spots) if s.name not in best]
    told = said(table, best) if len(best) <= NAMED else (
        f"{len(best)} of {len(spots)} models, from {table.label(best[0])} to {table.label(best[-1])}")
    others = said(table, near) if 0 < len(near) <= NAMED else f"{len(near)} others"
    return f"{title}: {told}{f'; with their ranges {others} may belong to it' if near else ''}."
