"""The report in docs/results is what its own result files give: nothing in it was typed."""

from __future__ import annotations

import shutil
from pathlib import Path

from hinny.study.report import report

PUBLISHED = Path(__file__).parent.parent.parent / "docs" / "results" / "quick"


def test_the_published_report_is_rendered_from_its_rows(tmp_path: Path) -> None:
    copy = tmp_path / "quick"
    shutil.copytree(PUBLISHED, copy)
    (copy / "report.md").unlink()
    report(copy)
    assert (copy / "report.md").read_text() == (PUBLISHED / "report.md").read_text()
