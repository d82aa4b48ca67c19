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

SMALL = json.loads((ROOT / "docs" / "results" / "long-context" / "results" / "study.json").read_text())


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


def _told(what: str, variant: str, method: str, factor: int = 8) -> float:
    (found,) = [row["value"] for row in SMALL if (row["what"], row["variant"]) == (f"extended.{what}", variant)
                and row["shape"].startswith(f"method={method} factor={factor} ")]
    return float(found)


METHODS = {"as it was": "plain", "base 500,000": "base-500k", "YaRN": "yarn", "interpolation": "interpolation",
           "positions dropped": "drope", "segments of 1,024": "segments"}
MODELS = {"hybrid, RoPE": "30m-hybrid-rope", "Transformer": "30m-transformer", "hybrid, no positions": "30m-hybrid",
          "Mamba-2": "30m-mamba2"}


def test_the_table_at_30m_is_that_of_the_published_study() -> None:
    rows, model = _rows("What each way did, at 30M parameters"), ""
    assert len(rows) == 11
    for name, way, *cells in rows:
        model = MODELS[name] if name else model
        gained, lost, recall = (_told(what, model, METHODS[way]) for what in ("gained", "lost", "long_recall"))
        assert cells == [f"{gained:.3f}", f"{lost:.3f}", f"{100 * recall:.0f} %"], (model, way)


def test_the_sentences_on_positions_and_lengths_are_those_of_the_published_study() -> None:
    section = " ".join(_section("What each way did, at 30M parameters").split())
    loss = {(row["variant"], row["shape"]): row["value"] for row in SMALL if row["what"] == "extended.window_loss"}

    def at(variant: str, method: str, factor: int) -> float:
        (found,) = [value for (name, shape), value in loss.items() if name == variant
                    and f"length={1024 * factor} " in shape and f"method={method} factor={factor} " in shape]
        return float(found)

    better = [at("30m-hybrid", "plain", factor) - at("30m-hybrid-rope", "base-500k", factor) for factor in (4, 8)]
    assert f"it is {better[0]:.3f} (4x) and {better[1]:.3f} nats/token (8x) better" in section

    def book(length: int, factor: int) -> str:
        (found,) = [row["value"] for row in SMALL if row["what"] == "extended.phonebook.exact"
                    and row["variant"] == "30m-hybrid" and f"form=standard length={length} " in row["shape"]
                    and f"method=plain factor={factor} " in row["shape"]]
        return f"{100 * found:.0f} %"

    assert (f"extended to 4,096 the hybrid answers {book(4096, 4)} there and {book(8192, 4)} at 8,192; extended to "
            f"8,192 it answers {book(8192, 8)} and, at 16,384, {book(16384, 8)}.") in section
