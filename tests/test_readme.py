"""What the README shows exists: its commands parse, its tree and its links are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from hinny.cli import app
from hinny.config import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL))
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith("hinny ")]
SPREAD = [line for line in BLOCKS.splitlines() if line.startswith("torchrun ")]


def test_the_readme_opens_with_the_two_commands() -> None:
    first = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make study", "make test"]


@pytest.mark.parametrize("line", COMMANDS + SPREAD)
def test_a_command_of_the_readme_parses(line: str) -> None:
    words = shlex.split(line, comments=True)
    verb, *arguments = words[words.index("hinny") + 1:]
    context = typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    if context.params.get("recipe"):
        load_recipe(context.params["recipe"], context.params.get("overrides") or ())


def test_every_verb_is_in_the_readme() -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert verbs == {line.split()[1] for line in COMMANDS}


def test_the_readme_spreads_a_training_over_processes() -> None:
    assert [line.split("hinny")[0] for line in SPREAD] == ["torchrun --nproc-per-node 2 -m "]


def test_every_room_is_in_the_tree_and_every_link_leads_somewhere() -> None:
    rooms = {p.stem for p in (ROOT / "hinny").iterdir() if not p.name.startswith("_") and p.suffix in ("", ".py")}
    tree = BLOCKS[BLOCKS.index("hinny/\n"):]
    missing = {room for room in rooms if not re.search(rf"\b{room}\b", tree)}
    assert missing <= {"errors", "verb", "progress"}
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
