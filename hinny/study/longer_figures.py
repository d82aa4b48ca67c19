"""The report's plots of extensions: a panel for each model and length, a line for each method beside the base."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hinny.study.collect import Figure, Table
from hinny.study.draw import Panel, Point, Series
from hinny.study.figures import Plot, limits, seeds_note, ticks
from hinny.study.longer_rules import methods
from hinny.study.rules import percent
from hinny.study.tasks import RULER_MEAN

BEFORE = "before"
METHODS = 4
"""Colour of the first method: behind those that four families have."""


@dataclass(frozen=True)
class Change:
    """What one extension gained and lost, means with their ranges as text; the last line of its table."""

    recipe: str
    method: str
    factor: int
    gained: str
    lost: str
    long_recall: str
    short_recall: str


def changes(table: Table) -> list[Change]:
    """A line for each extension that has figures."""
    found = []
    for recipe in table.about["recipes"]:
        for method, at in methods(table, recipe).items():
            for factor, _ in at:
                def told(what: str, form: str, recipe: str = recipe, method: str = method, factor: int = factor) -> str:
                    return _text(table.one(f"extended.{what}", recipe, method=method, factor=factor), form)

                found.append(Change(table.label(recipe), method, factor, told("gained", "{:+.3f}"),
                                    told("lost", "{:+.3f}"), told("long_recall", "{:.0%}"),
                                    told("short_recall", "{:+.0%}")))
    return found


def sentence(table: Table) -> str:
    """Which method gained most for each model at its longest extension, and how well it recalls there."""
    parts = []
    for recipe in table.about["recipes"]:
        at = [(factor, length, method) for method, pairs in methods(table, recipe).items() for factor, length in pairs]
        if not at:
            continue
        factor, longest, _ = max(at)
        found = table.find("extended.gained", recipe, factor=factor)
        if not found:
            continue
        best = max(found, key=lambda figure: figure.value)
        recall = table.one("extended.long_recall", recipe, factor=factor, method=best.shape["method"])
        book = "" if recall is None else f", {percent(recall.value)} of the longer recall right"
        parts.append((longest, f"{table.label(recipe)} {best.value:+.3f} nats/token ({best.shape['method']}{book})"))
    if not parts:
        return ""
    if len({length for length, _ in parts}) > 1:
        told = "; ".join(f"at {length:,} tokens {text}" for length, text in parts)
        return f"Extended, gained by the longer context: {told}."
    return f"Extended to {parts[0][0]:,} tokens, gained by the longer context: {'; '.join(text for _, text in parts)}."


def _text(figure: Figure | None, form: str) -> str:
    if figure is None:
        return "–"
    value, low, high = (form.format(number).replace("-", "\N{MINUS SIGN}").replace("%", "\N{NO-BREAK SPACE}%")
                        for number in (figure.value, figure.low, figure.high))
    return value if low == high else f"{value} ({low} to {high})"


def extended_plots(table: Table) -> list[Plot]:
    """Every plot of extensions for which the study has figures."""
    found = [_plot(table, "extended_windows", "Extension: loss by context", "window_loss", "length", {},
                   "Loss on the same held-out text read in windows of each length, lower is better.",
                   "window, tokens", "loss, nats/token"),
             _plot(table, "extended_positions", "Extension: loss by position", "joined_loss_by_position", "position",
                   {},
                   "Loss by position in one long stretch of held-out documents (start of each range), lower is better.",
                   "position, tokens", "loss, nats/token", least=64),
             _plot(table, "extended_phonebook", "Extension: Phonebook", "phonebook.exact", "length",
                   {"form": "standard"}, "Phone numbers recalled exactly, by the length of the prompt, higher is "
                   "better.", "prompt, tokens", "numbers exactly right", share=True),
             _plot(table, "extended_copy", "Extension: copying", "copy.accuracy", "length", {},
                   "Tokens of a random string repeated rightly, by length, higher is better.", "length, tokens",
                   "tokens right", share=True),
             _plot(table, "extended_ruler", "Extension: RULER", RULER_MEAN, "length", {}, "Mean over RULER's tasks of "
                   "the share of the answers that the model wrote, by length, higher is better.", "length, tokens",
                   "answers written", share=True)]
    return [plot for plot in found if plot is not None]


def _plot(table: Table, name: str, title: str, what: str, axis: str, shape: dict[str, object], caption: str, x: str,
          y: str, *, share: bool = False, least: int = 0) -> Plot | None:
    parts: list[tuple[str, int, list[Series]]] = []
    figures: list[Figure] = []
    # a method has one colour in all panels
    every = dict.fromkeys(method for recipe in table.about["recipes"] for method in methods(table, recipe))
    colours = {method: METHODS + place for place, method in enumerate(every)}
    for recipe in table.about["recipes"]:
        at = methods(table, recipe)
        lengths = dict.fromkeys(sorted(pair for pairs in at.values() for pair in pairs))
        before = [f for f in table.curve(what, recipe, axis, **shape) if f.number(axis) >= least]
        for factor, length in lengths:
            series = [replace(_series(BEFORE, before, axis, 0), dashed=True, ink=True)] if before else []
            figures += [f for f in before if f not in figures]
            for method in at:
                line = [f for f in table.curve(f"extended.{what}", recipe, axis, method=method, factor=factor, **shape)
                        if f.number(axis) >= least]
                if line:
                    series.append(_series(method, line, axis, colours[method]))
                    figures += line
            if len(series) > 1:
                parts.append((f"{table.label(recipe)} to {length:,}", length, series))
    if not parts:
        return None
    bounds = (-0.03, 1.03) if share else _bounded([series for _, _, series in parts])
    panels = [Panel(heading, x, y, series, log_x=True, limits=bounds, mark=(length, "extended to"), ticks=ticks(series),
                    format_y=percent if share else None) for heading, length, series in parts]
    note = ("Dashed: the model before. The dashed upright line is the length that it was extended to. Lines that leave "
            "the frame are worse than all that it shows. ")
    return Plot(name, title, f"{caption} {note}{seeds_note(figures)}", panels, figures)


def _series(label: str, figures: list[Figure], axis: str, colour: int) -> Series:
    points = [Point(max(1, f.number(axis)), f.value, f.low, f.high) for f in figures]
    return Series(label, points, colour)


def _bounded(panels: list[list[Series]]) -> tuple[float, float]:
    """One range of losses for all panels, from the lowest to one nat above it: what fails would flatten the rest."""
    low, high = limits(panels)
    return low, min(high, low + 1.0)
