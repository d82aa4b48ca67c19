"""The first screen: the sentence, the numbers, the small plots; and the short table of many models."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hinny.study.collect import Figure, Table, read_table
from hinny.study.draw import draw, marker
from hinny.study.figures import plots
from hinny.study.overview import headline, overview, tiles
from hinny.study.report import every_plot, report, whole
from hinny.study.summary import columns, counted


@pytest.fixture(scope="module")
def table(study_folder: Path) -> Table:
    report(study_folder)
    return read_table(study_folder)


def changed(table: Table, what: str, **values: tuple[float, float, float]) -> Table:
    """The table with other figures `what`: recipe (without "tiny_") = value, low, high."""
    def new(f: Figure) -> Figure:
        name = f.variant.removeprefix("tiny-")
        if f.what != what or name not in values:
            return f
        value, low, high = values[name]
        return dataclasses.replace(f, value=value, low=low, high=high)
    return Table([new(f) for f in table.figures], table.about)


def said(table: Table) -> str:
    return headline(table, columns(table))


def test_the_headline_says_who_won_on_what(table: Table) -> None:
    assert said(table) == ("Mamba-2-Hybrid predicts held-out text best; Transformer and Mamba-2-Hybrid tie on recall; "
                           "Mamba and Mamba-2 tie on decode speed and memory.")


def test_what_the_seeds_do_not_tell_apart_the_headline_does_not_either(table: Table) -> None:
    wide = {name: (4.0 + i / 100, 3.9, 4.2) for i, name in enumerate(("transformer", "mamba", "mamba2", "hybrid"))}
    assert said(changed(table, "held_out_loss", **wide)).startswith("Held-out text does not tell the models apart;")
    wide["transformer"] = (5.0, 4.9, 5.1)
    assert said(changed(table, "held_out_loss", **wide)).startswith(
        "Mamba, Mamba-2 and Mamba-2-Hybrid tie on held-out text, ahead of Transformer;")


def test_what_nobody_learned_is_said_so(table: Table) -> None:
    nothing = dict.fromkeys(("transformer", "mamba", "mamba2", "hybrid"), (0.0, 0.0, 0.0))
    assert "none recalls half of the phone numbers" in said(changed(table, "phonebook.exact", **nothing))


def test_one_length_alone_is_drawn_without_a_fault(table: Table) -> None:
    some = [f for f in table.figures if f.shape.get("context", "64") == "64" and f.shape.get("length", "256") == "256"]
    plot = overview(Table(some, table.about))
    assert plot is not None
    assert all("<svg" in draw(panel) for panel in plot.panels)


def test_one_seed_is_called_one_seed(table: Table) -> None:
    single = Table([dataclasses.replace(f, seeds=1) for f in table.figures], table.about)
    assert said(single).startswith("Mamba-2-Hybrid predicts held-out text best (one seed);")


def test_one_winner_of_two_things_is_named_once(table: Table) -> None:
    best = changed(table, "phonebook.exact", hybrid=(1.0, 1.0, 1.0), transformer=(0.6, 0.5, 0.7))
    assert said(best).startswith("Mamba-2-Hybrid predicts held-out text best and recalls phone numbers best;")
    # two measures that different models share first place of stay two
    assert said(table).count("tie on") == 2


def test_ties_of_as_many_other_models_are_not_one_tie(study_folder: Path, table: Table, tmp_path: Path) -> None:
    many(study_folder, tmp_path / "many", [f"v{i}" for i in range(12)])
    study = read_table(tmp_path / "many")
    first, last = ({f"v{i}" for i in part} for part in (range(6), range(6, 12)))
    ranks = {"decode": first, "state_bytes": last}
    figures = [dataclasses.replace(f, value=v, low=v, high=v) for f in study.figures if f.what in ranks
               for v in [1.0 if (f.variant in ranks[f.what]) == (f.what == "state_bytes") else 2.0]]
    assert said(Table(figures, study.about)) == "6 of 12 models tie on decode speed; 6 of 12 models tie on memory."
    same = [dataclasses.replace(f, value=3 - f.value, low=3 - f.low, high=3 - f.high) if f.what == "decode" else f
            for f in figures]
    assert said(Table(same, study.about)) == "6 of 12 models tie on decode speed and memory."


def test_without_figures_there_is_no_headline(table: Table) -> None:
    empty = Table([], table.about)
    assert (said(empty), tiles(empty, columns(empty)), overview(empty)) == ("", [], None)


def test_four_numbers_each_with_its_spread(table: Table) -> None:
    shown = tiles(table, columns(table))
    assert [tile.title for tile in shown] == ["Held-out loss", "Phonebook up to 256 tokens",
                                              "Decode after 4,096 tokens", "State and cache at 4,096"]
    assert (shown[0].value, shown[0].who, shown[0].spread) == ("3.820", "Mamba-2-Hybrid", "3.814 – 3.826, 2 seeds")
    assert shown[0].last == "Mamba 3.970"
    assert "repeated timings" in shown[2].spread
    assert shown[3].spread == "counted, so without spread"
    assert shown[1].tied == "not told apart from Mamba-2-Hybrid"


def test_small_plots_over_the_same_length_share_that_axis(table: Table) -> None:
    plot = overview(table)
    assert plot is not None
    assert [panel.title.partition(",")[0] for panel in plot.panels] == [
        "Held-out loss", "Phonebook", "Decode speed", "Memory"]
    decode, memory = plot.panels[2:]
    assert decode.across == memory.across is not None
    assert decode.ticks == memory.ticks


# many models

def many(study_folder: Path, root: Path, names: list[str]) -> Path:
    """A study of the made-up one's hybrid under each of the names, each a little worse than the one before."""
    rows = json.loads((study_folder / "results" / "study.json").read_text())
    about = json.loads((study_folder / "results" / "about.json").read_text())
    new: list[dict[str, Any]] = [row for row in rows if not row["variant"].startswith("tiny-")]
    for i, name in enumerate(names):
        for row in (row for row in rows if row["variant"] == "tiny-hybrid"):
            times = 1 + i / 50 if row["what"] != "phonebook.exact" else 1
            new.append({**row, "variant": name, **{side: row[side] and row[side] * times
                                                   for side in ("value", "low", "high")}})
    about["recipes"] = dict.fromkeys(names, about["recipes"]["tiny-hybrid"])
    (root / "results").mkdir(parents=True)
    (root / "results" / "study.json").write_text(json.dumps(new))
    (root / "results" / "about.json").write_text(json.dumps(about))
    return report(root)


def test_many_models_are_rows_of_the_short_table_and_few_are_columns(study_folder: Path, table: Table,
                                                                    tmp_path: Path) -> None:
    few = (study_folder / "report.html").read_text()
    assert "<table class=\"short\">" in few
    names = [f"variant-{i}" for i in range(9)]
    page = many(study_folder, tmp_path / "many", names)
    text = page.read_text()
    (found,) = re.findall(r'<table class="short models-down">(.*?)</table>', text, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", found, flags=re.DOTALL)
    lines = columns(read_table(tmp_path / "many"))
    assert len(rows) == 1 + 9
    assert [re.sub(r"<[^>]+>", "", re.findall(r"<th.*?</th>", row)[0]) for row in rows[1:]] == names
    assert all(len(re.findall("<td", row)) == 1 + len(lines) for row in rows[1:])
    for line in lines:
        assert html.escape(line.measure.head, quote=False) in html.unescape(rows[0])
    for i, row in enumerate(rows[1:]):
        assert all(line.cells[i].text in row for line in lines)
    # it has more room than the text, few digits, and a shadow where it goes on
    assert '<div class="scroll wide"' in text
    size = read_table(tmp_path / "many").about["recipes"][names[0]]["non_embedding"]
    assert f'<td class="number">{counted(size)}<' in rows[1]
    assert "var(--shadow)" in text
    assert '<div class="scroll wide"' not in few
    # every colour that the page names is one that its style sheet has
    assert {int(n) for n in re.findall(r"var\(--s(\d+)\)", text)} <= set(range(8))
    markdown = (tmp_path / "many" / "report.md").read_text()
    assert markdown.count("| variant-") == 9
    assert "| Model | Parameters without embeddings | Held-out loss" in markdown


def test_every_plot_of_many_models_has_its_sheet(study_folder: Path, table: Table, tmp_path: Path) -> None:
    page = many(study_folder, tmp_path / "many", [f"v{i}" for i in range(8)])
    for plot in every_plot(read_table(tmp_path / "many")):
        sheet = (page.parent / "report_files" / f"{plot.id}.csv").read_text()
        assert len(list(csv.DictReader(sheet.splitlines()))) == len(plot.figures)
        assert f'download="trial-{plot.id}.csv"' in page.read_text()


def test_of_many_models_small_plots_name_the_best_three_and_the_last(study_folder: Path, table: Table,
                                                                    tmp_path: Path) -> None:
    many(study_folder, tmp_path / "many", [f"v{i}" for i in range(20)])
    plot = overview(read_table(tmp_path / "many"))
    assert plot is not None
    assert {s.label for s in plot.panels[0].series if not s.muted} == {"v0", "v1", "v2", "v19"}
    assert len(plot.panels[0].series) == 20
    assert "the best three" in plot.caption
    # where all are named every label has its place: the panel grows
    learning = next(p for p in plots(read_table(tmp_path / "many")) if p.id == "learning")
    height = re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', draw(learning.panels[0]))
    assert height is not None
    assert float(height[1]) > 72 * 0.164 * 20
    assert len({(c % 8, marker(c)) for c in range(20)}) == 20


def test_names_with_signs_of_markup_stay_text(study_folder: Path, table: Table, tmp_path: Path) -> None:
    odd = "a<i>b</i>|c&d"
    page = many(study_folder, tmp_path / "odd", [odd, "plain"])
    text = page.read_text()
    assert "<i>" not in text
    assert "a&lt;i&gt;b&lt;/i&gt;|c&amp;d" in text
    markdown = (tmp_path / "odd" / "report.md").read_text()
    assert "| a&lt;i>b&lt;/i>\\|c&amp;d | plain |" in markdown
    assert whole("x-<b> y") == '<span class="name">x-&lt;b&gt;</span> y'


def test_a_measure_that_all_models_have_alike_gives_way_to_one_that_tells_them_apart(table: Table) -> None:
    alike = dict.fromkeys(("transformer", "mamba", "mamba2", "hybrid"), (500.0, 500.0, 500.0))
    study = changed(table, "decode", **alike)
    assert [tile.title for tile in tiles(study, columns(study))] == [
        "Held-out loss", "Phonebook up to 256 tokens", "State and cache at 4,096", "Phonebook beyond 256"]
