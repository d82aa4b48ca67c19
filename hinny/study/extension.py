"""The page of an extension: what `hinny eval RUN --suite extension` found, before and after, in RUN/extension.json."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hinny.errors import RunError
from hinny.run import write_atomically
from hinny.study.collect import Figure, parse_shape
from hinny.study.draw import PALETTE, Panel, Point, Series, draw
from hinny.study.report import DARK, provenance, template
from hinny.study.rules import percent
from hinny.study.svg import inline

FILE = "extension.json"
LOSSES = (("window_loss", "length", "Loss by context", "The same held-out text read in windows of each length."),
          ("joined_loss_by_position", "position", "Loss by position",
           "Loss at each position of long stretches of held-out documents (start of each range)."))
HEATS = (("phonebook_depth.exact", "Phonebook by depth", "Phone numbers recalled exactly, by the length of the prompt "
          "and by where in the book the entry stands (0: first, 100: last)."),
         ("niah-depth.string_match_all_by_depth", "Needle in a haystack by depth", "RULER's single needle, by the "
          "length of the prompt and by where in the text it stands."))
SHORT: tuple[tuple[str, Callable[[Figure, int], bool], str, str], ...] = (
    ("window_loss", lambda f, base: f.number("length") == base, "Loss at the base's length", "{:.3f}"),
    ("phonebook.exact", lambda f, base: f.number("length") <= base, "Phonebook up to it, exact", "{:.0%}"),
    ("copy.accuracy", lambda f, base: f.number("length") <= base, "Copying up to it", "{:.0%}"),
    ("mqar.accuracy", lambda f, base: True, "Multi-query recall", "{:.0%}"))
"""Figure, which of its rows count beside the base's length, title, form."""


@dataclass(frozen=True)
class Heat:
    """A table of shares: rows are depths, columns lengths."""

    title: str
    lengths: list[int]
    rows: list[tuple[int, list[float | None]]]


def report(run: str | Path) -> Path:
    """Write extension.html and extension.md in the run's folder; returns the former. RunError where there is nothing to
    show."""
    folder = Path(run)
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{folder} has no {FILE}; make it: hinny eval {folder} --suite extension.") from None
    except ValueError as fault:
        raise RunError(f"{folder / FILE} is not JSON: {fault}.") from None
    content = _content(found)
    svgs = [[inline(draw(panel), f"e{i}-{k}", html.escape(panel.title or title)) for k, panel in enumerate(panels)]
            for i, (title, panels, _) in enumerate(content["plots"])]
    page = template("extension.html.j2", escape=True).render(**content, svgs=svgs, light=PALETTE, dark=DARK)
    write_atomically(folder / "extension.html", page)
    write_atomically(folder / "extension.md", template("extension.md.j2", escape=False).render(**content))
    return folder / "extension.html"


def _content(found: dict[str, Any]) -> dict[str, Any]:
    sides = {side: [_figure(row) for row in found[side]] for side in ("before", "after") if found[side]}
    trained, base = found["trained_length"], found["base_length"]
    figures = [figure for side in sides.values() for figure in side]
    plots = [(title, panels, caption) for title, panels, caption in (
        *(_lines(sides, trained, *loss) for loss in LOSSES), _norms(sides, trained)) if panels]
    return {"run": found["run"], "trained": trained, "base_length": base, "base": found["base"],
            "no_base": found["no_base"], "lost": _lost(sides, base), "plots": plots, "heats": _heats(sides),
            "made_by": provenance(figures), "percent": percent, "rows_of": _rows}


def _figure(row: dict[str, Any]) -> Figure:
    low, high = (row["value"] if row[side] is None else row[side] for side in ("low", "high"))
    return Figure(row["what"], row["variant"], parse_shape(row["shape"]), row["value"], low, high, row["unit"], 1,
                  row["command"], row["commit"], row["machine"])


def _lines(sides: dict[str, list[Figure]], trained: int, what: str, axis: str, title: str,
           caption: str) -> tuple[str, list[Panel], str]:
    series = []
    for place, (side, figures) in enumerate(sides.items()):
        found = [f for f in figures if f.what == what and axis in f.shape]
        for folder in dict.fromkeys(f.shape.get("folder", "") for f in found):
            line = sorted((f for f in found if f.shape.get("folder", "") == folder), key=lambda f: f.number(axis))
            points = [Point(max(1, f.number(axis)), f.value, f.low, f.high) for f in line]
            # of a blend a line for each folder
            series.append(Series(f"{side}, {Path(folder).name}" if folder else side, points, place))
    panel = Panel("", f"{axis}, tokens", "nats/token", series, log_x=True, mark=(trained, "extended to"))
    return title, [panel] if series else [], f"{caption} Lower is better; bands are 95 % intervals over sequences."


def _norms(sides: dict[str, list[Figure]], trained: int) -> tuple[str, list[Panel], str]:
    """A panel a side; a line for the layers with the lowest, the middle and the highest norm at the end."""
    panels = []
    for side, figures in sides.items():
        norms = [f for f in figures if f.what == "state_norm.rms"]
        layers = sorted({f.number("layer") for f in norms})
        lines = {layer: sorted((f for f in norms if f.number("layer") == layer), key=lambda f: f.number("position"))
                 for layer in layers}
        order = sorted(layers, key=lambda layer: lines[layer][-1].value)
        shown = dict.fromkeys([order[0], order[len(order) // 2], order[-1]]) if order else {}
        series = [Series(f"layer {layer}", [Point(f.number("position"), f.value, f.low, f.high) for f in lines[layer]],
                         place) for place, layer in enumerate(shown)]
        if series:
            panels.append(Panel(f"States, {side}", "tokens read", "root mean square", series, log_x=True, log_y=True,
                                mark=(trained, "extended to")))
    return ("Norms of SSM states", panels, "Root mean square of a layer's state along the text; the layers that end "
            "lowest, in the middle and highest. A state that grows past what training knew, or collapses, shows here; "
            "bands run from the smallest to the largest sequence.")


def _heats(sides: dict[str, list[Figure]]) -> list[tuple[str, str, list[Heat]]]:
    found = []
    for what, title, caption in HEATS:
        heats = []
        for side, figures in sides.items():
            cells = {(f.number("depth"), f.number("length")): f.value for f in figures if f.what == what}
            lengths, depths = (sorted({key[i] for key in cells}) for i in (1, 0))
            if cells:
                heats.append(Heat(side, lengths, [(d, [cells.get((d, n)) for n in lengths]) for d in depths]))
        if heats:
            found.append((title, caption, heats))
    return found


def _lost(sides: dict[str, list[Figure]], base: int) -> list[tuple[str, list[str]]]:
    """Line by line what short tasks say of each side, and the difference; of a blend a line for each folder.

    Means over what all sides were asked; the loss has its line also where it was not asked.
    """
    lines = []
    for what, counts, title, form in SHORT:
        found = [{tuple(sorted(f.shape.items())): f for f in figures if f.what == what and counts(f, base)}
                 for figures in sides.values()]
        shared = [shape for shape in (found[0] if found else {}) if all(shape in side for side in found)]
        folders = list(dict.fromkeys(dict(shape).get("folder", "") for shape in shared))
        for folder in folders or ([""] if what == "window_loss" and sides else []):
            means = [fmean(values) if (values := [side[shape].value for shape in shared
                                                  if dict(shape).get("folder", "") == folder]) else None
                     for side in found]
            cells = ["–" if mean is None else form.format(mean) for mean in means]
            if len(means) == 2:
                one, two = means
                signed = form.replace("{:", "{:+")
                cells.append("–" if one is None or two is None else signed.format(two - one))
            lines.append((f"{title}, {Path(folder).name}" if folder else title, cells))
    return lines


def _rows(panel: Panel) -> list[tuple[int, list[str]]]:
    """The panel's points as lines of a table: x, and the value of each series there."""
    places = sorted({point.x for series in panel.series for point in series.points})
    values = [{point.x: f"{point.value:.4g}" for point in series.points} for series in panel.series]
    return [(int(x), [one.get(x, "–") for one in values]) for x in places]
