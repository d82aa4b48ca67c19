"""What an extension gained and lost beside its base: rows of one seed, made from the rows of both runs.

    extended.WHAT           every figure of the extended run, with method= and factor=
    extended.gained         window loss of the base at its own length, minus that of the extended at its own; nats/token
    extended.lost           window loss of the extended at the base's length, minus that of the base; nats/token
    extended.long_recall    mean share right of Phonebook (both forms) and copying at lengths past the base's, up to
                            the extended length
    extended.short_recall   change of the mean share right of Phonebook, copying and multi-query recall up to the base's
                            length
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from hinny.study.longer import Extension

Row = dict[str, Any]
RECALL = ("phonebook.exact", "copy.accuracy")
CURVES = ("train_loss", "held_out_curve")
"""Figures along a training, which belong to no method's comparison."""


def extended_rows(extension: Extension, base: list[Row], own: list[Row]) -> list[Row]:
    """The rows of the extended run, renamed, and what they say beside those of its base."""
    short, long = extension.base.train.seq_len, extension.length
    rows = [{**row, "what": f"extended.{row['what']}", "shape": f"{row['shape']} {extension.shape}".strip()}
            for row in own if row["what"] not in CURVES]

    def add(name: str, value: float | None, unit: str, like: list[Row]) -> None:
        if value is not None:
            rows.append({**like[0], "what": f"extended.{name}", "value": value, "unit": unit, "low": None, "high": None,
                         "shape": extension.shape})

    made = [row for row in own if row["what"] == "window_loss"]
    before, at_length, at_short = _loss(base, short), _loss(own, long), _loss(own, short)
    add("gained", _difference(before, at_length), "nats/token", made)
    add("lost", _difference(at_short, before), "nats/token", made)
    asked = [row for row in own if row["what"] in RECALL]
    add("long_recall", _mean(own, RECALL, short + 1, long), "share", asked)
    after, was = (_mean(some, (*RECALL, "mqar.accuracy"), 0, short) for some in (own, base))
    add("short_recall", _difference(after, was), "share", asked)
    return rows


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _loss(rows: list[Row], length: int) -> float | None:
    found = [row["value"] for row in rows if row["what"] == "window_loss" and _length(row) == length]
    return fmean(found) if found else None


def _mean(rows: list[Row], names: tuple[str, ...], least: int, most: int) -> float | None:
    """The mean over tasks of the mean over their rows at lengths from `least` to `most`; None without any."""
    parts = [[row["value"] for row in rows if row["what"] == name and least <= _length(row) <= most] for name in names]
    means = [fmean(values) for values in parts if values]
    return fmean(means) if means else None


def _length(row: Row) -> int:
    items = dict(item.split("=", 1) for item in row["shape"].split())
    return int(items["length"])
