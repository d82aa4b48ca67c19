"""What docs/serving.md says of the server is what the code has: options, addresses, metrics, fields, files."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from hinny.cli import app
from hinny.infer.limits import PAGE, Limits
from hinny.infer.prefixes import WORTH
from hinny.infer.runner import MOST_FEW
from hinny.infer.server.answers import LEAST
from hinny.infer.server.application import FAULTS
from hinny.infer.server.guard import OPEN
from hinny.infer.server.metrics import Metrics
from hinny.infer.server.schemas import MOST_STOPS, NEUTRAL
from hinny.infer.server.service import DEFAULT_TOKENS, LEFT
from hinny.infer.server.serving import LAST_BYTES
from hinny.infer.stats import Stats

ROOT = Path(__file__).parent.parent
PAGE_TEXT = (ROOT / "docs" / "serving.md").read_text()
SERVE = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def _section(title: str) -> str:
    return re.split(r"^##+ ", PAGE_TEXT.split(f"## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def _rows(title: str) -> list[list[str]]:
    """Cells of the table of a section, without its head."""
    lines = [line for line in _section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_option_is_in_the_table_with_its_default() -> None:
    rows = {option: row[2] for row in _rows("Starting") for option in re.findall(r"`(--[a-z-]+)`", row[0])}
    options = {param.opts[0]: param.default for param in SERVE.params if param.param_type_name == "option"}
    options.pop("--help", None)
    assert rows.keys() == options.keys()
    for option, default in options.items():
        if default is not None and option not in ("--host", "--port"):
            assert rows[option].startswith(f"{default:g}" if isinstance(default, float) else str(default)), option
    assert rows["--host"] == f"{options['--host']}, {options['--port']}"


@pytest.mark.parametrize("line", re.findall(r"^(?:torchrun .*-m )?(hinny .*)", PAGE_TEXT, re.MULTILINE))
def test_a_command_of_the_page_parses(line: str) -> None:
    _, verb, *arguments = shlex.split(line, comments=True)
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]


def test_addresses_and_who_needs_a_key() -> None:
    source = (ROOT / "hinny" / "infer" / "server" / "application.py").read_text()
    served = {path.replace("{name:path}", "NAME") for path in re.findall(r'app\.(?:get|post)\("([^"]+)"', source)}
    told = {path: row[2] for row in _rows("Endpoints") for path in re.findall(r"(/[\w/.]*)`", row[0])}
    assert told.keys() == served | {"/openapi.json"}
    assert {path for path, key in told.items() if key == "no"} == set(OPEN)


def test_every_metric_is_in_the_table() -> None:
    nothing = Stats(**{field.name: 0 for field in dataclasses.fields(Stats)})
    text = Metrics(lambda: nothing).text().decode()
    names = {f.name.removeprefix("hinny_") + "_total" * (f.type == "counter")
             for f in text_string_to_metric_families(text) if not f.name.endswith("_created")}
    assert names == {name for row in _rows("Metrics") for name in re.findall(r"`(\w+)", row[0])}


def test_fields_that_are_refused_and_statuses_are_named() -> None:
    refused = PAGE_TEXT.split("- `suffix`")[1].split("\n\n")[0]
    assert set(NEUTRAL) - {"suffix"} <= set(re.findall(r"`(\w+)`", refused))
    told = {int(number) for row in _rows("What is refused") for number in re.findall(r"\d+", row[0])}
    assert told == set(FAULTS)


@pytest.mark.parametrize("words", [
    f"up to {MOST_STOPS} strings", f"is {DEFAULT_TOKENS} for a completion", f"has {LEAST:g}", f"status {LEFT}",
    f"values of {PAGE} tokens", f"Fewer than {WORTH} tokens", f"Places less than {WORTH} tokens",
    f"pass's {Limits().step_tokens:,} tokens", f"(1 to {MOST_FEW})", f"have {LAST_BYTES} seconds"])
def test_a_number_is_the_codes(words: str) -> None:
    assert words in re.sub(r"\s+", " ", PAGE_TEXT)


def test_every_file_that_is_named_is_there() -> None:
    life = _section("The life of a request")
    files = set(re.findall(r"`([\w/]+\.py)`", life))
    assert len(files) > 20
    assert not {name for name in files if not (ROOT / "hinny" / "infer" / name).is_file()
                and not (ROOT / name).is_file()}
    assert [int(n) for n in re.findall(r"^(\d+)\. ", life, re.MULTILINE)] == list(range(1, 16))
