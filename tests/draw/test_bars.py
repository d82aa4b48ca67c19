"""Bars stand over their ranges, as high as they say, in a drawing that is the same every time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from hinny.draw.bars import FILLS, Bars, Mark, binary, draw_bars

SVG = "{http://www.w3.org/2000/svg}"
EDGES = [256.0, 512.0, 1024.0, 2048.0]


def drawn(values: list[float], mark: Mark | None = None) -> str:
    return draw_bars(EDGES, [Bars("of documents", values), Bars("of tokens", [0.1, 0.2, 0.3])], title="Lengths",
                     x="tokens", y="share", mark=mark)


def bars(svg: str, colour: str) -> list[tuple[float, float, float]]:
    """Left, right and height of the filled rectangles of a colour, in points."""
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"fill: {colour}" in path.get("style", "") and path.get("clip-path"):
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
            found.append((min(numbers[::2]), max(numbers[::2]), max(numbers[1::2]) - min(numbers[1::2])))
    return found


def test_a_bar_is_as_high_as_its_value_and_as_wide_as_all_others() -> None:
    first, second = (bars(drawn([0.5, 0.25, 0.125]), colour) for colour in FILLS[:2])
    unit = first[0][2] / 0.5
    assert [height / unit for _, _, height in first] == pytest.approx([0.5, 0.25, 0.125], rel=1e-4)
    assert [height / unit for _, _, height in second] == pytest.approx([0.1, 0.2, 0.3], rel=1e-4)
    widths = [right - left for left, right, _ in first + second]
    assert widths == pytest.approx([widths[0]] * 6, rel=1e-3)
    # side by side, and those of a range before those of the next
    edges = [x for one, other in zip(first, second, strict=True) for x in (*one[:2], *other[:2])]
    assert edges == pytest.approx(sorted(edges), abs=1e-3)


def test_axes_title_series_and_mark_are_named() -> None:
    svg = drawn([0.5, 0.25, 0.25], Mark(1024.0, "here"))
    said = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"Lengths", "tokens", "share", "of documents", "of tokens", "here", "256", "512", "1K", "2K"} <= set(said)
    assert "here" not in drawn([0.5, 0.25, 0.25])


def test_a_mark_beyond_the_bars_is_in_the_drawing() -> None:
    """The axis goes as far as the mark: bars are narrower."""
    near, far = (bars(drawn([0.5, 0.3, 0.2], Mark(x, "m")), FILLS[0]) for x in (600.0, 2.0**20))
    assert far[0][1] - far[0][0] < 0.5 * (near[0][1] - near[0][0])


def test_the_same_bars_are_the_same_bytes() -> None:
    assert drawn([0.5, 0.3, 0.2], Mark(600.0, "m")) == drawn([0.5, 0.3, 0.2], Mark(600.0, "m"))
    assert drawn([0.5, 0.3, 0.2]) != drawn([0.5, 0.2, 0.3])


@pytest.mark.parametrize(("value", "words"), [(4.0, "4"), (1000.0, "1000"), (1024.0, "1K"), (131072.0, "128K"),
                                              (2.0**20, "1M"), (6000.0, "6000")])
def test_tokens_in_few_characters(value, words) -> None:
    assert binary(value) == words
