"""A run on a blend: resumed bit for bit, held-out losses apart, and told from a run on other data."""

import json
import logging
import os
import random
import signal
from pathlib import Path

import pytest

from hinny import tokenizer
from hinny.config import DataConfig
from hinny.data.prepare import prepare
from hinny.errors import CheckpointError, ConfigError, DataError
from hinny.evals import EvalOptions, evaluate
from hinny.train.loop import train


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second folder in bytes, of numbers."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text").mkdir()
    numbers = random.Random(1)
    for n in range(30):
        (folder / "text" / f"{n}.txt").write_text(" ".join(str(numbers.randrange(100)) for _ in range(60)))
    prepare(folder / "data", text=[folder / "text"], tokenizer="bytes", held_out=0.2)
    return str(folder / "data")


def blended(recipe, weights, **options):
    return recipe.model_copy(update={"data": DataConfig(blend=weights, **{"boundaries": "leak"} | options)})


def losses(run):
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def stop_at(step):
    def progress(now):
        if now["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
    return progress


@pytest.mark.parametrize("order", ["windows", "megatron"])
def test_a_stopped_run_goes_on_with_the_same_losses(recipe_of, data, other, tmp_path, order):
    recipe = blended(recipe_of("-", steps=8), {data: 0.7, other: 0.3}, order=order)
    whole = train(recipe, tmp_path / "whole", threads=1)
    stopped = train(recipe, tmp_path / "stopped", progress=stop_at(3), threads=1)
    assert not stopped.finished
    # folders may move
    (tmp_path / "moved").symlink_to(other)
    assert train(blended(recipe, {data: 0.7, str(tmp_path / "moved"): 0.3}, order=order), stopped.path,
                 threads=1).finished
    assert losses(stopped) == losses(whole)


def test_other_weights_are_other_data(recipe_of, data, other, tmp_path):
    recipe = blended(recipe_of("-"), {data: 0.7, other: 0.3})
    train(recipe, tmp_path / "run", progress=stop_at(2))
    with pytest.raises(CheckpointError, match=r"the data of .*, .* are not those of the checkpoint"):
        train(blended(recipe, {data: 0.6, other: 0.4}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"data.order: windows → megatron"):
        train(blended(recipe, {data: 0.7, other: 0.3}, order="megatron"), tmp_path / "run")


def test_each_folder_has_a_held_out_loss_of_its_own_in_training_and_after(recipe_of, data, other, tmp_path, caplog):
    recipe = blended(recipe_of("-", steps=4, eval_every=2), {data: 3.0, other: 1.0})
    with caplog.at_level(logging.INFO):
        run = train(recipe, tmp_path / "run")
    assert f"{data}: " in caplog.text
    assert " epochs in 4 steps" in caplog.text
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for record in (r for r in records if "held_out_loss" in r):
        ours, theirs = record[f"held_out_loss.{data}"], record[f"held_out_loss.{other}"]
        assert record["held_out_loss"] == pytest.approx((3 * ours + theirs) / 4)
        assert ours != theirs
    rows = [row for row in evaluate(run.path, ["heldout"], EvalOptions(windows=32)) if row["what"] == "held_out_loss"]
    found = {row["shape"].split("folder=")[1]: row["value"] for row in rows}
    assert found == {data: pytest.approx(ours, rel=1e-4), other: pytest.approx(theirs, rel=1e-4)}
    assert json.loads((run.path / "data-1.json").read_text()) == json.loads(Path(other, "data.json").read_text())
    assert tokenizer.load(run.path).fingerprint == tokenizer.load(other).fingerprint


def test_one_folder_on_the_command_line_does_not_replace_a_blend(recipe_of, data, other, tmp_path):
    with pytest.raises(ConfigError, match=r"--data .* names one folder, but data.blend of the recipe names 2"):
        train(blended(recipe_of("-"), {data: 1.0, other: 1.0}), tmp_path / "run", data=data)


def test_a_folder_of_the_blend_that_is_not_there_is_named(recipe_of, data, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/data\.json: cannot be read"):
        train(blended(recipe_of("-"), {data: 1.0, str(tmp_path / "nowhere"): 1.0}), tmp_path / "run")
