"""The page says in what its models are equal, and compares no speeds of several machines."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from hinny.study.collect import read_table
from hinny.study.report import report
from hinny.study.summary import columns


def test_the_page_says_in_what_its_models_are_equal(study_folder: Path, tmp_path: Path) -> None:
    report(study_folder)
    shutil.copytree(study_folder / "results", tmp_path / "results")
    file = tmp_path / "results" / "about.json"
    about = json.loads(file.read_text())

    def told(match: dict[str, Any], **other: Any) -> str:
        recipes = about["recipes"]
        first = next(iter(recipes))
        file.write_text(json.dumps(about | {"match": match, "recipes": recipes | {first: recipes[first] | other}}))
        text = report(tmp_path).read_text() + (tmp_path / "report.md").read_text()
        found: list[str] = re.findall(r"[^>\n]+ agree within .*? tokens(?: in the same order)?[,;]", text)
        assert len({line.rstrip(",;") for line in found}) == 1
        assert len(found) == 2
        return found[0]

    plain = {"by": "parameters", "context": None}
    assert told(plain)[:-1] == ("Non-embedding parameters agree within 2 %. All were trained on the same tokens in the "
                                "same order")
    assert told({"by": "flops", "context": None}).startswith("Training FLOPs a token agree within 2 %. All")
    assert told({"by": "state", "context": 99}).startswith("Bytes of a sequence behind 99 tokens agree")
    assert "in each of 2 groups of models, and differ from group to group" in told(plain, group="large")
    assert "They were not all trained on the same tokens" in told(plain, tokens=1)


def test_speeds_of_several_machines_are_shown_and_not_compared(study_folder: Path, tmp_path: Path) -> None:
    report(study_folder)
    shutil.copytree(study_folder / "results", tmp_path / "results")
    file = tmp_path / "results" / "study.json"
    rows = json.loads(file.read_text())
    before = report(tmp_path).read_text()
    assert ("decodes 3" in before, "Quality against speed" in before, "several machines" in before) == (
        True, True, False)
    for row in rows:
        if row["what"] in ("train", "decode") and row["variant"] == "tiny-mamba":
            row["machine"] = "Another GPU"
    file.write_text(json.dumps(rows))
    text = report(tmp_path).read_text()
    assert "Speeds were measured on several machines" in text
    assert "Quality against speed" not in text
    assert not re.search("decodes? (fastest|3)|tie on decode", text)
    lines = {line.title: line for line in columns(read_table(tmp_path))}
    assert [cell.best for cell in lines["Training speed"].cells] == [False] * 4
    assert any(cell.best for cell in lines["Held-out loss"].cells)
