"""The page of shorter numbers says what its rows say, and what no row is of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hinny.bench.quality import STATES, WEIGHTS
from hinny.bench.quality_table import page
from hinny.cli import app
from hinny.run import Run, row

CPU = {"machine": "a processor, 2 cores, Python 3.11, torch 2.13", "commit": "0123abc"}


def rows_of(weights: str, state: str, change: float, *, model: str = "tiny-mamba2", half: float = 0.01) -> list[dict]:
    shape = f"weights={weights} state={state} against=fp32/fp32 windows=4 length=16"
    figures = {"loss": (4.5, None, None), "loss_change": (change, change - half, change + half),
               "greedy_changed": (0.0125, None, None), "logit_change": (0.25, None, None)}
    return [row(f"quality.{name}", model, value, "x", low=low, high=high, shape=shape, command="a command") | CPU
            for name, (value, low, high) in figures.items()]


TRAINED = row("quality.trained", "tiny-mamba2", 400, "steps", command="a training") | CPU
ROWS = [TRAINED, *rows_of("fp32", "fp32", 0.0, half=0.0), *rows_of("fp32", "bf16", 0.02),
        *rows_of("bf16", "bf16", -0.005, model="tiny-hybrid"), *rows_of("bf16", "fp32", -0.03)]


def test_states_and_weights_have_a_table_each() -> None:
    states, weights = page(ROWS, WEIGHTS, tuple(STATES)).split("## Weights")
    line = "| tiny-mamba2 | fp32 | bf16 | 4 x 16 | 4.5000 | +0.02000 (+0.01000 … +0.03000) | 1.25% | 0.25 |"
    assert line in states
    assert "| tiny-hybrid | bf16 | bf16 |" in states
    assert "| tiny-mamba2 | bf16 | fp32 |" in weights
    assert "| fp32 | fp32 |" not in states + weights  # nothing was shortened


def test_the_training_stands_among_what_made_the_page() -> None:
    made = page(ROWS, WEIGHTS, tuple(STATES)).split("## Made by")[1]
    assert "- tiny-mamba2: 400 steps" in made
    assert "commit 0123abc: `a training`" in made
    assert "commit 0123abc: `a command`" in made


def test_the_largest_change_of_either_sign_is_said_with_whether_chance_explains_it() -> None:
    found = page(ROWS, WEIGHTS, tuple(STATES))
    assert ("States in bf16 change the loss by at most +0.02000 (+0.01000 … +0.03000) nats/token (tiny-mamba2, weights "
            "fp32, windows of 16), which is more than chance.") in found
    assert "Weights in bf16 change the loss by at most -0.03000" in found
    assert "more than chance, and a gain" in found
    assert "which is within its interval of nothing" in page(rows_of("fp32", "fp16", 0.002), WEIGHTS, tuple(STATES))


def test_what_no_row_is_of_is_said() -> None:
    missing = page(ROWS, WEIGHTS, tuple(STATES)).split("## Not measured")[1]
    for said in ("weights in int8", "weights in fp8", "weights in int4", "states in fp16", "on a GPU"):
        assert said in missing
    for measured in ("weights in bf16", "states in bf16"):
        assert measured not in missing
    on_gpu = [one | {"machine": "a processor, NVIDIA H200, torch 2.11"} for one in ROWS]
    assert "on a GPU" not in page(on_gpu, WEIGHTS, tuple(STATES))


def test_the_command_gathers_rows_of_several_calls_in_a_file_and_its_page(trained_run: Run, tmp_path: Path) -> None:
    file, markdown = tmp_path / "rows.json", tmp_path / "page.md"
    for states in ("bf16", "fp16"):
        command = ["bench", "quality", "--run", str(trained_run.path), "--weights", "fp32", "--states", states,
                   "--windows", "2", "--length", "4", "--save", str(file), "--markdown", str(markdown), "--json"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        rows = json.loads(file.read_text())
        assert [one for one in rows if states in one["shape"] or not one["shape"]] == json.loads(done.stdout)
    assert len(rows) == 9  # that of the training once
    assert markdown.read_text() == page(rows, WEIGHTS, tuple(STATES))


@pytest.mark.parametrize(("given", "said"), [
    ([], "bench quality needs --run"), (["--run", "x", "--batch", "2"], "--batch has no effect on bench quality")])
def test_what_is_missing_or_of_another_bench_is_refused(given: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "quality", *given])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    rows = [one for file in sorted(results.glob("quality-*.json")) for one in json.loads(file.read_text())]
    assert (results / "quality.md").read_text() == page(rows, WEIGHTS, tuple(STATES))
