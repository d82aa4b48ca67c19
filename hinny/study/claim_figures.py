"""Where on the page the figures stand on which a claim was decided."""

from __future__ import annotations

from hinny.study.claims import Judged
from hinny.study.collect import Table
from hinny.study.figures import Plot
from hinny.study.summary import Line
from hinny.study.sweep_rules import compared
from hinny.study.sweeps import swept

MEASURES, CHANGES = ("measures", "All measures"), ("changes", "What each extension gained and lost")
"""Anchor and heading of the page's tables."""


def shown_by(table: Table, judged: Judged, plots: list[Plot], lines: list[Line]) -> tuple[str, str] | None:
    """Anchor and title of what shows the figures that decided: the plot of what is varied, the first plot by itself of
    these figures, or a table; None where none does.
    """
    if not judged.tested:
        return None
    titles = {plot.id: plot.title for plot in plots}
    if judged.claim.varied:
        names = compared(table, *judged.claim.varied)
        for place, own in enumerate(swept(table).values()):
            if names in [{member["recipe"] for member in line["members"]} for line in own] and (
                    f"sweep{place}" in titles):
                return f"sweep{place}", titles[f"sweep{place}"]
    # the others show many measures, among them these
    own_plots = [plot for plot in plots if plot.id not in ("overview", "pareto") and not plot.id.startswith("sweep")]
    for what in judged.verdict.read:
        # plots of extensions show what was before them as well
        for plot in sorted(own_plots, key=lambda plot: plot.id.startswith("extended") != what.startswith("extended.")):
            if any(figure.what == what for figure in plot.figures):
                return plot.id, plot.title
        if any(figure.what == what for line in lines for figure in line.figures):
            return MEASURES
        if what.startswith("extended.") and table.find("extended.gained"):
            return CHANGES
    return None
