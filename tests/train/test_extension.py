"""A run with [init] begins with another run's weights, and with nothing else of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from converted_runs import converted, values_of
from extensions import ROPE, changed, extended
from torch.nn import functional as F

from hinny.checkpoint import load_model, read_meta
from hinny.config import load_recipe, to_toml
from hinny.data.mix import Stream
from hinny.data.prepare import prepare
from hinny.errors import CheckpointError, ConfigError, DataError, RunError
from hinny.run import Run
from hinny.train.loop import train
from hinny.train.resume import check_sight


@pytest.fixture(scope="module")
def hybrid(recipe_of):
    recipe = recipe_of("M*-")
    return changed(recipe, model={"attention": ROPE})


@pytest.fixture(scope="module")
def base(hybrid, data, tmp_path_factory):
    return train(hybrid, tmp_path_factory.mktemp("base") / "run", data=data)


def first_loss(model, recipe, data) -> float:
    """The mean loss of the run's first batch, computed by hand."""
    stream = Stream(recipe.data.model_copy(update={"path": data}), seq_len=recipe.train.seq_len,
                    batch_size=recipe.train.batch_size, seed=recipe.train.seed, vocab_size=257,
                    steps=recipe.train.steps)
    batch = stream.batch(0)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens), segments=torch.from_numpy(batch.segments))
    losses = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="none")
    counted = torch.from_numpy(batch.mask).flatten()
    return float(losses[counted].mean())


def test_the_first_loss_is_that_of_the_base_and_the_schedule_begins_anew(hybrid, base, data, tmp_path):
    recipe = extended(hybrid, base.path)
    run = train(recipe, tmp_path / "long", data=data)
    first = run.metrics()[0]
    assert first["loss"] == pytest.approx(first_loss(load_model(base), recipe, data), rel=1e-5)
    assert first["step"] == 1
    assert first["tokens"] == 2 * 64
    assert first["lr"] == pytest.approx(1e-2 * 2 / 4)  # two of four warm-up samples
    # and an untrained model has another loss
    assert abs(first["loss"] - train(changed(recipe, model={}).model_copy(update={"init": None}), tmp_path / "fresh",
                                     data=data).metrics()[0]["loss"]) > 0.1


def test_an_earlier_checkpoint_is_taken_by_its_step(hybrid, base, data, tmp_path):
    recipe = extended(hybrid, base.path, init={"step": 8})
    run = train(recipe, tmp_path / "long", data=data)
    assert run.metrics()[0]["loss"] == pytest.approx(first_loss(load_model(base, step=8), recipe, data), rel=1e-5)
    assert read_meta(run)["init"]["step"] == 8


def test_every_checkpoint_says_what_the_run_began_with(hybrid, base, data, tmp_path):
    run = train(extended(hybrid, base.path, train={"save_every": 2}), tmp_path / "long", data=data)
    for step in (2, 4):
        told = read_meta(run, step)["init"]
        assert {key: told[key] for key in ("from", "step", "name", "seq_len")} == {
            "from": str(base.path), "step": 12, "name": "tiny", "seq_len": 32}


def test_a_killed_extension_goes_on_as_if_it_was_never_killed_though_the_base_is_gone(hybrid, base, data, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base.path, copy)
    recipe = extended(hybrid, copy, train={"save_every": 1, "keep_every": 1})
    whole = train(recipe, tmp_path / "whole", data=data)
    killed = tmp_path / "killed"
    shutil.copytree(whole.path, killed)
    for step in (3, 4):
        shutil.rmtree(killed / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(copy)
    again = train(recipe, killed, data=data)
    assert [r["loss"] for r in again.metrics()] == [r["loss"] for r in whole.metrics()]
    assert read_meta(again)["init"] == read_meta(whole)["init"]


def test_another_base_on_going_on_is_refused_and_a_moved_one_is_not(hybrid, base, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base.path, moved)
    recipe = extended(hybrid, base.path)
    train(recipe, tmp_path / "long", data=data)
    assert train(extended(hybrid, moved), tmp_path / "long", data=data).finished
    with pytest.raises(CheckpointError, match=r"began with step 12 of .* and step 8 of .* has other weights"):
        train(extended(hybrid, base.path, init={"step": 8}), tmp_path / "long", data=data)
    with pytest.raises(CheckpointError, match="the recipe now begins from its own first weights"):
        train(recipe.model_copy(update={"init": None}), tmp_path / "long", data=data)


def test_positions_may_change_and_widths_may_not(hybrid, base, data, tmp_path):
    none = {key: value for key, value in ROPE.items() if not key.startswith("rope")} | {"positions": "none"}
    dropped = extended(hybrid, base.path, model={"attention": none})
    assert train(dropped, tmp_path / "none", data=data).finished
    wider = extended(hybrid, base.path, model={"mlp": {"d_ff": 64, "activation": "gelu"}})
    with pytest.raises(CheckpointError, match=r"another architecture than tiny:\n  model\.mlp\.d_ff: 32 → 64\nTake"):
        train(wider, tmp_path / "wide", data=data)


def test_what_says_where_a_pattern_comes_from_has_no_effect(recipe_of, data, tmp_path):
    plain = recipe_of("M-M-")
    base = train(plain, tmp_path / "base", data=data)
    table = plain.model_dump(mode="json", exclude_none=True)["model"]
    ratios = changed(plain, model={**table, "n_layers": 4, "mlp_ratio": 0.5, "pattern": "M-M-", "init_std": 0.5})
    assert train(extended(ratios, base.path), tmp_path / "long", data=data).finished


def test_data_without_a_document_longer_than_the_bases_sequences_are_refused(recipe_of, data, tmp_path):
    recipe = recipe_of("M", seq_len=512, steps=1, batch_size=2, micro_batch_size=2, save_every=1,
                       optim={"warmup_samples": 0})
    base = train(recipe, tmp_path / "base", data=data)
    with pytest.raises(DataError, match="No document is longer than the 512 tokens that the base was trained on"):
        train(extended(recipe, base.path, length=1024), tmp_path / "long", data=data)
    assert not (tmp_path / "long" / "recipe.toml").exists()


def test_data_in_other_words_are_refused(hybrid, base, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"other words to learn {number} " * 9)
    prepare(tmp_path / "other", text=[text], vocab_size=257, held_out=0.2)
    with pytest.raises(CheckpointError, match=r"the tokenizer of .*other is not that of .* Prepare the data with it"):
        train(extended(hybrid, base.path), tmp_path / "long", data=str(tmp_path / "other"))
    assert not (tmp_path / "long" / "recipe.toml").exists()


def test_a_base_that_is_not_there_is_refused_with_the_fix(hybrid, base, data, tmp_path):
    out = tmp_path / "long"
    with pytest.raises(ConfigError, match=r"init\.from is not set.* init\.from=RUN"):
        train(changed(hybrid, init={}), out, data=data)
    with pytest.raises(RunError, match="nowhere is not a run directory"):
        train(extended(hybrid, tmp_path / "nowhere"), out, data=data)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 5"):
        train(extended(hybrid, base.path, init={"step": 5}), out, data=data)
    with pytest.raises(ConfigError, match="is the run directory that is to be written"):
        train(extended(hybrid, out), out, data=data)


def test_processes_with_other_bases_are_refused(hybrid, tmp_path):
    first, out = extended(hybrid, "runs/base"), Run(tmp_path / "long")
    check_sight(out, extended(hybrid, "runs/base"), first, None)
    for other, told in ((extended(hybrid, "runs/other"), "init.from is runs/base on the first and runs/other"),
                        (extended(hybrid, "runs/base", init={"step": 3}), "init.step is None on the first and 3"),
                        (first.model_copy(update={"init": None}), "init.from is runs/base on the first and None")):
        with pytest.raises(ConfigError, match=f"different recipes: {told}"):
            check_sight(out, other, first, None)


def test_converted_weights_are_a_base_and_take_no_other(hybrid, base, data, tmp_path):
    folder = tmp_path / "converted"
    converted(folder, values_of(hybrid.model, seed=3), config=hybrid.model)
    recipe = extended(hybrid, folder)
    run = train(recipe, tmp_path / "long", data=data)
    assert run.metrics()[0]["loss"] == pytest.approx(first_loss(load_model(folder), recipe, data), rel=1e-5)
    with pytest.raises(ConfigError, match=r"holds converted weights, and init.from names those of"):
        train(extended(hybrid, base.path), folder, data=data)


def test_the_section_is_written_with_its_key_and_knows_no_other(hybrid, tmp_path):
    recipe = extended(hybrid, "runs/base", init={"step": 7})
    (tmp_path / "long.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "long.toml") == recipe
    assert json.loads(recipe.model_dump_json())["init"] == {"from": "runs/base", "step": 7}
    with pytest.raises(ConfigError, match=r"unknown key init\.source"):
        load_recipe(tmp_path / "long.toml", ["init.source=x"])
