"""Which colour and marker a model has, on all of a study's figures and in its tables.

In a study that varies something a model has the colour of its line, and a marker of its own among those of that colour.
"""

from __future__ import annotations

from typing import Any

from hinny.study.collect import Table
from hinny.study.draw import PALETTE, Point, Series

ORDER = ("transformer", "mamba", "mamba2", "hybrid")
"""Families, in the order of their colours."""


def colour(table: Table, variant: str) -> int:
    """A family keeps its colour through the report where the study has one recipe of each; a varied model has that of
    its line, of several the one with the most models.
    """
    lines = line_colours(table)
    if variant in table.about["recipes"] and lines:
        return lines[owner] if (owner := _line(table, variant)) else max(lines.values()) + 1 + _alone(table, variant)
    group = table.about["recipes"] if variant in table.about["recipes"] else table.about["predicted"]
    families = [recipe["family"] for recipe in group.values()]
    if len(set(families)) == len(families) and set(families) <= set(ORDER):
        return ORDER.index(group[variant]["family"])
    return list(group).index(variant)


def mark(table: Table, variant: str) -> int | None:
    """The marker's place among the models of one colour; None where each has a colour of its own."""
    if variant not in table.about["recipes"] or not line_colours(table):
        return None
    own = colour(table, variant) % len(PALETTE)
    alike = [name for name in table.about["recipes"] if colour(table, name) % len(PALETTE) == own]
    return alike.index(variant)


def line_colours(table: Table) -> dict[tuple[str, str], int]:
    """(plot, line) → its colour: another for each line of the study, but one for lines that have one name on several
    plots of many lines.
    """
    found: dict[tuple[str, str], int] = {}
    taken: dict[tuple[str, ...], int] = {}
    sweeps = table.about.get("sweeps", [])
    for line in sweeps:
        several = sum(other["plot"] == line["plot"] for other in sweeps) > 1
        key = (line["line"],) if several else (line["plot"], line["line"])
        found[line["plot"], line["line"]] = taken.setdefault(key, len(taken))
    return found


def line_colour(table: Table, line: dict[str, Any]) -> int:
    """The colour of a line of a plot."""
    return line_colours(table)[line["plot"], line["line"]]


def drawn(table: Table, name: str, points: list[Point], *, muted: bool = False) -> Series:
    """A model's points under its name, in its colour and with its marker."""
    return Series(table.label(name), points, colour(table, name), muted=muted, mark=mark(table, name), model=name)


def _line(table: Table, variant: str) -> tuple[str, str] | None:
    """The line with the most models on which the model stands."""
    found = [line for line in table.about["sweeps"] if any(one["recipe"] == variant for one in line["members"])]
    best = max(found, key=lambda line: len(line["members"]), default=None)
    return (best["plot"], best["line"]) if best else None


def _alone(table: Table, variant: str) -> int:
    """The model's place among those that stand on no line."""
    return [name for name in table.about["recipes"] if _line(table, name) is None].index(variant)
