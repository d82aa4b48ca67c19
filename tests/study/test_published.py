"""The report in docs/results is what its own result files give: nothing in it was typed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hinny.study import extension
from hinny.study.report import report

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"


@pytest.mark.parametrize("name", ["quick", "long-context"])
def test_the_published_report_is_rendered_from_its_rows(name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copytree(RESULTS / name, copy)
    (copy / "report.md").unlink()
    report(copy)
    assert (copy / "report.md").read_text() == (RESULTS / name / "report.md").read_text()


@pytest.mark.parametrize("name", ["30m-hybrid-4x", "30m-transformer-4x-yarn"])
def test_the_published_pages_of_extensions_are_rendered_from_their_rows(name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copytree(RESULTS / "long-context" / name, copy)
    (copy / "extension.md").unlink()
    extension.report(copy)
    assert (copy / "extension.md").read_text() == (RESULTS / "long-context" / name / "extension.md").read_text()
