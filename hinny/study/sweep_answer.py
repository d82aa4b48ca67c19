"""What the page of a study says first whose every model stands on a plot of what is varied: of each plot the value at
which text is predicted best, and from where on phone numbers are recalled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hinny.study.collect import Figure, Table
from hinny.study.colours import line_colour
from hinny.study.draw import Panel, short
from hinny.study.edges import edge_note
from hinny.study.figures import Plot, seeds_note
from hinny.study.multiples import LOGARITHMIC, SHARES, lower, value_of
from hinny.study.overview import PANELS, TILES, Tile
from hinny.study.rules import FAILED
from hinny.study.scaling import fits
from hinny.study.scaling_table import signed
from hinny.study.summary import Score, book, leaders, mean
from hinny.study.sweeps import Lines, axis_note, panels, swept, titled

CLAUSES = 2
UNITS = {"parameters": "parameters", "flops": "FLOP"}
NAMED = 3
"""Values that a sentence has room for."""
BESIDE = {"loss, nats/token": "held-out loss, nats/token; lower is better",
          "numbers exactly right": "phone numbers right; higher is better"}
"""What stands at a panel's axis → what stands there where the title is the plot's; the first plot has both."""


@dataclass(frozen=True)
class Stand:
    """One model on a plot: what is varied in it, in words, and what it reached."""

    value: str
    line: str
    x: float | None
    loss: Score
    recall: Score | None
    """Phone numbers right, up to the training length."""


def begins_with_sweeps(table: Table) -> bool:
    """Whether every model of the study stands on a plot of what is varied."""
    members = {member["recipe"] for lines in swept(table).values() for line in lines for member in line["members"]}
    return bool(_plots(table)) and members == set(table.about["recipes"])


def headline(table: Table) -> str:
    """What is best on the plot with the most models, and on the next one that seeds decide, in one sentence."""
    clauses: list[str] = []
    for title, lines in _plots(table):
        stands = _stands(table, lines)
        best = _best(stands)
        if clauses and (len(clauses) == CLAUSES or not best):
            continue
        if lines[0]["x"] in LOGARITHMIC:
            clauses.append(_over_sizes(table, lines))
        elif not best:
            clauses.append(f"{lower(title)}: seeds do not tell losses apart")
        else:
            many = len(best) > NAMED
            shown = [min(best, key=lambda stand: stand.loss.value)] if many else best
            verb = "predicts" if len(shown) == 1 else "predict"
            does = "" if clauses else f" {verb} held-out text best"
            alike = f" ({len(best) - 1} of the {len(stands) - 1} others not told apart from it)" if many else ""
            clauses.append(f"{lower(title)}: {_listed(shown, len(stands))}{does}{alike}")
        if len(clauses) == 1 and (start := _recall(lines, stands, told=True)):
            clauses[0] = f"{clauses[0]}, {start}"
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def sentences(table: Table) -> list[str]:
    """A sentence for each plot, from its figures."""
    found: list[str] = []
    for title, lines in _plots(table):
        stands = _stands(table, lines)
        ranked = sorted(stands, key=lambda stand: stand.loss.value)
        first, last = ranked[0], ranked[-1]
        if lines[0]["x"] in LOGARITHMIC:
            text = f"{_over_sizes(table, lines)}."
        elif best := _best(stands):
            ties = [stand for stand in best if stand is not first]
            apart = f", not told apart from {_listed(ties, len(stands))}" if ties else ""
            text = (f"held-out loss is lowest with {first.value} ({first.loss.value:.3f} nats/token{apart}), highest "
                    f"with {last.value} ({last.loss.value:.3f}).")
        else:
            text = (f"seeds do not tell losses apart ({first.loss.value:.3f} to {last.loss.value:.3f} nats/token; the "
                    f"lowest mean with {first.value}).")
        start = _recall(lines, stands, told=not found)
        found.append(f"{title}: {text}{f' {start[0].upper()}{start[1:]}.' if start else ''}")
    return found


def tiles(table: Table) -> list[Tile]:
    """The best value of each plot; of a plot over sizes the loss of each line's largest model."""
    found: list[Tile] = []
    for title, lines in _plots(table):
        found += _of_sizes(table, lines) if lines[0]["x"] in LOGARITHMIC else [_tile(table, title, lines)]
    return found[:TILES]


def _tile(table: Table, title: str, lines: Lines) -> Tile:
    stands = _stands(table, lines)
    ranked, best = sorted(stands, key=lambda stand: stand.loss.value), _best(stands)
    first, last = ranked[0], ranked[-1]
    ties = [stand for stand in best if stand is not first]
    apart = f"not told apart from {_listed(ties, len(stands))}" if ties else "" if best else "no value told apart"
    return Tile(title, first.value, "lowest loss", f"{first.loss.value:.3f} nats/token",
                _colour(table, lines, first),
                _spread(table, first.loss), apart, f"{last.value}, {last.loss.value:.3f}")


def _colour(table: Table, lines: Lines, stand: Stand) -> int:
    return line_colour(table, next(line for line in lines if line["line"] == stand.line))


def _of_sizes(table: Table, lines: Lines) -> list[Tile]:
    found, laws = [], fits(table, lines)
    for place, line in enumerate(lines):
        if stands := _stands(table, [line]):
            largest = max(stands, key=lambda stand: stand.x or 0)
            law = f"loss goes as size to the {signed(laws[place].b)}" if place in laws else ""
            found.append(Tile(line["line"], f"{largest.loss.value:.3f}", "nats/token", f"at {largest.value}",
                              line_colour(table, line),
                              _spread(table, largest.loss), law, ""))
    return sorted(found, key=lambda tile: float(tile.value))


def _spread(table: Table, score: Score) -> str:
    seeds = len(table.about["seeds"])
    return f"{score.low:.3f} – {score.high:.3f}, {seeds} seeds" if seeds > 1 else "one seed, spread unknown"


def overview(table: Table) -> Plot:
    """At most four panels: loss and recall of the plot with the most models, then the other plots' losses."""
    (title, lines), *rest = _plots(table)
    first = panels(table, lines)
    if rest:
        # the first of recall is that within the trained length
        each = {panel.y: (panel, own) for panel, own in reversed(first) if panel.y in BESIDE}
        shown = [_named(titled(title, lines), *each[y]) for y in BESIDE if y in each]
        shown += [_named(titled(other, those), *panels(table, those)[0]) for other, those in rest]
    else:
        shown = first
    figures, seen = [figure for _, own in shown[:PANELS] for figure in own], [panel for panel, _ in shown[:PANELS]]
    caption = ("The most important figures; each point is a model of its own. Loss: lower is better; recall: higher. "
               f"{seeds_note(figures)} {'All losses have one range. ' if rest else ''}{edge_note(seen)} "
               f"{axis_note(lines)}").strip()
    return Plot("overview", "At a glance", caption, seen, figures)


def _named(title: str, panel: Panel, figures: list[Figure]) -> tuple[Panel, list[Figure]]:
    return replace(panel, title=title, y=BESIDE[panel.y]), figures


def _plots(table: Table) -> list[tuple[str, Lines]]:
    """The plots on which losses are known of two models or more, those with the most models first."""
    found = [(title, lines) for title, lines in swept(table).items() if len(_stands(table, lines)) > 1]
    return sorted(found, key=lambda plot: -sum(len(line["members"]) for line in plot[1]))


def _stands(table: Table, lines: Lines) -> list[Stand]:
    """The models of a plot whose loss is known."""
    found = []
    for line in lines:
        for member in line["members"]:
            losses, books = table.find("held_out_loss", member["recipe"]), book(table, member["recipe"], beyond=False)
            if losses:
                value = _told(line["x"], member)
                found.append(Stand(value if len(lines) == 1 else f"{line['line']} {value}", line["line"], member["x"],
                                   mean(losses), mean(books) if books else None))
    return found


def _told(axis: str, member: dict[str, Any]) -> str:
    """What is varied in a model, in words."""
    return f"{value_of(axis, member)} {UNITS[axis]}" if axis in LOGARITHMIC else value_of(axis, member)


def _best(stands: Iterable[Stand]) -> list[Stand]:
    """Those with the lowest loss that their seeds do not tell apart; none where that is all."""
    by_place = dict(enumerate(stands))
    kept = leaders({str(place): stand.loss for place, stand in by_place.items()}, lower=True)
    return [by_place[int(place)] for place in kept]


def _listed(stands: list[Stand], number: int) -> str:
    if len(stands) > NAMED:
        return f"{len(stands)} of {number} values"
    names = [stand.value for stand in stands]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _recall(lines: Lines, stands: list[Stand], told: bool) -> str:
    """With which values half of the phone numbers are recalled, as part of a sentence; "" where that was not asked, and
    over sizes. told: also where it is all of them or none.
    """
    asked = [stand for stand in stands if stand.recall is not None]
    if len(asked) < 2 or lines[0]["x"] in LOGARITHMIC:
        return ""
    right = [stand for stand in asked if stand.recall is not None and stand.recall.low >= FAILED]
    if not right or len(right) == len(asked):
        every = "all recall half of the phone numbers" if right else "none recalls half of the phone numbers"
        return every if told else ""
    if len(lines) == 1 and lines[0]["x"] in SHARES:
        ordered = sorted(asked, key=lambda stand: stand.x or 0.0)
        if ordered[-len(right):] == [stand for stand in ordered if stand in right]:
            return f"half of the phone numbers are recalled from {ordered[-len(right)].value} on"
    return f"half of the phone numbers are recalled with {_listed(right, len(asked))}"


def _over_sizes(table: Table, lines: Lines) -> str:
    """Which line is best at each size, as part of a sentence; of a single line what size brings."""
    groups: dict[str, list[tuple[str, float, Score]]] = {}
    for line in lines:
        for member in line["members"]:
            if losses := table.find("held_out_loss", member["recipe"]):
                group = table.about["recipes"][member["recipe"]].get("group", "")
                groups.setdefault(group, []).append((line["line"], member["x"], mean(losses)))
    ordered = sorted(groups.values(), key=lambda group: min(x for _, x, _ in group))
    if len(lines) == 1 or any(len({line for line, _, _ in group}) < len(group) for group in ordered):
        every = sorted((one for group in ordered for one in group), key=lambda one: one[1])
        return (f"held-out loss goes from {every[0][2].value:.3f} nats/token at {short(every[0][1])} to "
                f"{every[-1][2].value:.3f} at {short(every[-1][1])}")
    winners = [leaders({line: score for line, _, score in group}, lower=True) for group in ordered]
    if len({tuple(names) for names in winners}) == 1 and winners[0]:
        who = " and ".join(winners[0])
        span = f"{short(ordered[0][0][1])} to {short(ordered[-1][0][1])} {UNITS[lines[0]['x']]}"
        return f"{who} predict{'s' if len(winners[0]) == 1 else ''} held-out text best at every size, {span}"
    runs: list[tuple[list[str], list[str]]] = []
    for names, group in zip(winners, ordered, strict=True):
        if runs and runs[-1][0] == names:
            runs[-1][1].append(short(group[0][1]))
        else:
            runs.append((names, [short(group[0][1])]))
    parts = [f"{' and '.join(names) if names else 'nobody'} at {' and '.join(sizes)}" for names, sizes in runs]
    return f"held-out text is predicted best by {', by '.join(parts)} {UNITS[lines[0]['x']]}"
