"""Figures of many models are small multiples with the same axes, or name the best of them and the last."""

from __future__ import annotations

from typing import Any

from test_claims import fig
from test_sweep_answer import line, plain

from hinny.study.collect import Figure, Table
from hinny.study.draw import Panel, Point, Series, draw
from hinny.study.figures import plots
from hinny.study.multiples import split, thinned
from hinny.study.report import every_plot


def curves(name: str, level: float) -> list[Figure]:
    return [fig("held_out_curve", name, level + 1 / n, 0.01, tokens=n * 1_000_000) for n in (1, 2, 4)] + [
        fig("phonebook.exact", name, level / 10, 0.01, form=form, length=n)
        for form in ("standard", "reversed") for n in (64, 512)]


def study(sweeps: list[dict[str, Any]], sizes: dict[str, tuple[str, int]]) -> Table:
    found = [f for place, name in enumerate(sizes) for f in curves(name, 3 + place / 10)]
    recipes = {name: {"family": "hybrid", "seq_len": 256, "group": group, "non_embedding": size}
               for name, (group, size) in sizes.items()}
    return Table(found, {"recipes": recipes, "predicted": {}, "seeds": [1, 2], "samples": 32, "sweeps": sweeps})


def of_sizes() -> Table:
    """Two lines over four sizes."""
    sizes = {f"{name}{n}": (str(n), round(1e6 * n * (1 + off))) for n in (1, 2, 4, 8)
             for name, off in (("t", 0.0), ("h", 0.1))}
    return study([line("Loss by size", label, "parameters", {
        f"{name}{n}": (n, 1e6 * n) for n in (1, 2, 4, 8)}) for name, label in (("t", "Transformer"), ("h", "Hybrid"))],
        sizes)


def of_shares() -> Table:
    """Seven models of one size on two lines; one stands on both."""
    names = [f"a{n}" for n in range(5)] + ["first", "last"]
    return study([line("Attention layers", "", "attention", {f"a{n}": (n, n / 10) for n in (4, 0, 1, 2, 3)}),
                  line("Placed", "", "value", {"a1": ("even", None), "first": ("first", None),
                                               "last": ("last", None)})], dict.fromkeys(names, ("", 1000)))


def test_over_sizes_each_size_has_a_panel_of_each_measure_with_the_same_axes() -> None:
    plot = next(p for p in every_plot(of_sizes()) if p.id == "phonebook")
    assert [panel.title for panel in plot.panels] == [
        f"{size} parameters, question {place}" for size in ("1M to 1.1M", "2M to 2.2M", "4M to 4.4M", "8M to 8.8M")
        for place in ("last", "first")]
    assert {tuple(series.label for series in panel.series) for panel in plot.panels} == {("Transformer", "Hybrid")}
    assert {tuple(series.colour for series in panel.series) for panel in plot.panels} == {(0, 1)}
    learning = next(p for p in every_plot(of_sizes()) if p.id == "learning")
    assert len({(panel.limits, panel.across) for panel in learning.panels}) == 1
    limits = learning.panels[0].limits
    assert limits is not None
    assert all(limits[0] <= p.low and p.high <= limits[1] for panel in learning.panels for s in panel.series
               for p in s.points)
    assert "A panel for each size" in learning.caption


def test_what_is_varied_has_a_panel_each_with_values_as_names_the_first_of_them_pale() -> None:
    plot = next(p for p in every_plot(of_shares()) if p.id == "learning")
    assert [panel.title for panel in plot.panels] == ["Attention layers, held-out text", "Placed, held-out text"]
    shares, placed = ([(plain(s.label), s.colour) for s in panel.series] for panel in plot.panels)
    assert shares == [("0 %", 0), ("10 %", 0), ("20 %", 0), ("30 %", 0), ("40 %", 0)]
    # the model of both lines keeps its colour
    assert placed == [("even", 0), ("first", 1), ("last", 1)]
    shades = [s.shade for s in plot.panels[0].series]
    assert shades == sorted(shades)
    assert (shades[0] < 0.5, shades[-1]) == (True, 1.0)
    assert "opacity" in draw(plot.panels[0])


def test_few_models_stay_in_one_panel() -> None:
    few = of_shares()
    kept = ["a0", "a1", "a2", "first"]
    table = Table([f for f in few.figures if f.variant in kept], few.about)
    found = [plot for plot in plots(table) if plot.id == "learning"]
    assert [split(table, plot) for plot in found] == found


def test_models_that_are_not_varied_are_grey_but_the_best_and_the_last() -> None:
    table = of_shares()
    other = Table(table.figures, table.about | {"sweeps": []})
    plot = next(p for p in every_plot(other) if p.id == "learning")
    assert {s.label for s in plot.panels[0].series if not s.muted} == {"a0", "a1", "a2", "last"}
    assert "In colour the best 3 and the last" in plot.caption


def test_the_best_are_those_of_what_the_panel_is_about() -> None:
    """A model that wins within the trained length and fails beyond it is the best of a recall panel."""
    def series(name: str, *values: float) -> Series:
        return Series(name, [Point(x, v, v, v) for x, v in zip((64, 256, 1024), values, strict=True)], 0, model=name)

    lines = [series("within", 1.0, 1.0, 0.0), *(series(f"m{n}", 0.5, 0.5 + n / 100, 0.6) for n in range(7))]
    kept = {"mark": (256.0, "trained length"), "higher": True}
    named = {s.label for s in thinned(Panel("", "", "", lines, **kept)).series if not s.muted}  # type: ignore[arg-type]
    assert named == {"within", "m6", "m5", "m0"}
    # beyond it, it would be the last
    assert {s.label for s in thinned(Panel("", "", "", lines, higher=True, by_end=True)).series if not s.muted} == {
        "m0", "m1", "m2", "within"}
