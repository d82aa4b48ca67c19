"""The power laws of a plot over sizes as a table below it, and as a sheet."""

from __future__ import annotations

from typing import Any

import numpy as np

from hinny.study.figures import Facts
from hinny.study.scaling import Fit, crossing, pair_sentence

BENT = "its sizes deviate from the law by more than their seeds explain, so the band is too narrow"
NOTE = ("Curves: power laws with 95 % bands, fitted to all seeds as if each were a measurement of its own: what all "
        "seeds of a size, or one seed at all sizes, have in common is not in the bands.")


def fitted(lines: list[dict[str, Any]], laws: dict[int, Fit]) -> Facts:
    """Each line's exponent with its 95 % interval, and where it meets the first line; laws: by place of the line."""
    names = {place: lines[place]["line"] or "The loss" for place in laws}
    first = next(iter(laws))
    rows, raw = [], []
    for place, one in laws.items():
        low, high = (float(end) for end in np.quantile(one.draws[:, 1], (0.025, 0.975)))
        own = one is laws[first]
        told = [] if own else [pair_sentence(names[first], names[place], laws[first], one)]
        told += [BENT] if one.bent else []
        rows.append([names[place], signed(one.b), f"{signed(low)} to {signed(high)}", "; ".join(told) or "–"])
        meet = None if own else crossing(laws[first], one)
        raw.append([names[place], repr(one.b), repr(low), repr(high), str(one.bent).lower(),
                    "" if meet is None or meet.at is None else repr(meet.at), "" if meet is None else repr(meet.share)])
    head = ["Line", "Exponent of size", "95 % interval",
            f"Beside {names[first]}" if len(laws) > 1 else "Remark"]
    return Facts("fit", "The fitted laws", head, rows, [
        "line", "exponent", "low", "high", "deviates", f"meets {names[first]} at", "share of draws that meet"], raw)


def signed(value: float) -> str:
    """Three digits behind the point, with a proper minus sign."""
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
