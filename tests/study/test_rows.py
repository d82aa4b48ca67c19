"""What is known at one context alone is a row for each model, on one axis, and no isolated point."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hinny.study.collect import Table, read_table
from hinny.study.draw import PALETTE, draw
from hinny.study.figures import plots
from hinny.study.multiples import split
from hinny.study.overview import overview
from hinny.study.report import report


@pytest.fixture(scope="module")
def table(study_folder: Path) -> Table:
    report(study_folder)
    full = read_table(study_folder)
    return Table([f for f in full.figures if f.shape.get("context", "256") == "256"], full.about)


def test_speed_and_memory_at_one_context_are_rows_with_their_names(table: Table) -> None:
    found = {plot.id: plot for plot in plots(table)}
    decode, prefill = found["speed"].panels
    (memory,) = found["memory"].panels
    assert [panel.title for panel in (decode, prefill, memory)] == [
        "Decode, after 256 tokens", "Prefill, after 256 tokens", "After 256 tokens"]
    assert (found["speed"].title, found["memory"].title) == ("Generation speed", "State and cache")
    assert "logarithmic" not in found["memory"].caption
    text = draw(decode)
    heights = {name: float(y) for y, name in re.findall(r'translate\([\d.]+ ([\d.]+)\)">([\w-]+)</text>', text)}
    heights |= {name: float(y) for y, name in re.findall(r' y="([\d.]+)"[^>]*>([A-Z][\w-]+)</text>', text)}
    names = ["Transformer", "Mamba", "Mamba-2", "Mamba-2-Hybrid"]
    assert [name for name in sorted(heights, key=lambda name: heights[name]) if name in names] == names
    assert all(colour in text for colour in PALETTE[:4])
    # a speed's axis is that of its values, memory's begins at nothing
    assert decode.across is not None
    assert decode.across[0] > 100
    assert memory.across is not None
    assert memory.across[0] == 0
    assert split(table, found["speed"]) == found["speed"]


def test_the_first_screen_has_rows_and_leaves_out_what_does_not_vary(table: Table) -> None:
    plot = overview(table)
    assert plot is not None
    assert [panel.title for panel in plot.panels if panel.rows] == [
        "Decode speed, higher is better, after 256 tokens", "Memory, lower is better, after 256 tokens"]
    level = [dataclasses.replace(f, value=1.0, low=1.0, high=1.0) if f.what == "state_bytes" else f
             for f in table.figures]
    plot = overview(Table(level, table.about))
    assert plot is not None
    assert not any("Memory" in panel.title for panel in plot.panels)
