"""Optimiser steps on a GPU: replayed as a CUDA graph or launched one by one, and begun before the last one ended."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="hinny.config reads recipes")

from hinny.config import load_recipe
from hinny.data.mix import Batch
from hinny.errors import TrainingError
from hinny.model import Model
from hinny.objective import Objective
from hinny.train.optim import make_optimizer
from hinny.train.step import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")]
ROWS, LENGTH = 4, 256


@pytest.fixture(autouse=True)
def _as_in_use() -> None:
    """Graphs are recorded with PyTorch's usual ops, not with its deterministic ones."""
    torch.use_deterministic_algorithms(False)


def stepper(name: str, micro: int, graphs: bool) -> Stepper:
    recipe = load_recipe(name, [f"train.batch_size={ROWS}", f"train.micro_batch_size={micro}", "train.steps=20",
                                f"train.seq_len={LENGTH}", f"train.cuda_graphs={'true' if graphs else 'false'}",
                                "train.precision=\"bf16\"", "optim.warmup_samples=4"])
    objective = Objective(Model(recipe.model), recipe.optim.z_loss)
    objective.model.init_weights(0)
    objective.cuda()
    return Stepper(recipe, objective, make_optimizer(objective.model, recipe.optim), torch.device("cuda"))


def batch(seed: int) -> Batch:
    """Documents of about 60 tokens, most targets counted."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(200, size=(ROWS, LENGTH + 1))
    documents = (draw.random((ROWS, LENGTH)) < 1 / 60).cumsum(1).astype(np.int32)
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), draw.random((ROWS, LENGTH)) < 0.9, documents,
                 tuple(f"row {i}" for i in range(ROWS)))


@pytest.mark.parametrize("micro", [ROWS, 2])
@pytest.mark.parametrize("name", ["tiny-transformer", "tiny-mamba", "tiny-mamba2", "tiny-hybrid"])
def test_replayed_steps_are_the_steps(name: str, micro: int) -> None:
    ours, plain = stepper(name, micro, graphs=True), stepper(name, micro, graphs=False)
    begun = [ours.begin(step, batch(step)) for step in range(6)]
    for step, each in enumerate(begun):
        found, expected = each.result(), plain.step(step, batch(step))
        assert found.loss == pytest.approx(expected.loss, rel=2e-3), step
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=2e-2), step
    for mine, other in zip(ours.parameters, plain.parameters, strict=True):
        assert (mine - other).norm() <= 0.02 * other.norm() + 1e-4


@pytest.mark.parametrize("micro", [ROWS, 2])
def test_nothing_begun_behind_a_step_that_is_not_finite_is_applied_until_it_is_told(micro: int) -> None:
    ours = stepper("tiny-hybrid", micro, graphs=True)
    for step in range(3):
        ours.step(step, batch(step))
    before = [p.detach().clone() for p in ours.parameters]
    (first, *_), held = ours.parameters, ours.parameters[0].detach().clone()
    first.data[0, 0] = torch.nan
    begun = [ours.begin(step, replace(batch(step), tokens=np.zeros((ROWS, LENGTH), np.int64))) for step in (3, 4)]
    for each in begun:
        with pytest.raises(TrainingError, match="not applied"):
            each.result()
    first.data.copy_(held)
    for mine, other in zip(ours.parameters, before, strict=True):
        assert torch.equal(mine, other)
    assert np.isfinite(ours.step(5, batch(5)).loss)
    assert not torch.equal(ours.parameters[0], before[0])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_is_begun_without_a_wait() -> None:
    ours = stepper("tiny-hybrid", ROWS, graphs=True)
    for step in range(3):
        ours.step(step, batch(step))
    try:
        torch.cuda.set_sync_debug_mode("error")
        begun = [ours.begin(step, batch(step)) for step in (3, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(each.result().loss) for each in begun)
