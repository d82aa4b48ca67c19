"""A run whose documents are laid out in another way goes on bit for bit, and keeps a plot of what it sees."""

import json
import os
import signal

import pytest

from hinny.config import DataConfig
from hinny.data.lengths import PLOT
from hinny.data.mix import Stream
from hinny.errors import CheckpointError
from hinny.train.loop import train

OPTIONS = {"boundaries": "leak", "join": "random", "long": {"min_tokens": 150, "weight": 2.5}}


def laid_out(recipe, **options):
    return recipe.model_copy(update={"data": DataConfig.model_validate({**OPTIONS, **options})})


def stop(progress):
    if progress["step"] == 5:
        signal.raise_signal(signal.SIGTERM)


def losses(run):
    return [(record["step"], record["loss"]) for record in run.metrics()]


def test_a_stopped_run_goes_on_with_the_same_layout_and_refuses_another(recipe_of, data, tmp_path):
    whole = train(laid_out(recipe_of("M")), tmp_path / "whole", data=data)
    run = train(laid_out(recipe_of("M")), tmp_path / "run", data=data, progress=stop)
    assert run.steps_done == 5
    for change, said in (({"join": "order"}, "data.join: random → order"),
                         ({"long": None}, "data.long"),
                         ({"long": {"min_tokens": 150, "weight": 2.0}}, "data.long.weight: 2.5 → 2.0")):
        with pytest.raises(CheckpointError, match=said):
            train(laid_out(recipe_of("M"), **change), tmp_path / "run", data=data)
    train(laid_out(recipe_of("M")), tmp_path / "run", data=data)
    assert losses(run) == losses(whole)
    plain = train(recipe_of("M").model_copy(update={"data": DataConfig(boundaries="leak")}), tmp_path / "plain",
                  data=data)
    assert losses(plain) != losses(whole)


def test_a_run_from_before_these_keys_goes_on(recipe_of, data, tmp_path):
    run = train(recipe_of("M"), tmp_path / "run", data=data, progress=stop)
    meta = run.checkpoint_folders()[-1] / "meta.json"
    saved = json.loads(meta.read_text())
    for key in ("join", "long"):
        del saved["recipe"]["data"][key]
    meta.write_text(json.dumps(saved))
    assert train(recipe_of("M"), tmp_path / "run", data=data).finished


def test_the_run_keeps_a_plot_of_what_it_sees_and_leaves_it_alone(recipe_of, data, tmp_path):
    recipe = laid_out(recipe_of("M"), path=data)
    run = train(recipe, tmp_path / "run", progress=stop)
    seen = Stream(recipe.data, seq_len=32, batch_size=4, seed=0, vocab_size=257, steps=12).lengths()
    assert (run.path / PLOT).read_text() == seen.drawn(32)
    assert seen.drawn(32) != Stream(DataConfig(path=data, boundaries="leak"), seq_len=32, batch_size=4, seed=0,
                                    vocab_size=257, steps=12).lengths().drawn(32)
    os.utime(run.path / PLOT, ns=(5, 5))
    train(recipe, run.path)
    assert (run.path / PLOT).stat().st_mtime_ns == 5
