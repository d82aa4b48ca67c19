"""The figures of a plot as a sheet of comma-separated values, as a file beside the page and inside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable

from hinny.study.collect import Figure
from hinny.study.figures import Facts

FIXED = ("what", "model", "value", "low", "high", "unit", "seeds", "commit", "machine")


def sheet(figures: Iterable[Figure]) -> str:
    """A line a figure: what and of which recipe, the keys of all shapes as columns of their own, and what made it.

    low and high: of the seeds, or the figure's own interval where there is one seed.
    """
    found = list(figures)
    keys = list(dict.fromkeys(key for figure in found for key in figure.shape))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*FIXED[:2], *keys, *FIXED[2:]])
    for f in found:
        writer.writerow([f.what, f.variant, *(f.shape.get(key, "") for key in keys), repr(f.value), repr(f.low),
                         repr(f.high), f.unit, f.seeds, _line(f.commit), _line(f.machine)])
    return out.getvalue()


def facts_sheet(facts: Facts) -> str:
    """The table below a plot, its numbers as they were computed."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([facts.raw_head, *facts.raw])
    return out.getvalue()


def link(text: str) -> str:
    """A sheet as the address of a link, which a page by itself can offer to save."""
    return f"data:text/csv;base64,{base64.b64encode(text.encode()).decode()}"


def _line(text: str) -> str:
    return text.replace("\n", "; ")
