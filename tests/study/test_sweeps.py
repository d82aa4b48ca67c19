"""The laws fitted to a study's sizes are those that made them, and every varied model stands on its plot."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_claims import fig

from hinny.study import conduct
from hinny.study.collect import Figure, Table
from hinny.study.draw import draw
from hinny.study.rules import percent
from hinny.study.scaling import Crossing, band, crossing, fit
from hinny.study.scaling_table import fitted
from hinny.study.sheets import facts_sheet
from hinny.study.summary import answer
from hinny.study.sweeps import sweep_plots

SIZES = [8e6, 17e6, 31e6]


def made(a: float, b: float, noise: float = 0.0, seed: int = 0) -> tuple[list[float], list[float]]:
    """Two seeds at each size of loss = exp(a) x^b."""
    rng = np.random.default_rng(seed)
    sizes = [size for size in SIZES for _ in range(2)]
    return sizes, [math.exp(a + b * math.log(x) + noise * rng.standard_normal()) for x in sizes]


def test_a_law_without_noise_is_found_again() -> None:
    found = fit(*made(2.0, -0.07))
    assert found is not None
    assert (found.a, found.b) == (pytest.approx(2.0, abs=1e-9), pytest.approx(-0.07, abs=1e-10))
    value, low, high = found.loss(1e7)
    assert value == pytest.approx(math.exp(2.0) * 1e7 ** -0.07, rel=1e-9)
    assert high - low < 1e-6


def test_the_band_holds_the_true_curve_nineteen_times_of_twenty() -> None:
    true, inside = math.exp(2.0) * 17e6 ** -0.07, 0
    for seed in range(300):
        found = fit(*made(2.0, -0.07, 0.01, seed))
        assert found is not None
        _, low, high = found.loss(17e6)
        inside += low <= true <= high
    # of 300, 285 are expected, with a standard deviation of 4
    assert 270 <= inside <= 298


def test_the_line_is_least_squares_of_logarithms_and_the_same_every_time() -> None:
    sizes, losses = made(2.0, -0.07, 0.02)
    one, again = fit(sizes, losses), fit(sizes, losses)
    assert one is not None
    assert again is not None
    b, a = np.polyfit(np.log(sizes), np.log(losses), 1)
    assert (one.a, one.b) == (pytest.approx(a, rel=1e-8), pytest.approx(b, rel=1e-8))
    assert band(one) == band(again)
    assert [band(one)[i].x for i in (0, -1)] == [pytest.approx(SIZES[0]), pytest.approx(SIZES[-1])]


def test_two_laws_meet_where_they_are_equal() -> None:
    steep, flat = fit(*made(2.0, -0.08, 1e-5, 1)), fit(*made(2.0 - 0.02 * math.log(2e7), -0.06, 1e-5, 2))
    assert steep is not None
    assert flat is not None
    found = crossing(steep, flat)
    assert found is not None
    assert found.at == pytest.approx(2e7, rel=0.01)
    assert found.unsure == pytest.approx((2e7, 2e7), rel=0.05)
    assert (found.inside, found.share > 0.99) == (True, True)
    above = fit(*made(2.1, -0.08, 1e-5, 3))
    assert above is not None
    assert crossing(steep, above) == Crossing(None, False, None, pytest.approx(0.0, abs=0.01))
    larger = fit([1e9, 2e9, 4e9], [3.0, 2.9, 2.8])
    assert larger is not None
    assert crossing(steep, larger) is None


def test_where_two_laws_meet_is_within_the_sizes_told_as_unsure_nineteen_times_of_twenty() -> None:
    inside = 0
    for seed in range(200):
        steep = fit(*made(2.0, -0.08, 0.003, 2 * seed))
        flat = fit(*made(2.0 - 0.02 * math.log(2e7), -0.06, 0.003, 2 * seed + 1))
        assert steep is not None
        assert flat is not None
        found = crossing(steep, flat)
        assert found is not None
        inside += found.unsure is not None and found.unsure[0] <= 2e7 <= found.unsure[1]
    # of 200, 190 are expected, with a standard deviation of 3
    assert 180 <= inside <= 200


@pytest.mark.parametrize(("at", "noise", "words"), [
    (2e7, 2e-3, r"T and H meet at \d\dM \(not told apart from 1\dM to \d\dM\), past which T is lower"),
    (2e7, 0.1, "T and H are not told apart at any size trained"),
    (1e8, 1e-4, r"H is below T between the sizes trained; extended past the largest, which nothing here tests, the "
                r"curves meet at [\d.]+M \(\d+ % of draws meet up to 10 times it\)"),
    (1e12, 1e-4, r"H is below T between the sizes trained")])
def test_a_crossing_is_told_with_its_range_and_past_the_sizes_trained_as_what_it_is(
        at: float, noise: float, words: str) -> None:
    flat, steep = fit(*made(2.0 - 0.02 * math.log(at), -0.06, noise, 2)), fit(*made(2.0, -0.08, noise, 1))
    assert steep is not None
    assert flat is not None
    facts = fitted([{"line": "T"}, {"line": "H"}], {0: steep, 1: flat})
    assert facts.head[-1] == "Beside T"
    first, second = facts.rows
    assert re.fullmatch(words, second[3]), second
    assert (first[0], first[3], second[0]) == ("T", "–", "H")
    assert [row[:2] for row in fitted([{"line": ""}], {0: steep}).rows] == [["The loss", first[1]]]


def test_the_laws_are_a_table_with_proper_minus_signs_and_a_sheet_with_all_digits() -> None:
    one = fit(*made(2.0, -0.08, 1e-5, 1))
    assert one is not None
    facts = fitted([{"line": "T"}], {0: one})
    ((name, exponent, interval, remark),) = facts.rows
    assert (name, exponent, interval, remark) == (
        "T", "\N{MINUS SIGN}0.080", "\N{MINUS SIGN}0.080 to \N{MINUS SIGN}0.080", "–")
    head, row = csv.reader(facts_sheet(facts).splitlines())
    told = dict(zip(head, row, strict=True))
    assert float(told["exponent"]) == one.b
    assert float(told["low"]) < one.b < float(told["high"])
    assert told["deviates"] == "false"


def test_sizes_that_deviate_from_a_law_by_more_than_their_seeds_say_so() -> None:
    straight = [fit(*made(2.0, -0.07, 0.01, seed)) for seed in range(200)]
    # 10 of 200 are expected, with a standard deviation of 3
    assert 1 <= sum(one is not None and one.bent for one in straight) <= 20
    sizes, losses = made(2.0, -0.07, 0.001)
    bent = fit(sizes, [loss * (1.02 if x == SIZES[1] else 1.0) for x, loss in zip(sizes, losses, strict=True)])
    assert bent is not None
    assert bent.bent
    assert "by more than their seeds explain" in fitted([{"line": "T"}], {0: bent}).rows[0][3]
    alone = fit(SIZES, [3.0, 2.9, 2.88])
    assert alone is not None
    assert not alone.bent


def test_two_sizes_make_no_law() -> None:
    assert fit([8e6, 8e6, 17e6, 17e6], [3.0, 3.01, 2.9, 2.91]) is None


def table(x: str, values: dict[str, list[Any]], places: dict[str, list[float | None]]) -> Table:
    figures: list[Figure] = []
    lines = []
    for line, names in values.items():
        members = []
        for name, place in zip(names, places[line], strict=True):
            recipe = f"{line}-{name}"
            loss = 3.0 + 0.01 * len(figures)
            figures += [fig("held_out_loss", recipe, loss, 0.02), fig("mqar.accuracy", recipe, 0.5, 0.1, pairs=8),
                        fig("mqar.accuracy", recipe, 0.7, 0.1, pairs=32)]
            figures += [fig("held_out_loss_of_seed", recipe, loss + side, 0.0, 1, seed=seed)
                        for seed, side in ((1, -0.02), (2, 0.02))]
            members.append({"recipe": recipe, "value": name, "x": place})
        lines.append({"plot": "Varied", "line": line, "x": x, "members": members})
    recipes = {m["recipe"]: {"family": "hybrid", "seq_len": 256} for line in lines for m in line["members"]}
    return Table(figures, {"recipes": recipes, "predicted": {}, "sweeps": lines})


def test_a_panel_for_each_measure_has_every_model_of_every_line_at_its_place() -> None:
    (plot,) = sweep_plots(table("attention", {"half": [0, 8], "none": [0, 8, 25]},
                                {"half": [0.0, 0.08], "none": [0.0, 0.08, 0.25]}))
    assert plot.title == "Varied"
    assert [panel.title for panel in plot.panels] == ["Held-out text", "Multi-query recall"]
    loss, recall = plot.panels
    assert [(s.label, [p.x for p in s.points]) for s in loss.series] == [("half", [0.0, 0.08]),
                                                                        ("none", [0.0, 0.08, 0.25])]
    # the mean of its figures, and of their ranges
    first = recall.series[0].points[0]
    assert (first.value, first.low) == (pytest.approx(0.6), pytest.approx(0.5))
    assert loss.format_x is not None
    assert loss.format_x(0.08) == "8\N{NO-BREAK SPACE}%"
    assert {f.variant for f in plot.figures} == {"half-0", "half-8", "none-0", "none-8", "none-25"}
    assert "<svg" in draw(loss)


def test_values_that_are_no_numbers_stand_beside_each_other_under_their_names() -> None:
    (plot,) = sweep_plots(table("value", {"placed": ["even", "first"]}, {"placed": [None, None]}))
    panel = plot.panels[0]
    assert [p.x for p in panel.series[0].points] == [0, 1]
    assert panel.format_x is not None
    assert [panel.format_x(p.x) for p in panel.series[0].points] == ["even", "first"]
    text = draw(panel)
    assert ">even<" in text
    assert ">first<" in text


def test_the_title_has_what_one_line_is_and_the_axis_has_words() -> None:
    (plot,) = sweep_plots(table("value", {"placed": ["even", "first"]}, {"placed": [None, None]}))
    assert plot.title == "Varied (placed)"
    assert "Points are means over two seeds, bars run from" in plot.caption
    assert {series.label for panel in plot.panels for series in panel.series} == {""}
    assert {panel.x for panel in plot.panels} == {"varied"}


def test_losses_of_all_plots_have_one_range_but_those_over_sizes() -> None:
    made = table("value", {"a": [1, 2], "b": [1, 2]}, {"a": [1.0, 2.0], "b": [1.0, 2.0]})
    made.about["sweeps"][1]["plot"] = "Another"
    one, other = sweep_plots(made)
    assert one.panels[0].limits == other.panels[0].limits
    assert one.panels[0].limits is not None
    assert one.panels[0].limits[0] < min(f.low for f in made.figures if f.what == "held_out_loss")
    assert "Losses have one range" in one.caption
    made.about["sweeps"][1]["x"] = "parameters"
    one, other = sweep_plots(made)
    assert one.panels[0].limits != other.panels[0].limits
    assert "one range" not in one.caption + other.caption


def test_recall_says_up_to_and_beyond_what() -> None:
    made = table("value", {"a": [1, 2]}, {"a": [1.0, 2.0]})
    book = [fig("phonebook.exact", name, 0.5, 0.1, form="standard", length=n) for name in ("a-1", "a-2")
            for n in (64, 512)]
    (plot,) = sweep_plots(Table([*made.figures, *book], made.about))
    assert [panel.title for panel in plot.panels][1:3] == ["Phonebook up to 256 tokens", "Phonebook beyond 256 tokens"]


def test_sizes_get_a_law_with_its_band_and_say_where_two_laws_meet() -> None:
    sizes: dict[str, list[float | None]] = {"T": [*SIZES], "H": [*SIZES]}
    (plot,) = sweep_plots(table("parameters", {"T": [1, 2, 3], "H": [1, 2, 3]}, sizes))
    panel = plot.panels[0]
    assert [(s.label, s.dots, len(s.points)) for s in panel.series] == [
        ("T", True, 3), ("H", True, 3), ("", False, 25), ("", False, 25)]
    assert plot.facts is not None
    assert re.search("T is below H|T and H", plot.facts.rows[1][3])
    assert "95 % bands" in plot.caption
    assert {f.what for f in plot.figures} >= {"held_out_loss_of_seed"}
    assert "<svg" in draw(panel)


def test_the_ranges_of_speeds_are_those_of_timings_and_a_plot_has_its_own_seeds_alone() -> None:
    sizes: dict[str, list[float | None]] = {"T": [*SIZES], "H": [*SIZES]}
    made = table("parameters", {"T": [1, 2, 3], "H": [1, 2, 3]}, sizes)
    made.about["sweeps"][1]["plot"] = "Another"
    one, other = sweep_plots(made)
    assert {f.variant for f in one.figures} == {"T-1", "T-2", "T-3"}
    assert {f.variant for f in other.figures} == {"H-1", "H-2", "H-3"}
    assert "timings" not in one.caption
    timed = Table([*made.figures, fig("train", "T-1", 900, 20, 1)], made.about)
    caption = sweep_plots(timed)[0].caption
    assert "means over two seeds" in caption
    assert "Bands of training speed span repeated timings" in caption


def test_the_answer_says_where_models_are_of_several_sizes() -> None:
    sizes: dict[str, list[float | None]] = {"T": [*SIZES]}
    made = table("parameters", {"T": [1, 2, 3]}, sizes)
    assert not any("groups of models" in part for part in answer(made, []))
    for place, recipe in enumerate(made.about["recipes"].values()):
        recipe["group"] = str(place)
    assert any("These are 3 groups of models" in part for part in answer(made, []))


def test_labels_of_an_axis_do_not_touch() -> None:
    shares = [0.0, 0.02, 0.04, 0.08, 0.17, 0.25, 0.5]
    (plot,) = sweep_plots(table("attention", {"l": [*range(7)]}, {"l": [*shares]}))
    panel = plot.panels[0]
    assert panel.format_x is not None
    assert [panel.format_x(tick) for tick in panel.ticks] == [percent(share) for share in shares]
    assert [p.x for p in panel.series[0].points] == panel.ticks
    assert "log(1 + share / 4\N{NO-BREAK SPACE}%)" in plot.caption
    # an axis with room for all of them stays even
    (plot,) = sweep_plots(table("attention", {"l": [0, 1, 2]}, {"l": [0.0, 0.3, 0.5]}))
    assert plot.panels[0].ticks == [0.0, 0.3, 0.5]
    assert "log(1" not in plot.caption
    (plot,) = sweep_plots(table("parameters", {"T": [1, 2, 3, 4]}, {"T": [1e6, 1.1e6, 2e6, 4e6]}))
    assert plot.panels[0].ticks == [1e6, 2e6, 4e6]


def test_a_study_that_varies_nothing_has_no_such_plot() -> None:
    assert sweep_plots(Table([], {"recipes": {}, "predicted": {}})) == []


def test_the_terminal_shows_many_models_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(models: int) -> list[str]:
        names = list(range(models))
        made = table("attention", {"m": names}, {"m": [float(n) for n in names]})
        monkeypatch.setattr(conduct, "read_table", lambda _: made)
        conduct.print_table(Path(), console := Console(width=200, record=True, file=io.StringIO()))
        return [line.strip() for line in console.export_text().splitlines() if line.strip()]

    few, many = lines(2), lines(7)
    assert [line.split()[0] for line in few[1:]] == ["Held-out", "Multi-query"]
    assert [line.split()[0] for line in many[1:]] == [f"m-{n}" for n in range(7)]
    assert many[0].split() == ["Held-out", "loss", "(nats/token)", "Multi-query", "recall", "(right)"]
    assert few[1].split()[-2:] == [many[1].split()[1], many[2].split()[1]]
