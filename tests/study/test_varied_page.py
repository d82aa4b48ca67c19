"""The whole page of a study whose every model is varied, as files."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_multiples import of_shares, of_sizes
from test_sweep_answer import figures

from hinny.study.collect import Table
from hinny.study.report import report


def written(table: Table, root: Path) -> Path:
    """The page of a study that has these figures, with losses of each seed."""
    rows: list[dict[str, Any]] = []
    more = [one for place, name in enumerate(table.about["recipes"])
            for one in figures(name, 3.5 - place / 50, 0.4 + place / 20)]
    found = [*table.figures, *(one for one in more if one.what == "held_out_loss")]
    for one in found:
        rows.append(asdict(one) | {"shape": " ".join(f"{key}={value}" for key, value in one.shape.items())})
        if one.what == "held_out_loss":
            rows += [rows[-1] | {"what": "held_out_loss_of_seed", "shape": f"seed={seed}", "value": value, "seeds": 1}
                     for seed, value in ((1, one.low), (2, one.high))]
    about = table.about | {"name": "varied", "description": "Made up.", "match_tolerance": 0.02, "differences": {},
                           "data": {}}
    about["recipes"] = {name: {"parameters": 2000, "tokens": 10 ** 6, "pattern": "M*", "toml": "", "description": "",
                               "non_embedding": 1000, "shares": {"attention": 0.1, "mlp": 0.5}, "kv_heads": 2,
                               "positions": "none"} | recipe for name, recipe in about["recipes"].items()}
    (root / "results").mkdir()
    (root / "results" / "study.json").write_text(json.dumps(rows))
    (root / "results" / "about.json").write_text(json.dumps(about))
    return report(root)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(of_shares(), tmp_path_factory.mktemp("varied"))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(of_sizes(), tmp_path_factory.mktemp("scaled"))


def test_sentences_begin_with_a_capital_or_a_name_and_names_do_not_break(page: Path, scaled: Path) -> None:
    for file in (page, scaled):
        names = list(json.loads((file.parent / "results" / "about.json").read_text())["recipes"])
        found = re.findall(r"<li>(.+?)</li>", file.read_text().partition("In words")[2].partition("</ul>")[0])
        assert len(found) > 2
        plain = [re.sub(r"<[^>]+>", "", sentence) for sentence in found]
        assert all(sentence[0].isupper() or sentence.split()[0] in names for sentence in plain), plain


def test_the_laws_stand_below_their_figure_on_both_pages_with_a_sheet(scaled: Path) -> None:
    text, markdown = scaled.read_text(), scaled.with_suffix(".md").read_text()
    head = "Exponent of size"
    assert f'<th scope="col">{head}</th>' in text
    assert f"| Line | {head} |" in markdown
    assert re.search(r"\n\| Hybrid \| \N{MINUS SIGN}0\.\d{3} \| \N{MINUS SIGN}0\.\d{3} to ", markdown)
    assert "](report_files/sweep0-fit.csv)" in markdown
    assert 'download="varied-sweep0-fit.csv"' in text
    sheet = list(csv.DictReader((scaled.parent / "report_files" / "sweep0-fit.csv").read_text().splitlines()))
    assert [line["line"] for line in sheet] == ["Transformer", "Hybrid"]
    assert float(sheet[0]["low"]) <= float(sheet[0]["exponent"]) <= float(sheet[0]["high"])
    assert not re.search(r"size to the -\d", text)
