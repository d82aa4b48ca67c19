"""Quality against speed: the front of hand-made points, and names that lie beside their points."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hinny.study.beside import Box, place, text_width
from hinny.study.collect import Figure, Table, read_table
from hinny.study.draw import draw
from hinny.study.pareto import Spot, front, pareto, steps, unbeaten
from hinny.study.report import report
from hinny.study.summary import Score


def spot(name: str, speed: float, loss: float, wide: float = 0.0) -> Spot:
    return Spot(name, Score(speed, speed - 10 * wide, speed + 10 * wide), Score(loss, loss - wide, loss + wide))


def names(spots: list[Spot]) -> str:
    return "".join(one.name for one in spots)


def test_the_front_is_what_no_point_beats_on_both_slowest_first() -> None:
    #   c is beaten by b, which is faster and better; d by a, as fast and better
    spots = [spot("b", 20, 3.0), spot("c", 15, 3.5), spot("a", 10, 2.0), spot("d", 10, 2.5), spot("e", 40, 4.0)]
    assert names(front(spots)) == "abe"


def test_one_point_may_be_the_whole_front_and_equal_points_share_it() -> None:
    assert names(front([spot("a", 10, 2.0), spot("b", 9, 2.1), spot("c", 8, 2.0)])) == "a"
    assert names(front([spot("a", 10, 2.0), spot("b", 10, 2.0)])) == "ab"
    assert front([]) == []


def test_a_point_beaten_by_its_mean_alone_may_belong_to_the_front() -> None:
    apart = [spot("a", 20, 2.0, wide=0.1), spot("b", 10, 3.0, wide=0.1)]
    assert names(unbeaten(apart)) == "a"
    near = [spot("a", 20, 2.0, wide=0.1), spot("b", 10, 2.1, wide=0.1)]
    assert names(front(near)) == "a"
    assert names(unbeaten(near)) == "ab", "their losses cannot be told apart"


def figure(what: str, variant: str, value: float, **shape: str) -> Figure:
    return Figure(what, variant, shape, value, value * 0.98, value * 1.02, "", 2, "hinny bench", "0" * 12, "CPU")


def table(number: int, decode: bool = True) -> Table:
    found = []
    for i in range(number):
        found += [figure("held_out_loss", f"m{i}", 3 + 0.4 * i), figure("train", f"m{i}", 1000 * 0.8 ** i)]
        found += [figure("decode", f"m{i}", 100 + 5 * i, context=str(c)) for c in (64, 4096)] if decode else []
    recipes = {f"m{i}": {"family": "hybrid"} for i in range(number)}
    return Table(found, {"recipes": recipes, "predicted": {}})


def test_the_plot_has_the_panels_that_the_study_has_both_figures_for() -> None:
    plot = pareto(table(3))
    assert plot is not None
    assert [panel.title for panel in plot.panels] == ["Training", "Decoding after 4,096 tokens"]
    assert plot.panels[0].limits == plot.panels[1].limits
    assert {f.what for f in plot.figures} == {"held_out_loss", "train", "decode"}
    assert len(plot.figures) == 9
    assert {f.shape["context"] for f in plot.figures if f.what == "decode"} == {"4096"}
    alone = pareto(table(3, decode=False))
    assert alone is not None
    assert [panel.title for panel in alone.panels] == ["Training"]
    assert pareto(table(1)) is None
    assert pareto(Table([], {"recipes": {"a": {"family": "mamba"}}, "predicted": {}})) is None


def test_means_and_ranges_are_drawn_and_the_caption_names_the_front(study_folder: Path) -> None:
    report(study_folder)
    study = read_table(study_folder)
    plot = pareto(study)
    assert plot is not None
    for series in plot.panels[0].series:
        (name,) = (n for n in study.about["recipes"] if study.label(n) == series.label)
        loss, speed = study.one("held_out_loss", name), study.one("train", name)
        assert loss is not None
        assert speed is not None
        (point,) = series.points
        assert (point.x, point.value, point.low, point.high) == (speed.value, loss.value, loss.low, loss.high)
        assert point.across == (speed.low, speed.high)
    assert "Training: Mamba-2-Hybrid" in plot.caption


def test_of_many_models_the_clearly_beaten_are_grey_and_have_no_name() -> None:
    plot = pareto(table(12))
    assert plot is not None
    # the first is the fastest to train and the best, far from all others
    assert [s.label for s in plot.panels[0].series if not s.muted] == ["m0"]
    assert "In grey" in plot.caption
    assert len(plot.figures) == 36


def test_a_name_with_signs_of_markup_is_drawn_as_it_is() -> None:
    study = table(2)
    for what in study.about["recipes"].values():
        what["family"] = "other"
    odd = "a<b>&$x$"
    renamed = Table([Figure(**{**f.__dict__, "variant": odd if f.variant == "m0" else f.variant})
                     for f in study.figures], {**study.about, "recipes": {odd: {"family": "other"},
                                                                          "m1": {"family": "other"}}})
    plot = pareto(renamed)
    assert plot is not None
    svg = draw(plot.panels[0])
    assert "a&lt;b&gt;&amp;$x$" in svg
    assert "<b>" not in svg


def meet(a: Box, b: Box) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > 0.01 and min(a[3], b[3]) - max(a[1], b[1]) > 0.01


@pytest.mark.parametrize("number", [4, 9])
def test_names_lie_beside_their_points_in_the_frame_and_on_nothing_else(number: int) -> None:
    spots = [(150 + 6.0 * i, 90 + 9.0 * (i * 5 % number), f"model-number-{i}") for i in range(number)]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in spots]
    frame, size = (40.0, 35.0, 310.0, 240.0), 9.0
    boxes = [(x, y - 5.1, x + 72 * text_width(name, size), y + 5.1)
             for (x, y, _), (*_, name) in zip(place(spots, taken, [], frame, size), spots, strict=True)]
    for a, b in itertools.combinations(boxes, 2):
        assert not meet(a, b)
    for box in boxes:
        assert not any(meet(box, other) for other in taken)
        assert frame[0] <= box[0]
        assert box[2] <= frame[2]


def test_a_logarithmic_axis_of_speeds_has_round_labels() -> None:
    assert steps(800, 25_000) == [1000, 2000, 5000, 10_000, 20_000]
