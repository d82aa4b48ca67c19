"""What is true of every page of the documentation: links lead somewhere, headings are said once, named files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HISTORY = {"log.md"}
"""Pages that tell what was, files that have gone included."""
TO_MAKE = {"add-a-kernel.md", "add-a-layer.md"}
"""Pages that name files which their reader makes."""


def _prose(page: Path) -> str:
    """The page without blocks of code, whose lines may begin like headings."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_says_nothing_twice_and_its_links_lead_somewhere(page: Path) -> None:
    if page.name not in HISTORY:
        headings = _headings(page)
        assert sorted(headings) == sorted(set(headings))
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _prose(page)):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            assert fragment in map(_anchor, _headings(target)), link
    if page.name not in HISTORY | TO_MAKE:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:tests|hinny|recipes|studies|examples)/[\w/-]+\.(?:py|toml)\b", text):
            assert (ROOT / name).exists(), name
