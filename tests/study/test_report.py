"""The report of a made-up study: complete, self-contained, made of rows alone, and right in a browser."""

from __future__ import annotations

import base64
import csv
import html
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hinny import counts
from hinny.config import load_recipe
from hinny.errors import RunError
from hinny.run import Run
from hinny.study.beside import apart
from hinny.study.claims import CLAIMS
from hinny.study.collect import collect, read_table
from hinny.study.draw import short
from hinny.study.figures import plots
from hinny.study.report import every_plot, report
from hinny.study.summary import Score, columns, leaders

PLOTS = ["overview", "pareto", "learning", "positions", "phonebook", "digits", "recall", "speed", "memory",
         "predicted", "predicted_prompt"]


@pytest.fixture(scope="module")
def page(study_folder: Path) -> Path:
    return report(study_folder)


def visible(text: str) -> str:
    text = re.sub(r'<span class="name">(.*?)</span>', r"\1", text)
    return re.sub(r"\s+", " ", html.unescape(text).replace("\N{NO-BREAK SPACE}", " "))


def test_the_page_names_no_outside_resource(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"https?://", text) == []
    assert re.findall(r"<(?:script|iframe|img|link)[^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_every_plot_offers_its_figures_as_a_sheet(page: Path, study_folder: Path) -> None:
    table, text = read_table(study_folder), page.read_text()
    offered = dict(re.findall(r'download="trial-([a-z_]+)\.csv" href="data:text/csv;base64,([^"]+)"', text))
    assert list(offered) == PLOTS
    for plot in every_plot(table):
        file = study_folder / "report_files" / f"{plot.id}.csv"
        assert base64.b64decode(offered[plot.id]).decode() == file.read_text()
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert len(rows) == len(plot.figures)
        for row, figure in zip(rows, plot.figures, strict=True):
            assert (row["what"], row["model"]) == (figure.what, figure.variant)
            assert [float(row[side]) for side in ("value", "low", "high")] == [figure.value, figure.low, figure.high]
            assert {key: value for key, value in row.items() if key in figure.shape} == figure.shape
            assert (row["seeds"], row["commit"]) == (str(figure.seeds), figure.commit.replace("\n", "; "))


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_all_claims_captions_recipes_and_provenance_are_there(page: Path, study_folder: Path, name: str) -> None:
    text, table = visible((study_folder / name).read_text()), read_table(study_folder)
    assert len(CLAIMS) == 35
    for claim in CLAIMS:
        assert claim.text in text
        assert claim.paper in text
        assert (claim.longer or claim.test) in text
    shown = every_plot(table)
    assert [plot.id for plot in shown] == PLOTS
    for plot in shown:
        assert visible(plot.caption) in text
    for recipe in table.about["recipes"].values():
        assert visible(recipe["toml"]).strip() in text
    # the short table, the paper's, each plot and the claims say what made them
    assert text.count("How these figures were made") == len(PLOTS) + 3
    assert "hinny eval tiny-hybrid-s2 phonebook" in text
    assert "0123456789ab" in text
    assert "Made-up CPU, 2 cores" in text
    assert "fingerprint" in text
    assert "f" * 64 in text


def test_every_file_that_the_markdown_shows_exists(page: Path, study_folder: Path) -> None:
    files = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (study_folder / "report.md").read_text())
    assert len(files) == 27
    for file in files:
        assert (study_folder / file).read_text().startswith("<?xml")


def test_figures_are_means_over_seeds_between_the_seeds(study_folder: Path, page: Path) -> None:
    rows = json.loads((study_folder / "results" / "study.json").read_text())
    row = next(r for r in rows if r["what"] == "held_out_loss" and r["variant"] == "tiny-mamba")
    single = [r["value"] for seed in (1, 2) for r in Run(study_folder / "runs" / f"tiny-mamba-s{seed}").rows("heldout")
              if r["what"] == "held_out_loss"]
    assert row["value"] == pytest.approx(sum(single) / 2, abs=1e-12)
    assert (row["low"], row["high"]) == (min(single), max(single))
    assert row["shape"] == "windows=128 length=256 seeds=2"
    assert row["command"].split("\n") == ["hinny eval tiny-mamba-s1 heldout", "hinny eval tiny-mamba-s2 heldout"]
    assert set(row) == {"what", "variant", "shape", "value", "unit", "low", "high", "bound", "peer", "peer_value",
                        "ratio", "command", "commit", "machine"}


def test_prefill_and_sequence_bytes_of_the_8b_models_are_predicted_and_shown(study_folder: Path, page: Path) -> None:
    table = read_table(study_folder)
    (plot,) = (plot for plot in plots(table) if plot.id == "predicted_prompt")
    assert [panel.title for panel in plot.panels[:4]] == [f"Prefill, {n}" for n in ("H100", "H200", "B200", "A100")]
    assert "assumed share of 0.3 of each GPU's peak rate" in plot.caption
    # bound by compute: two FLOPs a weight and token and a little for the scan, at 0.3 of 989.4 TFLOP/s
    weights = counts.parameters(load_recipe("8b-mamba2").model).non_embedding
    for figure in table.curve("predicted_prefill", "8b-mamba2", "context", hardware="H100"):
        assert 0.8 < figure.value / (0.3 * 989.4e12 / 2 / weights) < 1.0
    # keys and values, two bytes each
    model = load_recipe("8b-transformer").model
    attention, layers = model.attention, model.pattern.count("*")
    assert attention is not None
    for figure in table.curve("predicted_sequence", "8b-transformer", "context"):
        assert figure.value == 2 * 2 * layers * attention.n_kv_heads * attention.head_dim * figure.number("context")
    drawn = [p.value for s in plot.panels[-1].series if s.label == "Transformer" for p in s.points]
    assert drawn == [f.value for f in table.curve("predicted_sequence", "8b-transformer", "context")]


def test_the_digits_figure_says_how_a_digit_is_scored(study_folder: Path, page: Path) -> None:
    (plot,) = (plot for plot in plots(read_table(study_folder)) if plot.id == "digits")
    assert "each digit is scored given the true digits in front of it" in plot.caption


def test_digits_of_wrong_numbers_leave_out_the_right_ones(study_folder: Path, page: Path) -> None:
    table = read_table(study_folder)
    wrong = table.curve("phonebook.wrong_digits", "tiny-mamba", "length", form="standard")
    assert [f.value for f in wrong] == pytest.approx([0.36] * len(wrong))


def test_the_report_is_the_same_every_time_and_needs_rows_alone(study_folder: Path, page: Path, tmp_path: Path) -> None:
    shutil.copytree(study_folder / "results", tmp_path / "results")
    again = report(tmp_path)
    assert again.read_text() == page.read_text()
    assert (tmp_path / "report.md").read_text() == (study_folder / "report.md").read_text()


def test_a_changed_row_changes_the_page(page: Path, study_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(study_folder / "results", tmp_path / "results")
    file = tmp_path / "results" / "study.json"
    rows = json.loads(file.read_text())
    for row in rows:
        if row["what"] == "held_out_loss" and row["variant"] == "tiny-transformer":
            row |= {"value": 1.234, "low": 1.2, "high": 1.3}
    file.write_text(json.dumps(rows))
    assert "Transformer predicts held-out text best: 1.234 nats/token" in visible(report(tmp_path).read_text())


def test_a_study_that_has_only_begun_is_reported_as_far_as_it_got(
        tmp_path: Path, quick: Any, write_made_up: Any) -> None:
    write_made_up(tmp_path / "s", *quick)
    shutil.rmtree(tmp_path / "s" / "runs")
    (tmp_path / "s" / "runs").mkdir()
    (tmp_path / "s" / "data" / "data.json").unlink()
    text = visible(report(tmp_path / "s").read_text())
    assert all(claim.text in text for claim in CLAIMS)
    assert "predicted" in text
    assert "Held-out loss" not in text.partition("checked")[0]


@pytest.mark.parametrize("use", [report, collect])
def test_a_folder_that_is_no_study_is_refused(tmp_path: Path, use: Any) -> None:
    with pytest.raises(RunError, match=f"{tmp_path} is not a study"):
        use(tmp_path)


def test_the_best_is_marked_with_those_that_cannot_be_told_from_it() -> None:
    scores = {"a": Score(1.0, 0.9, 1.1), "b": Score(1.2, 1.05, 1.3), "c": Score(2.0, 1.9, 2.1)}
    assert leaders(scores, lower=True) == ["a", "b"]
    assert leaders(scores, lower=False) == ["c"]
    assert leaders({name: scores[name] for name in "ab"}, lower=True) == []


def test_the_short_table_marks_the_best_of_each_line(study_folder: Path, page: Path) -> None:
    lines = {line.title: line for line in columns(read_table(study_folder))}
    best = {title: [cell.best for cell in line.cells] for title, line in lines.items()}
    assert best["Held-out loss"] == [False, False, False, True]
    assert best["Phonebook up to 256 tokens"] == [True, False, False, True]
    assert best["State and cache at 4,096"] == [False, True, True, False]
    assert lines["Held-out loss"].cells[0].text == "3.900"


def test_the_short_table_has_the_share_of_the_peak_where_a_gpu_was_timed(study_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(study_folder, tmp_path / "gpu")
    lines = [line.title for line in columns(read_table(tmp_path / "gpu"))]
    assert not any("peak" in title for title in lines)
    for file in (tmp_path / "gpu/runs").glob("*/results/train.json"):
        rows = json.loads(file.read_text())
        file.write_text(json.dumps([*rows, {**rows[0], "what": "train.mfu", "value": 0.314, "low": 0.31, "high": 0.32,
                                            "unit": "of peak"}]))
    collect(tmp_path / "gpu")
    line = next(line for line in columns(read_table(tmp_path / "gpu")) if "peak" in line.title)
    assert [cell.text for cell in line.cells] == ["31\N{NO-BREAK SPACE}%"] * 4


def test_labels_are_moved_apart_and_stay_in_order() -> None:
    placed = apart([0.5, 0.5, 0.52, 1.0], 0.1)
    assert all(b - a > 0.0999 for a, b in itertools.pairwise(placed))
    assert placed[-1] <= 1.0


def test_counts_are_short() -> None:
    assert [short(v) for v in (0, 96, 1024, 131072, 1_500_000, 12_582_912, 1e10)] == [
        "0", "96", "1K", "128K", "1.5M", "12M", "10G"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Skipped where there is none, but never in CI."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium or google-chrome on this machine; CI needs one to open the report")
        pytest.skip("no chromium or google-chrome on this machine")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_renders_the_page_without_help_from_outside(
        browser: Any, page: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    trouble: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    assert trouble == []
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "an opened part is wider than the page"
    captions = tab.eval_on_selector_all("figure", "all => all.map(f => f.querySelector('figcaption').innerText)")
    assert len(captions) == len(PLOTS)
    assert all(len(caption) > 60 for caption in captions)
    sizes = tab.eval_on_selector_all("figure svg", "all => all.map(s => s.getBoundingClientRect().toJSON())")
    assert len(sizes) == 27
    assert all(s["width"] > 250 and s["height"] > 150 and s["right"] <= width for s in sizes)
    ink, paper = tab.evaluate("['color', 'backgroundColor'].map(key => getComputedStyle(document.body)[key])")
    drawn = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert (brightness(paper) > 200) == (scheme == "light")
    assert drawn == ink
    assert abs(brightness(ink) - brightness(paper)) > 150
    context.close()


def brightness(colour: str) -> float:
    """Mean of the channels of "rgb(r, g, b)"."""
    channels = [float(v) for v in re.findall(r"[\d.]+", colour)[:3]]
    return sum(channels) / 3


def test_no_words_overlap_in_a_plot(browser: Any, page: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    tab = context.new_page()
    tab.goto(page.as_uri())
    boxes = tab.eval_on_selector_all("figure svg", """all => all.map(s => [...s.querySelectorAll('text')].map(
        t => [t.textContent, t.getBoundingClientRect().toJSON()]))""")
    for words in boxes:
        for i, (one, a) in enumerate(words):
            for other, b in words[i + 1:]:
                across = min(a["right"], b["right"]) - max(a["left"], b["left"])
                down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
                assert across < 1 or down < 4, (one, other)
    context.close()
