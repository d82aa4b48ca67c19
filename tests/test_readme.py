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


MEASURES = {"Held-out loss, nats/token": "Held-out loss (nats/token,", "Copying": "Copying (right,",
            "Phonebook up to 1,024 tokens, exact": "Phonebook up to 1,024 tokens (exact,",
            "Phonebook beyond 1,024, before any extension": "Phonebook beyond 1,024 (exact,"}
"""Row of the README → how the row of the published report begins."""


def cells(line: str) -> list[str]:
    """What a row of a Markdown table has, without ranges in brackets."""
    return [re.sub(r" \([^()]* – [^()]*\)", "", cell.strip().replace("\N{NO-BREAK SPACE}", " "))
            for cell in line.strip("| ").split(" | ")]


def test_the_headline_table_is_that_of_the_published_page() -> None:
    report = (ROOT / "docs/results/long-context/report.md").read_text()
    section = README[README.index("## What such a page shows"):README.index("## The project")]
    told = {row[0]: row[1:] for row in map(cells, section.splitlines()) if len(row) == 5}
    for title, begin in MEASURES.items():
        (line,) = (line for line in report.splitlines() if line.startswith(f"| {begin}"))
        assert told[title] == cells(line)[1:], title
    summary = report[report.index("- Extended to 8,192 tokens"):].splitlines()[0]
    best = re.findall(r"\+(\d\.\d+) nats/token \([\w-]+, (\d+)\s% of the longer recall right\)", summary)
    gained = told["Gained by the best extension, nats/token"]
    assert [cell.split(" ")[0] for cell in gained] == [gain for gain, _ in best]
    assert told["Recall at its length"] == [f"{recall} %" for _, recall in best]
    assert re.findall(r"commit (\w+)", section) == re.findall(r"Commit `(\w{7})", report)[:1]
