"""Values far above all others leave the axis to the others, and are told at its edge."""

from __future__ import annotations

import re

import pytest

from hinny.study.draw import Panel, Point, Series, draw
from hinny.study.edges import NOTE, edge_note, leaves, near


@pytest.mark.parametrize(("values", "kept"), [
    ([4.21, 4.17, 4.16, 4.19, 4.97, 4.62], [4.21, 4.17, 4.16, 4.19]),  # two far ones
    ([4.16, 4.17, 4.19, 4.21, 4.24, 4.28], None),                      # ever larger
    ([4.16, 4.17, 4.18, 4.97], None),                                  # too few to be far from
    ([4.16, 4.16, 4.16, 4.97], None),
    ([4.1, 4.2, 4.3, 4.4, 5.5], None),                                 # a gap, but no wider than four times the rest
    ([3.0], None), ([2.0, 3.0], None)])
def test_far_is_what_a_gap_wider_than_four_times_all_below_it_tells_apart(
        values: list[float], kept: list[float] | None) -> None:
    assert near(values) == (values if kept is None else kept)


def points(*values: float) -> list[Point]:
    return [Point(x, value, value - 0.01, value + 0.01) for x, value in enumerate(values)]


@pytest.mark.parametrize("dots", [False, True])
def test_a_far_value_stands_at_the_edge_as_its_number_and_the_caption_says_so(dots: bool) -> None:
    far, near_ = (Series("", points(*values), 1, dots=dots) for values in ((4.2, 4.97, 4.21), (4.2, 4.3)))
    panel = Panel("", "share", "loss", [far, near_], limits=(4.1, 4.4))
    assert [leaves(series, panel.limits) for series in panel.series] == [True, False]
    found = re.findall(r">([^<>]*\N{UPWARDS ARROW}[^<>]*)<", draw(panel))
    assert [text.strip() for text in found] == ["\N{UPWARDS ARROW} 4.97"]
    assert edge_note([panel]) == NOTE
    inside = Panel("", "share", "loss", [near_], limits=(4.1, 4.4))
    assert "\N{UPWARDS ARROW}" not in draw(inside)
    assert edge_note([inside]) == ""
