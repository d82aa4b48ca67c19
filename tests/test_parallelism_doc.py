"""What the pages on parallel training say is what the code does: commands, plans, keys, memory, pictures."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import typer

from hinny.cli import app
from hinny.config import DIMENSIONS, ParallelConfig, load_recipe
from hinny.parallel.plan import COLUMNS, PLAN, ROWS
from hinny.show import show
from hinny.train.resume import MAY_CHANGE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PLANS, TRAINING = ((DOCS / f"{name}.md").read_text() for name in ("parallelism", "training"))
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))


def _commands(page: str) -> list[str]:
    """Every call of hinny in the code of a page, without placeholders that stand for the rest of it."""
    code = re.findall(r"```\n(.*?)```", page, re.DOTALL) + re.findall(r"`([^`\n]+)`", page)
    lines = [line for block in code for line in block.splitlines()]
    return [line for line in lines if re.match(r"(torchrun .* -m )?hinny (show|train|bench|prepare) ", line)
            and "…" not in line and "RECIPE" not in line]


def _section(title: str) -> list[list[str]]:
    """The cells of the rows of the tables in a section of parallelism.md, heads apart."""
    text = PLANS[PLANS.index(f"## {title}"):]
    rows = text[:text.find("\n## ", 1)].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    return [row for row in cells[1:] if not row[0].startswith("---")]


@pytest.mark.parametrize("line", sorted(set(_commands(PLANS) + _commands(TRAINING))))
def test_a_command_parses_and_its_recipe_is_valid(line: str) -> None:
    words = shlex.split(line, comments=True)
    verb, *arguments = words[words.index("hinny") + 1:]
    context = typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    load_recipe(context.params["recipe"], context.params["overrides"] or ())


@pytest.mark.parametrize("row", _section("Which to choose"), ids=lambda row: row[0])
def test_the_memory_of_a_choice_is_what_show_says(row: list[str]) -> None:
    words = shlex.split(row[1].strip("`"))[2:]
    hardware = words[words.index("--hardware") + 1] if "--hardware" in words else "H100"
    recipe = load_recipe(words[0], [word for word in words if "=" in word])
    figures = show(recipe, hardware=hardware)
    found, device = figures["memory"]["training"], figures["predictions"]["assumptions"]
    fits = "fits" if found["fits"] else "does not fit"
    assert row[2] == f"{found['memory_bytes'] / 1e9:.0f} GB of {device['memory'] / 1e9:.0f}: {fits}"
    if named := re.search(r"(\d+) x H", row[0]):
        # the sizes multiply to the GPUs of the row, and the batch, or one of the same tokens, can be cut among them
        sizes = recipe.parallel.sizes(int(named[1]))
        per_pass = recipe.train.micro_batch_size * sizes["replicate"] * sizes["shard"]
        assert recipe.train.batch_size % per_pass == 0


def test_every_parameter_that_is_cut_is_in_the_table_of_cuts_and_no_other() -> None:
    kinds = {"`M` Mamba-2": "M", "`1` Mamba": "1", "`*` attention": "*", "`-` MLP": "-"}
    rows = {kinds[row[0]]: row[1:] for row in _section("Tensor") if row[0] in kinds}
    assert set(rows) == set(PLAN)
    for symbol, cells in rows.items():
        for cell, dimension in zip(cells, (ROWS, COLUMNS), strict=True):
            told = set(re.findall(r"`([^`]+)`", cell))
            cut = {name.removesuffix(".weight") for name, dim in PLAN[symbol].items()
                   if dim == dimension and not name.endswith(".bias")}
            assert told == cut, (symbol, dimension)
            biased = any(name.endswith(".bias") for name, dim in PLAN[symbol].items() if dim == dimension)
            assert ("bias" in cell.replace("dt_bias", "")) == biased


def test_every_key_of_the_section_is_explained() -> None:
    assert [key for key in ParallelConfig.model_fields if not re.search(rf"`(parallel\.)?{key}\b", PLANS)] == []
    assert "pipeline x replicate x shard x context x tensor = processes" in PLANS
    assert " x ".join(DIMENSIONS) in PLANS


def test_the_keys_that_may_change_are_those_that_the_code_lets_change() -> None:
    rows = re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", TRAINING, re.MULTILINE)
    told = {f"{section}.{key}" for section, keys in rows for key in re.findall(r"`(\w+)`", keys)}
    assert told == set(MAY_CHANGE)


def test_the_tests_that_prove_a_scheme_are_there() -> None:
    names = [name for row in _section("How it is proven") for name in re.findall(r"test_\w+\.py", row[1])]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(names) > 10
    assert set(names) <= there


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_shown_and_readable_on_light_and_dark(picture: Path) -> None:
    assert f"(pictures/{picture.name})" in PLANS
    text = picture.read_text()
    assert len(text.encode()) < 6000
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    colours = set(re.findall(r"#([0-9a-f]{6})\b", text))
    assert colours
    for colour in colours:
        # contrast of at least 3 with white and with the darkest page that is common (WCAG 2.1, 1.4.11)
        light = _luminance(colour) + 0.05
        assert min(1.05 / light, light / (_luminance("0d1117") + 0.05)) > 3, colour


def _luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.1."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
