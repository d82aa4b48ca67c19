"""The report's first screen: one sentence, at most four numbers, and four small plots that say the most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hinny.study.collect import Table
from hinny.study.colours import colour
from hinny.study.draw import Panel
from hinny.study.figures import Plot, behind, limits, models, seeds_note, series_of, ticks, trained
from hinny.study.multiples import MANY, thinned
from hinny.study.rows import as_rows
from hinny.study.rules import FAILED, percent
from hinny.study.summary import COUNTED, TIMINGS, Line, comparable, leaders, said

CLAUSES, TILES, PANELS = 3, 4, 4
NAMED = 4
"""Names that a sentence has room for."""
WORDS = {"text": ("predicts held-out text best", "held-out text"), "recall": ("recalls phone numbers best", "recall"),
         "decode": ("decodes fastest", "decode speed"), "memory": ("carries the least memory", "memory")}
"""Measure → what its only winner does, and its name."""
ORDER = ("text", "recall", "decode", "memory", "beyond", "pairs", "copying", "training")
"""Measures by importance."""


@dataclass(frozen=True)
class Tile:
    """One key number: the best model's, with its spread, and what the last one has."""

    title: str
    value: str
    unit: str
    who: str
    colour: int | None
    spread: str
    tied: str
    last: str


@dataclass(frozen=True)
class _Clause:
    """What the headline tells of a measure, or of several with the same outcome."""

    weight: int
    """Lower is told first where there is no room for all."""
    subject: str
    """Who; the same subject and verb are told once."""
    verb: str
    topics: tuple[str, ...]
    rest: str = ""
    names: tuple[str, ...] = ()
    """The recipes meant: "7 of 20 models" may be others of another measure."""


def headline(table: Table, lines: list[Line]) -> str:
    """Who won what, in one sentence that says so where seeds or timings do not decide; "" without figures."""
    by_key = _told(lines)
    clauses: dict[tuple[object, ...], _Clause] = {}
    for one in (_clause(table, by_key[key]) for key in WORDS if key in by_key):
        like = (one.subject, one.verb, one.rest, one.names)
        known = clauses.get(like)
        clauses[like] = replace(known, topics=known.topics + one.topics) if known else one
    # text first, then what has one winner, then what was not learned, then what does not tell the models apart
    order = list(clauses.values())
    kept = sorted(order, key=lambda clause: (clause is not order[0] or "text" not in by_key, clause.weight))[:CLAUSES]
    text = "; ".join(" ".join(filter(None, (one.subject, one.verb, " and ".join(one.topics)))) + one.rest
                     for one in sorted(kept, key=order.index))
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _told(lines: list[Line]) -> dict[str, Line]:
    """Measure → its line, where two models have it and their figures can be compared."""
    return {line.measure.key: line for line in lines if len(line.scores) > 1 and comparable(line.figures)}


def _clause(table: Table, line: Line) -> _Clause:
    key, scores = line.measure.key, line.scores
    wins, topic = WORDS[key]
    best = leaders(scores, line.measure.lower)
    # a speed or a size does not depend on the seed
    single = " (one seed)" if key in ("text", "recall") and {f.seeds for f in line.figures} == {1} else ""
    if key == "recall" and max(s.value for s in scores.values()) < FAILED:
        return _Clause(1, "none", "recalls half of the phone numbers", (), single)
    if not best:
        return _Clause(3, topic, "does not tell the models apart", (), single)
    if len(best) == 1:
        return _Clause(0, table.label(best[0]), "", (wins + single,))
    rest = [name for name in scores if name not in best]
    who = said(table, best) if len(best) <= NAMED else f"{len(best)} of {len(scores)} models"
    ahead = f", ahead of {said(table, rest)}" if len(rest) == 1 else ""
    return _Clause(2, who, "tie on", (topic,), ahead + single, tuple(best))


def tiles(table: Table, lines: list[Line]) -> list[Tile]:
    """The best model's number of the most important measures: text and recall, then what tells the models apart."""
    by_key = _told(lines)
    same = {key for key, line in by_key.items() if not leaders(line.scores, line.measure.lower)}
    order = sorted((key for key in ORDER if key in by_key), key=lambda key: key in same - {"text", "recall"})
    return [_tile(table, by_key[key]) for key in order[:TILES]]


def _tile(table: Table, line: Line) -> Tile:
    measure, scores = line.measure, line.scores
    ranked = sorted(scores, key=lambda name: scores[name].value if measure.lower else -scores[name].value)
    best, last = ranked[0], ranked[-1]
    score, form = scores[best], measure.form
    unit = "" if measure.key == "memory" else line.unit
    tied = [name for name in scores if name != best and name in leaders(scores, measure.lower)]
    if form(scores[last].value) == form(score.value) and not leaders(scores, measure.lower):
        return Tile(line.title, form(score.value), unit, f"all {len(scores)} models", None, _spread(line, best), "", "")
    everyone = not leaders(scores, measure.lower)
    apart = ("no model told apart from the others" if everyone else
             f"not told apart from {said(table, tied) if len(tied) < NAMED else f'{len(tied)} others'}" if tied else "")
    return Tile(line.title, form(score.value), unit, table.label(best), colour(table, best), _spread(line, best), apart,
                f"{table.label(last)} {form(scores[last].value)}")


def _spread(line: Line, name: str) -> str:
    score, form = line.scores[name], line.measure.form
    seeds = max(f.seeds for f in line.figures if f.variant == name)
    span = f"{form(score.low)} – {form(score.high)}"
    if line.measure.spread == COUNTED:
        return "counted, so without spread"
    if line.measure.spread == TIMINGS:
        return f"{span}, repeated timings" if score.low != score.high else "timings without a range"
    if score.low == score.high:
        return f"the same for all {seeds} seeds" if seeds > 1 else "one seed, spread unknown"
    return f"{span}, {seeds} seeds" if seeds > 1 else f"{span}, interval of the one seed"


def overview(table: Table) -> Plot | None:
    """Four small plots: loss, recall, decode speed and memory, or what the study has of what comes next to them."""
    parts = [part for make in (_loss, _book("standard", "Phonebook"), _decode, _memory,
                               _book("reversed", "Phonebook, question first"), _copying) if (part := make(table))]
    if not parts:
        return None
    shown = parts[:PANELS]
    # the same measure of length, the same axis
    for kind in {kind for kind, *_ in shown if kind}:
        same = [part for part in shown if part[0] == kind]
        every = [one for _, _, _, panel in same for one in panel.series]
        low, high = min(p.x for s in every for p in s.points), max(p.x for s in every for p in s.points)
        room = (high / low) ** 0.04
        if len(same) > 1 and high > low:
            shown = [(k, what, shape, replace(panel, across=(low / room, high * room), ticks=ticks(every)))
                     if k == kind else (k, what, shape, panel) for k, what, shape, panel in shown]
    panels = [thinned(panel) for *_, panel in shown]
    figures = [f for _, what, shape, _ in shown for f in table.find(what, None, **shape)
               if f.variant in models(table, what)]
    hidden = len(table.about["recipes"]) > MANY
    grey = " In colour the best three of each plot and the last; all are named in the figures below." if hidden else ""
    seeds = [f for f in figures if f.what not in ("decode", "state_bytes")]
    timed = (" Bands of decode speed span repeated timings of one model." if table.find("decode") else "")
    caption = (f"The most important figures. {seeds_note(seeds) if seeds else ''}{timed} Plots over the same kind of "
               f"length share that axis.{grey}")
    return Plot("overview", "At a glance", caption.replace("  ", " "), panels, figures)


Part = tuple[str, str, dict[str, object], Panel]
"""Which axis it shares, the figures' name and shape, and the plot."""


def _loss(table: Table) -> Part | None:
    if series := series_of(table, "held_out_curve", "tokens"):
        return ("", "held_out_curve", {}, Panel("Held-out loss, lower is better", "tokens seen", "nats/token", series,
                                                limits=limits([series]), by_end=True))
    if series := series_of(table, "loss_by_position", "position"):
        series = [replace(s, points=[replace(p, x=max(1, p.x)) for p in s.points]) for s in series]
        return ("", "loss_by_position", {}, Panel("Held-out loss, lower is better", "tokens of context", "nats/token",
                                                  series, log_x=True, ticks=ticks(series), limits=limits([series])))
    return None


def _book(form: str, title: str) -> Callable[[Table], Part | None]:
    def make(table: Table) -> Part | None:
        series = series_of(table, "phonebook.exact", "length", form=form)
        return ("prompt", "phonebook.exact", {"form": form}, Panel(
            f"{title}, higher is better", "prompt, tokens", "numbers exactly right", series, log_x=True,
            limits=(-0.03, 1.03), mark=trained(table), format_y=percent, ticks=ticks(series),
            higher=True)) if series else None
    return make


def _copying(table: Table) -> Part | None:
    series = series_of(table, "copy.accuracy", "length")
    return ("prompt", "copy.accuracy", {}, Panel(
        "Copying, higher is better", "length, tokens", "tokens right", series, log_x=True, limits=(-0.03, 1.03),
        format_y=percent, ticks=ticks(series), higher=True)) if series else None


def _decode(table: Table) -> Part | None:
    series = series_of(table, "decode", "context")
    return _at_contexts("decode", Panel(
        "Decode speed, higher is better", "context, tokens", "tokens/s", series, log_x=True, ticks=ticks(series),
        limits=(0, limits([series])[1]), higher=True, by_end=True)) if series else None


def _memory(table: Table) -> Part | None:
    series = series_of(table, "state_bytes", "context")
    return _at_contexts("state_bytes", Panel(
        "Memory, lower is better", "context, tokens", "bytes per sequence", series, log_x=True, log_y=True,
        ticks=ticks(series), by_end=True)) if series else None


def _at_contexts(what: str, panel: Panel) -> Part | None:
    """The panel over contexts; of a single one a row for each model where there is room, and none where all agree."""
    if len({p.x for series in panel.series for p in series.points}) > 1:
        return "context", what, {}, panel
    if len(panel.series) > MANY or len({p.value for series in panel.series for p in series.points}) == 1:
        return None
    return "", what, {}, as_rows(panel, behind(panel.series), from_zero=what == "state_bytes")
