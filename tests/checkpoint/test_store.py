"""A checkpoint is whole or absent, is verified when read, and gives back every bit."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from hinny.checkpoint import clean, differences, latest, load, load_model, save, store
from hinny.config import Recipe, validate
from hinny.errors import CheckpointError
from hinny.model import Model
from hinny.run import Run
from hinny.train.optim import make_optimizer

RECIPE = validate(Recipe, {
    "name": "tiny", "description": "an MLP",
    "model": {"pattern": "--", "d_model": 16, "vocab_size": 257, "norm": "rmsnorm", "norm_eps": 1e-5,
              "tie_embeddings": False, "init_std": 0.02, "mlp": {"d_ff": 32, "activation": "gelu"}},
    "data": {"boundaries": "reset"},
    "optim": {"lr": 1e-2, "schedule": "constant", "warmup_samples": 0, "weight_decay": 0.1, "beta1": 0.9,
              "beta2": 0.95, "eps": 1e-8},
    "train": {"seq_len": 16, "batch_size": 2, "micro_batch_size": 2, "steps": 4, "seed": 0, "precision": "fp32",
              "log_every": 1, "save_every": 2},
}, "test")
EXTRA = {"recipe": RECIPE.model_dump(mode="json"), "tokens": 7}


def trained(seed=0, steps=2):
    """A model and its optimiser after some steps."""
    model = Model(RECIPE.model)
    model.init_weights(seed)
    optimizer = make_optimizer(model, RECIPE.optim)
    for _ in range(steps):
        advance(model, optimizer)
    return model, optimizer


def advance(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(32).view(2, 16)).square().mean().backward()
    optimizer.step()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.write_recipe(RECIPE)
    return run


@contextmanager
def file_size_limit(size):
    """Writing past `size` bytes fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_loaded_run_goes_on_bit_for_bit(run):
    model, optimizer = trained()
    save(run, 2, model, optimizer, EXTRA)
    resumed, resumed_optimizer = trained(seed=1, steps=0)
    meta = load(run, resumed, resumed_optimizer)
    assert (meta["step"], meta["tokens"]) == (2, 7)
    for _ in range(3):
        advance(model, optimizer)
        advance(resumed, resumed_optimizer)
    for name, expected in weights(model).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_load_model_gives_the_saved_weights_without_the_optimiser(run):
    model, optimizer = trained()
    save(run, 2, model, optimizer, EXTRA)
    loaded = load_model(run.path)
    assert not loaded.training
    for name, expected in weights(model).items():
        assert torch.equal(weights(loaded)[name], expected), name


def test_the_last_two_are_kept_and_any_of_them_can_be_loaded(run):
    model, optimizer = trained()
    for step in (2, 4, 100):
        save(run, step, model, optimizer, EXTRA)
        at_step = weights(model)
        advance(model, optimizer)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000100"]
    assert latest(run).name == "step-00000100"
    loaded = load_model(run, step=4)
    assert not torch.equal(loaded.head.weight, at_step["head.weight"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2\. It has: step-00000004, step-00000100"):
        load_model(run, step=2)


def test_without_a_checkpoint_the_error_says_so(run):
    assert latest(run) is None
    with pytest.raises(CheckpointError, match=r"has no checkpoint.*train it first"):
        load_model(run)


def test_a_full_disk_leaves_the_last_good_checkpoint_in_force_and_nothing_half_written(run):
    model, optimizer = trained()
    save(run, 2, model, optimizer, EXTRA)
    at_step = weights(model)
    advance(model, optimizer)
    claim = r"step 4 could not be written.*File too large.*good checkpoint is step-00000002\."
    with file_size_limit(30_000), pytest.raises(CheckpointError, match=claim):
        save(run, 4, model, optimizer, EXTRA)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000002"]
    for name, value in weights(load_model(run)).items():
        assert torch.equal(value, at_step[name])
    save(run, 4, model, optimizer, EXTRA)  # with room again
    assert latest(run).name == "step-00000004"


def test_a_full_disk_at_the_first_save_says_that_there_is_no_checkpoint(run):
    with file_size_limit(30_000), pytest.raises(CheckpointError, match="none was saved yet"):
        save(run, 2, *trained(), EXTRA)
    assert list(run.checkpoints.iterdir()) == []


def test_a_save_that_dies_before_the_rename_is_no_checkpoint_and_is_swept_up(run, monkeypatch):
    model, optimizer = trained()
    save(run, 2, model, optimizer, EXTRA)
    monkeypatch.setattr(store.shutil, "rmtree", lambda *_, **__: None)  # a killed process sweeps nothing

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 4, model, optimizer, EXTRA)
    monkeypatch.undo()
    assert (run.checkpoints / ".partial-step-00000004" / "meta.json").exists()
    assert latest(run).name == "step-00000002"
    clean(run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000002"]


def test_an_old_checkpoint_or_a_leftover_that_cannot_be_removed_is_named_with_the_one_in_force(run, monkeypatch):
    model, optimizer = trained()
    for step in (2, 4):
        save(run, step, model, optimizer, EXTRA)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store.shutil, "rmtree", refuse)
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be removed: Permission denied.*is step-00000006"):
        save(run, 6, model, optimizer, EXTRA)
    with pytest.raises(CheckpointError, match=r"partial-step-00000002 cannot be removed.*is step-00000006"):
        clean(run)
    monkeypatch.undo()
    clean(run)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_one_flipped_bit_is_found_and_the_whole_checkpoint_before_is_named(run):
    model, optimizer = trained()
    for step in (2, 4):
        save(run, step, model, optimizer, EXTRA)
    damage(run.checkpoints / "step-00000004" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged.*step-00000002, is whole: delete"):
        load_model(run)
    damage(run.checkpoints / "step-00000002" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="No earlier checkpoint is whole"):
        load_model(run)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
def test_a_missing_or_cut_file_is_named(run, name):
    model, optimizer = trained()
    save(run, 2, model, optimizer, EXTRA)
    file = run.checkpoints / "step-00000002" / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=name):
        load_model(run)
    file.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_model(run)


def test_meta_names_every_file_with_its_checksum(run):
    folder = save(run, 2, *trained(), EXTRA)
    meta = json.loads((folder / "meta.json").read_text())
    assert set(meta["files"]) == {p.name for p in folder.iterdir()} - {"meta.json"}
    assert all(len(digest) == 64 for digest in meta["files"].values())


def test_a_checkpoint_of_another_model_is_refused(run):
    save(run, 2, *trained(), EXTRA)
    deeper = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"pattern": "---"})})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this model.*layers\.2"):
        load(run, Model(deeper.model))
    wider = RECIPE.model.model_copy(update={"mlp": RECIPE.model.mlp.model_copy(update={"d_ff": 64})})
    with pytest.raises(CheckpointError, match=r"could not be loaded.*[Ss]ize"):
        load(run, Model(wider))
    run.write_recipe(deeper)
    with pytest.raises(CheckpointError, match=r"\[model\] in recipe\.toml is not that of the checkpoint"):
        load_model(run)


def test_differences_name_the_key_with_both_values():
    old = {"name": "a", "optim": {"lr": 1.0, "eps": 1.0}, "synthetic": None}
    new = {"name": "b", "optim": {"lr": 2.0, "eps": 1.0}, "synthetic": {"share": 0.5}}
    assert differences(old, new, ("name",)) == {"optim.lr": (1.0, 2.0), "synthetic.share": (None, 0.5)}
