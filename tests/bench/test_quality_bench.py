"""The cost of shorter numbers is that of the text, token by token, and nothing where nothing is shortened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import small_model

from hinny.bench.quality import bench_quality, compare, interval, steps
from hinny.checkpoint.store import load_model
from hinny.data.mix import Batch, heldout_batches
from hinny.errors import ConfigError
from hinny.infer.prepare import prepare
from hinny.run import Run

TOKENS = np.random.default_rng(0).integers(37, size=(3, 9))


def batch(mask: np.ndarray) -> Batch:
    return Batch(TOKENS[:, :-1], TOKENS[:, 1:], mask, None, ("a", "b", "c"))


@torch.no_grad()
def test_steps_are_the_logits_of_the_whole_text():
    model = small_model("M-*-").float().requires_grad_(False)
    wanted = model(torch.from_numpy(TOKENS))
    found = torch.stack(list(steps(model, torch.float32, TOKENS)), 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_difference_is_that_of_the_losses_of_what_counts():
    one, other = (small_model("M1*-", seed).float().requires_grad_(False) for seed in (0, 1))
    mask = np.ones((3, 8), bool)
    mask[2, 5:] = False
    found = compare(one, torch.float32, other, [batch(mask)])
    logits = [model(torch.from_numpy(TOKENS[:, :-1])) for model in (one, other)]
    targets = torch.from_numpy(TOKENS[:, 1:])
    losses = [torch.nn.functional.cross_entropy(x.transpose(1, 2), targets, reduction="none").numpy() for x in logits]
    means = [(loss * mask).sum(1) / mask.sum(1) for loss in losses]
    np.testing.assert_allclose(found.loss, means[0], rtol=1e-4)
    np.testing.assert_allclose(found.change, means[0] - means[1], rtol=1e-3, atol=1e-4)
    differ = (logits[0].argmax(-1) != logits[1].argmax(-1)).numpy()
    assert found.changed == differ[mask].mean()
    assert found.furthest == pytest.approx(float((logits[0] - logits[1]).abs()[torch.from_numpy(mask)].max()), rel=1e-4)


def test_shorter_states_cost_something_and_float32_ones_nothing():
    model = small_model("M-1-").float().requires_grad_(False)
    prepare(model)
    mask = np.ones((3, 8), bool)
    nothing = compare(model, torch.float32, model, [batch(mask)])
    assert nothing.furthest == 0
    assert nothing.changed == 0
    half, brain = (compare(model, dtype, model, [batch(mask)]).furthest for dtype in (torch.float16, torch.bfloat16))
    assert 0 < half < brain < 1


def test_an_interval_is_that_of_the_mean():
    assert interval(np.array([1.0, 3.0])) == pytest.approx((2, 2 - 1.96, 2 + 1.96))


def test_rows_say_what_was_compared_with_what(trained_run: Run):
    rows = bench_quality(str(trained_run.path), states=["fp32", "bf16"], windows=3, length=16)
    trained, *rows = rows
    assert (trained["value"], trained["command"]) == (trained_run.steps_done, trained_run.env["command"])
    shapes = {r["shape"] for r in rows}
    assert shapes == {f"weights={pair} windows=3 length=16" for pair in (
        "fp32 state=fp32 against=fp32/fp32", "fp32 state=bf16 against=fp32/fp32",
        "bf16 state=fp32 against=fp32/fp32", "bf16 state=bf16 against=bf16/fp32")}
    found = {(r["what"], r["shape"][:23].strip()): r for r in rows}
    same, shorter = found["quality.loss_change", "weights=fp32 state=fp32"], found["quality.loss_change",
                                                                                   "weights=bf16 state=fp32"]
    assert same["value"] == same["low"] == same["high"] == 0
    assert shorter["low"] < shorter["value"] < shorter["high"]
    assert abs(shorter["value"]) < 0.05


@torch.no_grad()
def test_the_loss_is_the_models_own(trained_run: Run):
    value = next(r["value"] for r in bench_quality(str(trained_run.path), weights=["fp32"], states=["fp32"], windows=3,
                                                   length=16) if r["what"] == "quality.loss")
    recipe = trained_run.recipe
    model = load_model(trained_run)
    (text,) = heldout_batches(recipe.data, seq_len=16, batch_size=3, windows=3, vocab_size=257)
    logits = model(torch.from_numpy(text.tokens)).flatten(0, 1)
    assert value == pytest.approx(float(torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(text.targets).flatten())), rel=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    (dict(weights=["int2"]), "weights is 'int2'; allowed: fp32, bf16, int8"), (dict(states=["fp8"]), "states is 'fp8'"),
    (dict(windows=1), "windows is 1"), (dict(length=0), "length 0")], ids=str)
def test_what_cannot_be_measured_is_refused(trained_run: Run, options, message):
    with pytest.raises(ConfigError, match=message):
        bench_quality(str(trained_run.path), **options)
