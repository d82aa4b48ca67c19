"""The paper's numbers beside predicted ones: every line from rows, and what the paper does not say is called so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hinny.study.collect import Table, read_table
from hinny.study.paper_table import NONE, SIZES, Entry, PaperTable, line, paper_table
from hinny.study.report import report


@pytest.fixture(scope="module")
def table(study_folder: Path) -> Table:
    report(study_folder)
    return read_table(study_folder)


def made(table: Table) -> PaperTable:
    found = paper_table(table)
    assert found is not None
    return found


def entry(table: Table, start: str) -> Entry:
    (found,) = (e for e in made(table).entries if e.what.startswith(start))
    return found


def test_parameters_are_the_recipes_own_and_agree_with_the_paper(table: Table) -> None:
    found = [e for e in made(table).entries if e.what.startswith("Parameters")]
    assert len(found) == 4
    for one, (family, (size, printed, _)) in zip(found, SIZES.items(), strict=True):
        (recipe,) = (r for r in table.about["predicted"].values() if r["family"] == family)
        assert int(one.here.replace(",", "")) == recipe["parameters"] == pytest.approx(size, rel=0.01)
        assert one.paper == printed


def test_caches_and_states_follow_from_the_predicted_sequences(table: Table) -> None:
    # keys and values, two bytes each: 32 layers of 32 heads of 128, and 4 layers of 8
    assert line(table, "8b-transformer") == (2 * 2 * 32 * 32 * 128, 0)
    slope, fixed = line(table, "8b-hybrid") or (0, 0)
    assert slope == 2 * 2 * 4 * 8 * 128
    assert 90e6 < fixed < 120e6
    assert "524 kB Transformer, 16.4 kB hybrid" in entry(table, "Keys and values").here
    assert entry(table, "Keys and values").paper == NONE


def test_the_claim_of_eight_times_names_the_baseline_that_it_needs(table: Table) -> None:
    speed, baseline = entry(table, "Decode speed"), entry(table, "Baseline")
    assert "batch 32 on one H100" in speed.what
    assert (speed.paper, speed.where) == ("up to 8×, a prediction, too", "abstract")
    assert "passes 8× between 4K and 16K" in speed.remark
    assert "the Transformer does not fit" in speed.remark
    assert baseline.here.startswith("32 key/value heads")
    assert "32× with this Transformer, 8× with one of 8 key/value heads" in baseline.remark
    assert baseline.paper == NONE


def test_the_speed_is_the_ratio_of_rows(table: Table) -> None:
    ours, base = (table.one("predicted_decode", name, hardware="H100", context=131072)
                  for name in ("8b-hybrid", "8b-transformer"))
    assert ours is not None
    assert base is not None
    assert entry(table, "Decode speed").here == f"up to {ours.value / base.value:.1f}×"
    slower = [dataclasses.replace(f, value=f.value / 100) if f.variant == "8b-hybrid" else f for f in table.figures]
    assert "stays below 8×" in entry(Table(slower, table.about), "Decode speed").remark


def test_every_line_has_a_paper_number_with_its_place_or_says_that_there_is_none(table: Table) -> None:
    for one in made(table).entries:
        assert one.paper == NONE or re.search(r"\d", one.paper)
        assert one.where


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_report_shows_every_line(table: Table, study_folder: Path, name: str) -> None:
    text = (study_folder / name).read_text()
    for one in made(table).entries:
        for part in (one.what, one.here, one.paper, one.where):
            assert part.replace("'", "&#39;" if name.endswith("html") else "'") in text


def test_models_of_other_sizes_have_no_such_table(table: Table) -> None:
    small = {name: {**recipe, "parameters": recipe["parameters"] // 10}
             for name, recipe in table.about["predicted"].items()}
    assert paper_table(Table(table.figures, {**table.about, "predicted": small})) is None
    assert paper_table(Table(table.figures, {**table.about, "predicted": {}})) is None
