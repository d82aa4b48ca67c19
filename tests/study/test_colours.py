"""Colours keep one meaning: a varied model has that of its line wherever it is drawn."""

from __future__ import annotations

from dataclasses import replace

from test_claims import fig
from test_sweep_answer import sizes, table

from hinny.study.collect import Table
from hinny.study.colours import colour, mark
from hinny.study.draw import MARKERS, PALETTE, Panel, draw
from hinny.study.figures import series_of
from hinny.study.sweep_answer import tiles
from hinny.study.sweeps import sweep_plots


def test_a_model_has_the_colour_of_its_line_and_a_marker_of_its_own() -> None:
    made = sizes((3.6, 3.5), (3.3, 3.2))
    names = list(made.about["recipes"])
    assert names == ["Transformer-8e+06", "Transformer-3.1e+07", "Hybrid-8e+06", "Hybrid-3.1e+07"]
    assert [(colour(made, name), mark(made, name)) for name in names] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = series_of(made, "phonebook.exact", "length")
    assert [(series.label, series.colour, series.mark) for series in drawn] == [
        (name, colour(made, name), mark(made, name)) for name in names]
    (plot,) = sweep_plots(made)
    assert [series.colour for series in plot.panels[0].series] == [0, 1]


def test_lines_of_several_plots_differ_and_a_model_on_several_has_that_of_the_longest() -> None:
    made = table()
    # a0.08 stands among the placed ones as well
    assert {name: colour(made, name) for name in made.about["recipes"]} == {
        "a0": 1, "a0.04": 1, "a0.08": 1, "a0.25": 1, "first": 0, "last": 0}
    assert [series.colour for plot in sweep_plots(made) for series in plot.panels[0].series] == [0, 1]
    assert [tile.colour for tile in tiles(made)] == [1, 0]


def test_no_two_of_many_models_share_colour_and_marker() -> None:
    lines = [{"plot": f"plot {n}", "line": "", "x": "value", "members": [
        {"recipe": f"m{n}-{i}", "value": i, "x": float(i)} for i in range(4)]} for n in range(len(PALETTE) + 2)]
    names = [f"m{n}-{i}" for n in range(len(PALETTE) + 2) for i in range(4)]
    made = Table([], {"recipes": {name: {"family": "hybrid", "seq_len": 256} for name in [*names, "apart"]},
                      "predicted": {}, "sweeps": lines})
    looks = [(colour(made, name) % len(PALETTE), (mark(made, name) or 0) % len(MARKERS)) for name in [*names, "apart"]]
    assert len(set(looks)) == len(names) + 1


def test_a_line_of_one_name_keeps_its_colour_on_several_plots_of_many_lines() -> None:
    made = sizes((3.6, 3.5), (3.3, 3.2))
    again = [line | {"plot": "By FLOPs", "x": "flops"} for line in reversed(made.about["sweeps"])]
    both = Table(made.figures, made.about | {"sweeps": [*made.about["sweeps"], *again]})
    assert {(plot.title, series.label, series.colour) for plot in sweep_plots(both)
            for series in plot.panels[0].series} == {
        (title, name, place) for title in ("Loss by size", "By FLOPs")
        for place, name in enumerate(("Transformer", "Hybrid"))}


def test_a_marker_is_drawn_as_it_is_given() -> None:
    made = sizes((3.6, 3.5), (3.3, 3.2))
    found = [*made.figures, *(fig("copy.accuracy", "Hybrid-8e+06", 0.5, 0.1, length=n) for n in (64, 128))]
    (series,) = series_of(Table(found, made.about), "copy.accuracy", "length")
    assert series.model == "Hybrid-8e+06"
    one, other = (draw(Panel("", "x", "y", [replace(series, mark=place)])) for place in (0, 1))
    assert one != other
