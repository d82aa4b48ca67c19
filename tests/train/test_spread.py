"""`hinny train` spread over processes is the training of one process, and goes on over any number of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from hinny.checkpoint import load_model
from hinny.checkpoint.store import read_weights
from hinny.config import ParallelConfig, Recipe
from hinny.errors import ConfigError
from hinny.run import Run
from hinny.train.loop import train


def of(recipe: Recipe, **parallel: Any) -> Recipe:
    """The recipe with this [parallel]."""
    return recipe.model_copy(update={"parallel": ParallelConfig(**parallel)})


def _journey(folder: Path, data: str, recipes: list[tuple[str, Recipe]]) -> list[bool]:
    return [train(recipe, folder / name, data=data).finished for name, recipe in recipes]


def same_losses(run: Run, other: Run, rel: float) -> None:
    """The same steps with the same losses, norms and held-out losses, but for the order of sums in float32."""
    ours, theirs = run.metrics(), other.metrics()
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, record in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "held_out_loss", "z_loss", "lr", "tokens"):
            assert (key in mine) == (key in record)
            if key in record:
                assert mine[key] == pytest.approx(record[key], rel=rel), (mine["step"], key)


def test_every_kind_of_mesh_trains_as_one_process(recipe_of, data, tmp_path):
    """Packed documents, masks and synthetic sequences, gradient accumulation, z-loss, held-out losses."""
    hybrid = recipe_of("1M|*-", optim={"z_loss": 1e-3}, steps=4, micro_batch_size=1, eval_every=2,
                       synthetic={"share": 0.5, "tasks": {"mqar": 1}})
    one = hybrid.model_copy(update={"model": hybrid.model.model_copy(update={
        "attention": hybrid.model.attention.model_copy(update={"n_kv_heads": 2}), "vocab_size": 258})})
    meshes = {"shard": of(one), "replicate": of(one, replicate=2), "tensor": of(one, tensor=2),
              "context": of(one, context=2, recompute="full"), "pipeline": of(one, pipeline=2)}
    train(one, tmp_path / "one", data=data)
    assert run_ranks(2, _journey, tmp_path, data, list(meshes.items())) == [[True] * len(meshes)] * 2
    expected = load_model(tmp_path / "one").state_dict()
    for name in meshes:
        same_losses(Run(tmp_path / name), Run(tmp_path / "one"), rel=2e-4)
        for key, weight in load_model(tmp_path / name).state_dict().items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=2e-3, msg=f"{name}: {key}")
    assert {"straggler", "straggler_seconds"} <= set(Run(tmp_path / "shard").metrics()[0])


def test_a_run_goes_on_over_two_then_one_then_four_processes(recipe_of, data, tmp_path):
    """At last as a pipeline of sharded stages, whose cuts the run did not begin with."""
    def steps(count: int, pattern: str = "M1*-", **parallel: Any) -> Recipe:
        return of(recipe_of(pattern, steps=12, save_every=count, micro_batch_size=1), **parallel)

    whole = train(steps(12), tmp_path / "whole", data=data)
    folder = tmp_path / "moved"
    assert run_ranks(2, _stopped, folder, data, steps(4), 4) == [4, 4]
    assert _stopped(folder, data, steps(4), 8) == 8
    assert run_ranks(4, _stopped, folder, data, steps(4, "M1|*-", pipeline=2), 12) == [12] * 4
    same_losses(Run(folder), whole, rel=2e-4)


def _stopped(folder: Path, data: str, recipe: Recipe, step: int) -> int:
    """Train until `step`, then ask this process to stop, as SLURM would ask all of them; one is enough."""
    def progress(now: dict[str, Any]) -> None:
        if now["step"] == step:
            os.kill(os.getpid(), 15)

    return train(recipe, folder, data=data, progress=progress).steps_done


def _refused(folder: Path, data: str, recipe: Recipe) -> str:
    with pytest.raises(ConfigError) as refused:
        train(recipe, folder / str(dist.get_rank()), data=data)
    return str(refused.value)


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_numbers(recipe_of, data, tmp_path):
    recipe = recipe_of("-", batch_size=2, micro_batch_size=2)
    odd = of(recipe_of("-", seq_len=31), tensor=2)
    for said, length in zip(run_ranks(2, _refused, tmp_path, data, recipe), run_ranks(2, _refused, tmp_path, data, odd),
                            strict=True):
        assert "train.batch_size (2) must be a multiple of train.micro_batch_size (2)" in said
        assert "parallel.shard (2) = 4" in said
        assert "train.seq_len (31) must be a multiple of" in length
    assert not list(tmp_path.glob("*/recipe.toml"))  # before anything was written


def _cut_by_rank(folder: Path, data: str, recipes: list[Recipe]) -> str:
    with pytest.raises(ConfigError) as refused:
        train(recipes[dist.get_rank()], folder / "run", data=data)
    return str(refused.value)


def test_processes_that_would_cut_the_model_otherwise_are_refused(recipe_of, data, tmp_path):
    recipes = [of(recipe_of(pattern, micro_batch_size=1), pipeline=2) for pattern in ("M|-*", "M-|*")]
    for said in run_ranks(2, _cut_by_rank, tmp_path, data, recipes):
        assert "different recipes: pattern is M|-* on the first and M-|* on another" in said


def test_graphs_and_missing_processes_are_refused(recipe_of, data, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs is true and this training is on device cpu"):
        train(recipe_of("-", cuda_graphs=True), tmp_path / "graphs", data=data)
    with pytest.raises(ConfigError, match="tensor 2 = 2 x what is left, but there are 1 processes"):
        train(of(recipe_of("-"), tensor=2), tmp_path / "alone", data=data)


def test_the_weights_of_a_new_run_do_not_depend_on_the_mesh(recipe_of, data, tmp_path):
    recipe = recipe_of("M1*-", steps=2, micro_batch_size=2, optim={"lr": 1e-30, "min_lr": 0.0})
    train(recipe, tmp_path / "one", data=data)
    run_ranks(2, _journey, tmp_path, data, [("two", recipe)])
    ours, theirs = (read_weights(Run(tmp_path / name)) for name in ("one", "two"))
    for name in ours.infos:
        torch.testing.assert_close(ours.read(name), theirs.read(name), rtol=0, atol=1e-12)
