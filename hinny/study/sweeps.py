"""Plots of what a study varies: a panel for each measure, a line for each [[vary]] line, x as the study says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hinny.study.collect import Figure, Table
from hinny.study.colours import line_colour
from hinny.study.draw import Panel, Point, Series
from hinny.study.edges import edge_note, near
from hinny.study.figures import Plot, limits, seeds_note
from hinny.study.multiples import LOGARITHMIC, SHARES, lower
from hinny.study.rules import percent
from hinny.study.scaling import Fit, band, fits
from hinny.study.scaling_table import NOTE, fitted
from hinny.study.summary import book, mean, trained_length

AXES = {"attention": "attention layers, share of all", "mlp": "MLP layers, share of all",
        "parameters": "parameters without embeddings", "flops": "FLOPs of the training"}
OF_SEED = "held_out_loss_of_seed"
"""What laws are fitted to: one figure for each seed."""
LINEAR = 0.04
"""Share up to which a spread axis is about even."""
ROOM = 0.105
"""Of an axis, for the widest number of a share."""
LOSS = "Held-out text"
Pick = Callable[[Table, str], list[Figure]]


def losses(table: Table, name: str) -> list[Figure]:
    """The measure that has no natural range."""
    return table.find("held_out_loss", name)


MEASURES: list[tuple[str, str, bool, Pick]] = [
    (LOSS, "loss, nats/token", False, losses),
    ("Phonebook up to {trained} tokens", "numbers exactly right", True, lambda t, n: book(t, n, beyond=False)),
    ("Phonebook beyond {trained} tokens", "numbers exactly right", True, lambda t, n: book(t, n, beyond=True)),
    ("Multi-query recall", "values right", True, lambda t, n: t.find("mqar.accuracy", n)),
    ("Copying", "tokens right", True, lambda t, n: t.find("copy.accuracy", n)),
    ("Training speed", "tokens/s", False, lambda t, n: t.find("train", n))]
"""Title, y, whether it is a share, and the figures of a model, of which the mean is drawn."""
Lines = list[dict[str, Any]]
"""The lines of one plot, as about.json has them."""


def sweep_plots(table: Table) -> list[Plot]:
    """A plot for each `plot` of the study's [[vary]]."""
    found = [_plot(table, f"sweep{place}", title, lines) for place, (title, lines) in enumerate(swept(table).items())]
    return [plot for plot in found if plot is not None]


def swept(table: Table) -> dict[str, Lines]:
    """Plot → its lines, in the study's order."""
    found: dict[str, Lines] = {}
    for line in table.about.get("sweeps", []):
        found.setdefault(line["plot"], []).append(line)
    return found


def titled(title: str, lines: Lines) -> str:
    """A plot's title, with what its one line is; several have their names beside them."""
    return f"{title} ({lines[0]['line']})" if len(lines) == 1 and lines[0]["line"] else title


def _plot(table: Table, name: str, title: str, lines: Lines) -> Plot | None:
    found = panels(table, lines)
    if not found:
        return None
    figures = [figure for _, own in found for figure in own]
    timed = [figure for figure in figures if figure.what == "train"]
    note = seeds_note([figure for figure in figures if figure.what not in ("train", OF_SEED)] or figures)
    if all(series.dots for panel, _ in found for series in panel.series):
        note = note.replace("Lines are", "Points are").replace("bands run", "bars run")
    parts = [f"Higher is better, but for the loss. Each point is a model of its own. {note}"]
    if timed:
        parts.append("Bands of training speed span repeated timings of one trained model.")
    if lines[0]["x"] not in LOGARITHMIC and len({line["plot"] for line in _of_one_size(table)}) > 1:
        parts.append(f"Losses{' and speeds' if timed else ''} have one range in all plots of what is varied.")
    parts += [edge_note([panel for panel, _ in found]), axis_note(lines)]
    facts = fitted(lines, laws) if (laws := _laws(table, lines)) else None
    parts += [NOTE] if facts else []
    return Plot(name, titled(title, lines), " ".join(filter(None, parts)), [panel for panel, _ in found], figures,
                facts)


def panels(table: Table, lines: Lines) -> list[tuple[Panel, list[Figure]]]:
    """A panel for each measure that the models of the lines have, the loss first, and the figures it is made of."""
    axis, named = lines[0]["x"], any(member["x"] is None for line in lines for member in line["members"])
    names = list(dict.fromkeys(str(member["value"]) for line in lines for member in line["members"]))
    spread = _spread(lines)
    found = []
    for heading, y, share, pick in MEASURES:
        series, figures = [], []
        for line in lines:
            points = []
            for member in line["members"]:
                if own := pick(table, member["recipe"]):
                    figures += own
                    score = mean(own)
                    x = names.index(str(member["value"])) if named else _wide(member["x"]) if spread else member["x"]
                    points.append(Point(x, score.value, score.low, score.high))
            if points:
                # values that are no numbers have nothing between them; one line has its name in the title
                series.append(Series(line["line"] if len(lines) > 1 else "", sorted(points, key=lambda p: p.x),
                                     line_colour(table, line), dots=named))
        if series:
            found.append((Panel(
                heading.format(trained=f"{trained_length(table):,}"), AXES.get(axis, lower(lines[0]["plot"])), y,
                series, limits=(-0.03, 1.03) if share else _limits(table, lines, pick), higher=heading != LOSS,
                format_y=percent if share else None, log_x=axis in LOGARITHMIC,
                ticks=_ticks(series, axis in LOGARITHMIC),
                format_x=_namer(names) if named else _narrow if spread else percent if axis in SHARES else None),
                figures))
    if found and (laws := _laws(table, lines)):
        panel, figures = found[0]
        curves = [Series("", band(fit), line_colour(table, lines[place])) for place, fit in laws.items()]
        dots = [replace(s, dots=True) for s in panel.series]
        shown = {member["recipe"] for line in lines for member in line["members"]}
        found[0] = (replace(panel, series=[*dots, *curves], limits=limits([[*panel.series, *curves]])),
                    figures + [f for f in table.find(OF_SEED) if f.variant in shown])
    return found


def _of_one_size(table: Table) -> Lines:
    """The study's lines that are not over sizes."""
    return [line for line in table.about.get("sweeps", []) if line["x"] not in LOGARITHMIC]


def _limits(table: Table, lines: Lines, pick: Pick) -> tuple[float, float]:
    """One range of a measure in all plots that are not over sizes, so that effects can be compared by eye."""
    alike = lines if lines[0]["x"] in LOGARITHMIC else _of_one_size(table)
    scores = [mean(own) for line in alike for member in line["members"] if (own := pick(table, member["recipe"]))]
    if pick is losses and lines[0]["x"] not in LOGARITHMIC:
        shown = near([score.value for score in scores])
        scores = [score for score in scores if score.value in shown]
    return limits([[Series("", [Point(0, s.value, s.low, s.high) for s in scores], 0)]], 0.1)


def _spread(lines: Lines) -> bool:
    """Whether shares lie so close that an even axis would not have room for their numbers."""
    if lines[0]["x"] not in SHARES:
        return False
    places = {member["x"] for line in lines for member in line["members"]}
    return len(_ticks([Series("", [Point(x, 0, 0, 0) for x in places], 0)], logarithmic=False)) < len(places)


def axis_note(lines: Lines) -> str:
    """What the axis of shares is, where it is not even."""
    return f"The axis gives small shares room: it is log(1 + share / {percent(LINEAR)})." if _spread(lines) else ""


def _wide(share: float) -> float:
    return math.log1p(share / LINEAR)


def _narrow(place: float) -> str:
    return percent(LINEAR * math.expm1(place))


def _laws(table: Table, lines: Lines) -> dict[int, Fit]:
    """Place of a line → its power law, over sizes alone."""
    return fits(table, lines) if lines[0]["x"] in LOGARITHMIC else {}


def _namer(names: list[str]) -> Callable[[float], str]:
    return lambda value: names[round(value)] if 0 <= round(value) < len(names) else ""


def _ticks(series: list[Series], logarithmic: bool) -> list[float]:
    """The first and the last x at which a model stands, and those between whose labels touch no other."""
    places = sorted({p.x for one in series for p in one.points})

    def at(place: float) -> float:
        return math.log(place) if logarithmic else place

    first, last = places[0], places[-1]
    room = (at(last) - at(first)) * ROOM
    kept = [first, last] if room else [first]
    for place in reversed(places[1:-1]):
        if all(abs(at(other) - at(place)) >= room for other in kept):
            kept.append(place)
    return sorted(kept)
