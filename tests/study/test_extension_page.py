"""The page of an extension, from a hand-made extension.json: what is compared, and that it can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hinny.evals.perplexity import of_folder
from hinny.run import row
from hinny.study.collect import parse_shape
from hinny.study.draw import PALETTE
from hinny.study.extension import report
from hinny.study.report import DARK

TEMPLATES = Path(__file__).parents[2] / "hinny" / "study" / "templates"


def page(folder: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """The Markdown page of these rows; the base was trained on 128 tokens, the extension on 256."""
    folder.mkdir()
    (folder / "extension.json").write_text(json.dumps({
        "run": "r", "trained_length": 256, "base_length": 128, "base": {"name": "b", "step": 3, "seq_len": 128},
        "no_base": "", "before": before, "after": after}))
    report(folder)
    return (folder / "extension.md").read_text()


def share(what: str, value: float, shape: str) -> dict[str, Any]:
    return row(what, "r", value, "share", shape=shape)


def loss(value: float, shape: str) -> dict[str, Any]:
    return row("window_loss", "r", value, "nats/token", shape=shape)


def test_what_was_lost_is_after_minus_before_at_the_bases_length_alone(tmp_path: Path) -> None:
    text = page(tmp_path / "r", [loss(3.0, "length=128 sequences=2"), loss(9.0, "length=256 sequences=2")],
                [loss(3.25, "length=128 sequences=2"), loss(1.0, "length=256 sequences=2")])
    assert "| Loss at the base's length | 3.000 | 3.250 | +0.250 |" in text


def test_recall_up_to_the_bases_length_leaves_longer_prompts_out_and_compares_what_both_were_asked(
        tmp_path: Path) -> None:
    text = page(tmp_path / "r",
                [share("copy.accuracy", 1.0, "length=64"), share("copy.accuracy", 0.5, "length=128"),
                 share("copy.accuracy", 0.0, "length=256")],
                [share("copy.accuracy", 0.5, "length=64"), share("copy.accuracy", 1.0, "length=256"),
                 share("phonebook.exact", 1.0, "form=standard length=256")])
    assert "| Copying up to it | 100% | 50% | -50% |" in text
    assert "Phonebook up to it" not in text
    # the loss has its line though nobody was asked
    assert "| Loss at the base's length | – | – | – |" in text


def test_folders_of_a_blend_have_lines_of_their_own_also_with_a_space_in_their_name(tmp_path: Path) -> None:
    pears, plums = tmp_path / "my pears", tmp_path / "plums 50%"
    names = [str(pears), str(plums)]
    both = [[loss(value + add, f"length={n} sequences=2{of_folder(str(path), names)}")
             for path, add in ((pears, 0.0), (plums, 1.0)) for n, value in ((128, 3.0 + side), (256, 2.0 + side))]
            for side in (0.0, 0.25)]
    assert parse_shape(both[0][2]["shape"])["folder"] == str(plums)
    text = page(tmp_path / "r", *both)
    assert "| Loss at the base's length, my pears | 3.000 | 3.250 | +0.250 |" in text
    assert "| Loss at the base's length, plums 50% | 4.000 | 4.250 | +0.250 |" in text
    assert "| before, my pears | before, plums 50% | after, my pears | after, plums 50% |" in text
    assert "| 128 | 3 | 4 | 3.25 | 4.25 |" in text


def luminance(colour: tuple[float, ...]) -> float:
    """The relative luminance of WCAG 2.1 of parts from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def parts(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_cell_of_a_heat_map_can_be_read(mode: int) -> None:
    style, template = ((TEMPLATES / name).read_text() for name in ("style.html.j2", "extension.html.j2"))
    ink, tint = (parts(re.findall(rf"--{name}: (#[0-9a-f]{{6}})", style)[mode]) for name in ("ink", "tint"))
    (most,) = {int(found) for found in re.findall(r"var\(--s0\) \{\{ \((\d+) \* cell\)", template)}
    assert "color: " not in re.findall(r"<td\{% if cell is not none %\}.*?>", template)[0]
    hue = parts((PALETTE, DARK)[mode][0])
    for share in range(101):
        mixed = tuple(share / 100 * most / 100 * a + (1 - share / 100 * most / 100) * b
                      for a, b in zip(hue, tint, strict=True))
        light, dark = sorted((luminance(ink), luminance(mixed)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, share
