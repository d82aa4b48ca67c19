"""A step is one exact mean over the batch, or it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hinny.data.mix import Stream
from hinny.errors import TrainingError
from hinny.model import Model
from hinny.objective import Objective
from hinny.train.optim import make_optimizer
from hinny.train.step import Stepper

CPU = torch.device("cpu")


def stepper(recipe, seed=0):
    model = Model(recipe.model)
    model.init_weights(seed)
    return Stepper(recipe, Objective(model, recipe.optim.z_loss), make_optimizer(model, recipe.optim), CPU)


def batch_of(recipe, data, step=0):
    config = recipe.data.model_copy(update={"path": data})
    return Stream(config, seq_len=32, batch_size=4, seed=0, vocab_size=257, steps=100).batch(step)


def unevenly_masked(batch):
    mask = batch.mask.copy()
    mask[0, 3:] = False
    mask[2, :] = False
    return replace(batch, mask=mask)


def test_micro_batches_give_the_gradient_of_the_whole_batch_also_with_uneven_masks(recipe_of, data):
    whole = stepper(recipe_of("1*-"))
    batch = unevenly_masked(batch_of(whole.recipe, data))
    expected, _ = whole.accumulate(batch)
    for micro in (1, 2):
        cut = stepper(recipe_of("1*-", micro_batch_size=micro))
        torch.testing.assert_close(cut.accumulate(batch)[0], expected, rtol=1e-6, atol=0)
        for ours, theirs in zip(cut.parameters, whole.parameters, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_mean_cross_entropy_of_the_counted_targets(recipe_of, data):
    ours = stepper(recipe_of("*-"))
    batch = unevenly_masked(batch_of(ours.recipe, data))
    with torch.no_grad():
        logits = ours.objective.model(torch.from_numpy(batch.tokens), segments=torch.from_numpy(batch.segments))
    mask = torch.from_numpy(batch.mask)
    expected = torch.nn.functional.cross_entropy(logits[mask], torch.from_numpy(batch.targets)[mask])
    torch.testing.assert_close(ours.accumulate(batch)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("micro", [1, 4])
def test_the_z_loss_is_the_mean_squared_log_sum_exp_of_the_counted_targets(recipe_of, data, micro):
    ours = stepper(recipe_of("*-", optim={"z_loss": 0.3}, micro_batch_size=micro))
    batch = unevenly_masked(batch_of(ours.recipe, data))
    mask = torch.from_numpy(batch.mask)
    logits = ours.objective.model(torch.from_numpy(batch.tokens), segments=torch.from_numpy(batch.segments))[mask]
    entropy = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets)[mask])
    squares = 0.3 * (logits.logsumexp(-1) ** 2).mean()
    gradients = torch.autograd.grad(entropy + squares, ours.parameters)
    found, z_loss = ours.accumulate(batch)
    torch.testing.assert_close(found, entropy.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(z_loss, squares.detach(), rtol=1e-5, atol=0)
    for parameter, expected in zip(ours.parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
    held_out = ours.loss_sum(batch).item() / int(mask.sum())
    assert held_out == pytest.approx(entropy.item(), rel=1e-5)  # the loss of evaluation has none


def test_clipping_bounds_the_whole_gradient_and_the_norm_before_it_is_reported(recipe_of, data):
    free, clipped = stepper(recipe_of("*-")), stepper(recipe_of("*-", optim={"clip": 1e-3}))
    batch = batch_of(free.recipe, data)
    free.accumulate(batch)
    norm = torch.cat([p.grad.flatten() for p in free.parameters]).norm().item()
    assert clipped.step(0, batch).grad_norm == pytest.approx(norm, rel=1e-5)
    left = torch.cat([p.grad.flatten() for p in clipped.parameters]).norm().item()
    assert left == pytest.approx(1e-3, rel=1e-3)


def test_a_step_has_the_rate_of_its_schedule(recipe_of, data):
    ours = stepper(recipe_of("-", optim={"warmup_samples": 16}))
    rates = [ours.step(index, batch_of(ours.recipe, data, index)).lr for index in range(4)]
    assert rates == [2.5e-3, 5e-3, 7.5e-3, 1e-2]
    assert {group["lr"] for group in ours.optimizer.param_groups} == {1e-2}


def test_bf16_keeps_weights_and_loss_in_fp32_and_comes_close(recipe_of, data):
    exact, rounded = stepper(recipe_of("M1*-")), stepper(recipe_of("M1*-", precision="bf16"))
    batch = batch_of(exact.recipe, data)
    a, b = exact.step(0, batch), rounded.step(0, batch)
    assert {p.dtype for p in rounded.objective.parameters()} == {torch.float32}
    assert a.loss != b.loss
    assert b.loss == pytest.approx(a.loss, rel=2e-3)  # bf16 keeps 8 bits
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=3e-2)


def test_a_step_that_is_not_finite_names_the_batch_and_changes_no_weight(recipe_of, data):
    ours = stepper(recipe_of("-"))
    batch = batch_of(ours.recipe, data)
    ours.step(0, batch)
    with torch.no_grad():
        ours.objective.model.norm.weight[0] = torch.nan
    before = [p.detach().clone() for p in ours.objective.model.parameters()]
    with pytest.raises(TrainingError) as caught:
        ours.step(1, batch)
    assert "step 2" in str(caught.value)
    assert batch.describe() in str(caught.value)
    for old, new in zip(before, ours.objective.model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7), new.detach().nan_to_num(7))


def test_a_batch_without_a_counted_target_is_refused(recipe_of, data):
    ours = stepper(recipe_of("-"))
    batch = batch_of(ours.recipe, data)
    batch.mask[:] = np.False_
    with pytest.raises(TrainingError, match="no target"):
        ours.step(0, batch)


def test_what_is_begun_behind_a_step_that_is_not_finite_changes_no_weight(recipe_of, data, monkeypatch):
    ours, theirs = (stepper(recipe_of("*-")) for _ in range(2))
    batches = [batch_of(ours.recipe, data, step) for step in range(4)]
    for each in (ours, theirs):
        each.step(0, batches[0])
    held = [{**theirs.optimizer.state_dict()["state"]}, [p.detach().clone() for p in theirs.parameters]]
    accumulate = ours.accumulate

    def spoiled(batch):
        loss, z_loss = accumulate(batch)
        return loss * torch.nan, z_loss

    monkeypatch.setattr(ours, "accumulate", spoiled)
    bad = ours.begin(1, batches[1])
    monkeypatch.undo()
    behind = ours.begin(2, batches[2])
    for begun, number, why in ((bad, 2, "the loss is nan"), (behind, 3, "the step before it was not finite")):
        with pytest.raises(TrainingError, match=rf"step {number}: {why}.* not applied") as caught:
            begun.result()
        assert batches[number - 1].describe() in str(caught.value)
    for mine, other in zip(ours.parameters, held[1], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(ours.optimizer.state_dict()["state"].values(), held[0].values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)
    # told of it, it goes on as if neither had been
    assert ours.step(3, batches[3]) == theirs.step(3, batches[3])
    for mine, other in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(mine, other)
