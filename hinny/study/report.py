"""The report: a study's rows → report.html, one file without any outside resource, and report.md with its plots.

Reads files only. Where the folder still holds the runs, their rows are collected anew first.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from hinny.run import write_atomically
from hinny.study import sweep_answer
from hinny.study.claim_figures import shown_by
from hinny.study.claims import judge
from hinny.study.collect import Figure, Table, collect, read_table
from hinny.study.colours import colour
from hinny.study.draw import PALETTE, draw
from hinny.study.figures import Plot, plots
from hinny.study.longer_figures import changes, extended_plots
from hinny.study.multiples import split
from hinny.study.overview import headline, overview, tiles
from hinny.study.paper_table import paper_table
from hinny.study.pareto import pareto
from hinny.study.plan import Layout
from hinny.study.rules import NOT_SEEN, SEEN, UNCLEAR
from hinny.study.sheets import facts_sheet, link, sheet
from hinny.study.summary import answer, columns, comparable, counted
from hinny.study.svg import inline, standalone
from hinny.study.sweeps import sweep_plots

PLOT_FOLDER = "report_files"
DARK = ("#62b5f5", "#e59bc8", "#ff9a52", "#3fcf9f", "#b3a4e6", "#d6c04a", "#8cc3d3", "#d99b78")
"""The palette of draw, on a dark page."""
MANY = 150
"""Figures of a plot beyond which the page names results/study.json in place of printing them."""
CHANGES = ("extended.gained", "extended.lost", "extended.long_recall", "extended.short_recall")
TRANSPOSED = 6
"""Models beyond which the short table has them as rows."""
MARKS = {SEEN: "✓", NOT_SEEN: "✗", UNCLEAR: "?"}


def report(study: str | Path) -> Path:
    """Write report.html and report.md of the study in folder `study`; returns the path of the former."""
    layout = Layout(Path(study))
    if (layout.root / "runs").is_dir():
        collect(layout.root)
    table = read_table(layout.root)
    content = _content(table)
    drawn = {plot.id: [draw(panel) for panel in plot.panels] for plot in content["plots"]}
    svgs = {plot.id: [inline(svg, f"{plot.id}{i}", html.escape(": ".join(filter(None, (plot.title, panel.title)))))
                      for i, (svg, panel) in enumerate(zip(drawn[plot.id], plot.panels, strict=True))]
            for plot in content["plots"]}
    sheets = {plot.id: sheet(plot.figures) for plot in content["plots"]} | {
        f"{plot.id}-{plot.facts.id}": facts_sheet(plot.facts) for plot in content["plots"] if plot.facts}
    page = template("report.html.j2", escape=True).render(
        **content, svgs=svgs, light=PALETTE, dark=DARK, sheets={name: link(text) for name, text in sheets.items()})
    files = {plot.id: [f"{PLOT_FOLDER}/{plot.id}-{i}.svg" for i in range(len(plot.panels))]
             for plot in content["plots"]}
    for plot in content["plots"]:
        for name, svg in zip(files[plot.id], drawn[plot.id], strict=True):
            write_atomically(layout.root / name, standalone(svg))
    for name, text in sheets.items():
        write_atomically(layout.root / PLOT_FOLDER / f"{name}.csv", text)
    text = template("report.md.j2", escape=False).render(**content, files=files, folder=PLOT_FOLDER)
    write_atomically(layout.root / "report.html", page)
    write_atomically(layout.root / "report.md", text)
    return layout.root / "report.html"


def _content(table: Table) -> dict[str, Any]:
    """Everything that both templates show, made from rows."""
    # what the study tests comes first, each part in the order of the numbers
    judged, lines = sorted(judge(table), key=lambda one: not one.tested), columns(table)
    recipes = table.about["recipes"]
    shown, changed, beside = every_plot(table), changes(table), paper_table(table)
    # where every model is varied, what the variation brings comes before which of all is best
    varied = sweep_answer.begins_with_sweeps(table)
    said = sweep_answer.sentences(table) if varied else []
    return {
        "about": table.about, "answer": [*said, *answer(table, judged)], "lines": lines, "plots": shown,
        "claims": judged, "paper": beside,
        "shown_by": {one.claim.id: shown_by(table, one, shown, lines) for one in judged},
        "headline": (sweep_answer.headline(table) if varied else headline(table, lines)) or title(table),
        "tiles": sweep_answer.tiles(table) if varied else tiles(table, lines),
        "transposed": len(recipes) > TRANSPOSED,
        "labels": {name: table.label(name) for name in [*recipes, *table.about["predicted"]]},
        "colours": {name: colour(table, name) % len(PALETTE) for name in [*recipes, *table.about["predicted"]]},
        "title": title(table), "changes": changed, "marks": MARKS, "verdicts": (SEEN, NOT_SEEN, UNCLEAR),
        "matched": matched_note(table), "spread": spread_note(table), "data_facts": data_facts(table.about["data"]),
        "provenance": {plot.id: provenance(plot.figures) for plot in shown} | {
            "changes": provenance(f for what in CHANGES for f in table.find(what)),
            "paper": provenance(beside.figures if beside else []),
            "short": provenance(figure for line in lines for figure in line.figures),
            "claims": provenance(figure for what in dict.fromkeys(w for j in judged for w in j.verdict.read)
                                 for figure in table.find(what))},
        "digits": {plot.id: values(table, plot.figures) for plot in shown},
    }


def every_plot(table: Table) -> list[Plot]:
    """All plots of the study in the page's order; the overview, where there is one, first."""
    first = sweep_answer.overview(table) if sweep_answer.begins_with_sweeps(table) else overview(table)
    found = [first, *sweep_plots(table), *extended_plots(table), pareto(table),
             *(split(table, plot) for plot in plots(table))]
    return [plot for plot in found if plot is not None]


def title(table: Table) -> str:
    """The report's heading."""
    number = len(table.about["recipes"])
    words = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight"]
    return f"{words[number] if number < len(words) else number} language models, the same data: which is good at what"


def spread_note(table: Table) -> str:
    """What the second line of a table's cell means."""
    seeds = len(table.about["seeds"])
    across = f"the range over {seeds} seeds" if seeds > 1 else "a 95 % interval of the one seed where there is one"
    arrows = "↑ higher is better, ↓ lower is better. " if len(table.about["recipes"]) > TRANSPOSED else ""
    return (f"{arrows}Below each mean: {across}, for speeds the range of repeated timings. Bold: the best, and those "
            f"whose range meets the best one's; none where that is all of them.{_elsewhere(table)}")


def _elsewhere(table: Table) -> str:
    """That speeds of several machines stand side by side, where they do."""
    if all(comparable(table.find(what)) for what in ("train", "decode", "prefill")):
        return ""
    return " Speeds were measured on several machines, so none of them is compared with another."


def matched_note(table: Table) -> str:
    """In what the models are equal, and whether all saw the same tokens."""
    about, recipes = table.about, table.about["recipes"].values()
    match = about.get("match", {"by": "parameters", "context": None})
    what = {"parameters": "Non-embedding parameters", "flops": "Training FLOPs a token",
            "state": f"Bytes of a sequence behind {match['context']} tokens"}[match["by"]]
    groups = len({recipe.get("group", "") for recipe in recipes})
    within = f" in each of {groups} groups of models, and differ from group to group" if groups > 1 else ""
    odd = any(len({recipe.get(key) for recipe in recipes}) > 1 for key in ("tokens", "seq_len")) or any(
        key.startswith("data.") for key in about["differences"])
    tokens = "They were not all trained on the same tokens" if odd else \
        "All were trained on the same tokens in the same order"
    return f"{what} agree within {100 * about['match_tolerance']:g} %{within}. {tokens}"


def provenance(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """What made the figures: for each commit and machine the distinct commands, in order."""
    made: dict[tuple[str, str], dict[str, None]] = {}
    for figure in figures:
        made.setdefault((figure.commit, figure.machine), {}).update(dict.fromkeys(figure.command.split("\n")))
    return [{"commit": commit.replace("\n", ", "), "machine": machine.replace("\n", "; "), "commands": list(commands)}
            for (commit, machine), commands in made.items()]


def values(table: Table, figures: list[Figure]) -> list[dict[str, str]]:
    """The plot's figures as lines of a table: what, shape, model, mean, range; none for more than MANY."""
    return [{"what": f.what, "shape": " ".join(f"{k}={v}" for k, v in f.shape.items()), "model": table.label(f.variant),
             "value": f"{f.value:.5g}", "range": f"{f.low:.5g} – {f.high:.5g}" if f.low != f.high else "",
             "unit": f.unit} for f in figures if len(figures) <= MANY]


def data_facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The data's description as name and value, nested keys with their path."""
    facts = []
    for key, value in data.items():
        children = value.items() if isinstance(value, dict) else [("", value)]
        for child, content in children:
            text = f"{content:,}" if isinstance(content, int) and not isinstance(content, bool) else (
                content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
            facts.append((f"{key} {child}".strip().replace("_", " "), text))
    return facts


def template(name: str, *, escape: bool) -> jinja2.Template:
    """A page's template; `escape`: for HTML."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("hinny.study"), autoescape=escape,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": cell, "whole": whole, "counted": counted}
    return environment.get_template(name)


def cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table, and stays text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def whole(text: str) -> Markup:
    """Text of a page whose names with hyphens are not broken at the end of a line, as far as a phone has room."""
    return Markup(" ").join(Markup('<span class="name">{}</span>').format(word) if "-" in word and len(word) < 20
                            else escape(word) for word in text.split(" "))
