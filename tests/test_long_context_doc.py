"""The figures of the page on long context are what `hinny show` predicts, and what was measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hinny import counts
from hinny.config import load_recipe
from hinny.show import MFU, show

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "long-context.md").read_text()


def _section(title: str) -> str:
    text = PAGE[PAGE.index(f"## {title}"):]
    end = text.find("\n## ", 1)
    return text if end < 0 else text[:end]


def _rows(title: str) -> list[list[str]]:
    """The cells of the rows of the table in a section, the head apart."""
    lines = [line for line in _section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _shown(command: str, **changes: int) -> dict[str, Any]:
    """What the command prints, with other sizes of [parallel]."""
    words = shlex.split(command)
    options = {word: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    recipe = load_recipe(words[2], [word for word in words if "=" in word])
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=changes)})
    return show(recipe, hardware=options.get("--hardware", "H100"), mfu=float(options.get("--mfu", MFU)))


def _giga(value: float) -> str:
    return f"{value / 1e9:.1f}"


@pytest.mark.parametrize("row", _rows("Extending the 8B models"), ids=lambda row: row[0])
def test_an_extension_costs_what_show_says(row: list[str]) -> None:
    command = row[0].strip("`")
    small = _shown(command)
    shard = int(re.search(r"parallel\.shard=(\d+)", command)[1])  # type: ignore[index]
    large = _shown(command, shard=8 * shard)
    assert [f["memory"]["training"]["devices"] for f in (small, large)] == [8, 64]
    assert all(f["memory"]["training"]["fits"] for f in (small, large))
    speed = small["predictions"]["training_tokens_per_s_per_device"]
    assert row[1:] == [
        *(f"{_giga(f['memory']['training']['memory_bytes'])} GB" for f in (small, large)),
        f"{_giga(small['flops_per_token'])} G + {_giga(small['recomputed_flops_per_token'])} G",
        f"{speed:,.0f}", f"{small['training_tokens'] / speed / 3600:,.0f}"]


def test_every_recipe_of_an_extension_is_there() -> None:
    told = {shlex.split(row[0].strip("`"))[2] for row in _rows("Extending the 8B models")}
    assert told == {f"long/{path.stem}" for path in (ROOT / "recipes" / "long").glob("8b-*.toml")}


def test_attention_made_again_would_fit_on_32_gpus_as_is_said() -> None:
    command = "hinny show long/8b-hybrid-128k parallel.shard=4 parallel.recompute=selective"
    assert f"`{command}`" in PAGE
    training = _shown(command)["memory"]["training"]
    assert (training["devices"], training["fits"]) == (32, True)
    assert f"{_giga(training['memory_bytes'])} GB\n(`{command}`" in PAGE
    assert not _shown(command, shard=2)["memory"]["training"]["fits"]
    mfu = _shown("hinny show long/8b-hybrid-128k")["predictions"]["training_mfu"]
    assert f"`long/8b-hybrid-128k`: {100 * mfu:.1f} %" in PAGE


def test_the_step_at_131072_tokens_stands_beside_its_prediction() -> None:
    title = "The 8B step at 131,072 tokens on two H200, against prediction"
    short, long = (_shown(line) for line in _section(title).splitlines() if line.startswith("hinny show"))
    rows = json.loads((ROOT / "docs" / "results" / "training-2xh200.json").read_text())

    def measured(what: str, length: int) -> float:
        return next(r["value"] for r in rows if r["what"] == what and r["variant"] == "8b-hybrid"
                    and f" length={length} " in r["shape"])

    peak = 2 * short["predictions"]["assumptions"]["flops_bf16"]
    speeds = [measured("train", 4096), 2 * long["predictions"]["training_tokens_per_s_per_device"],
              measured("train", 131072)]
    figures = [short, long, long]
    model, again = ([f[key] for f in figures] for key in ("flops_per_token", "recomputed_flops_per_token"))
    executed = [m + a for m, a in zip(model, again, strict=True)]
    shares, mfus = ([100 * speed * flops / peak for speed, flops in zip(speeds, counted, strict=True)]
                    for counted in (executed, model))
    memory = [measured("train.peak_memory", 4096), long["memory"]["training"]["memory_bytes"] / 1e9,
              measured("train.peak_memory", 131072)]
    assert [row[1:] for row in _rows(title)] == [
        [f"{_giga(value)} G" for value in model], [f"{_giga(value)} G" for value in again],
        [f"{speed:,.0f}" for speed in speeds], [f"{131072 / speed:.2f}" for speed in speeds],
        *([f"{value:.1f} %" for value in found] for found in (shares, mfus)), [f"{value:.1f} GB" for value in memory]]
    # the run says of its own MFU what is said here
    assert [measured("train.mfu", length) for length in (4096, 131072)] == [
        pytest.approx(mfus[0] / 100), pytest.approx(mfus[2] / 100)]
    longer = [speed / speeds[2] - 1 for speed in (speeds[1], speeds[1] * executed[1] / model[1])]
    scores = 4 * counts.layer(load_recipe("8b-hybrid").model, "*").mixing(131072) / 2
    for said in (f"takes {longer[0]:.0%} longer", f"{1 - memory[2] / memory[1]:.0%} less memory",
                 f"{131072 * model[1] / (executed[1] * speeds[1]):.2f} seconds, and the step {longer[1]:.0%}",
                 f"{scores / 1e9:.1f} GFLOP", f"the share {shares[2] * (1 + scores / executed[2]):.1f}%"):
        assert said.replace("%", " %") in " ".join(_section(title).split())
