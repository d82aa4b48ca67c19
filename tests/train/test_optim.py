"""Schedules in samples, and what weight decay spares."""

import math

import pytest
import torch

from hinny.config import OptimConfig
from hinny.errors import ConfigError
from hinny.model import Model
from hinny.train.optim import check_schedule, decays, learning_rate, make_optimizer


def optim(schedule, **changes):
    fields = {"lr": 1.0, "schedule": schedule, "min_lr": 0.1, "warmup_samples": 100, "weight_decay": 0.1,
              "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **changes}
    return OptimConfig(**{key: value for key, value in fields.items() if value is not None})


@pytest.mark.parametrize(("samples", "rate"), [
    (1, 0.01), (50, 0.5), (100, 1.0),
    (400, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),  # a quarter of the decay: (1 + cos 45°) / 2
    (700, 0.55), (1300, 0.1), (2000, 0.1),
])
def test_cosine_warms_up_and_falls_to_min_lr_at_the_end(samples, rate):
    assert learning_rate(optim("cosine"), samples, 1300) == pytest.approx(rate, rel=1e-15)


@pytest.mark.parametrize(("samples", "rate"), [
    (25, 0.25), (100, 1.0), (800, 1.0), (900, 0.775), (1000, 0.55), (1200, 0.1),
])
def test_wsd_stays_and_falls_linearly_over_its_last_samples(samples, rate):
    assert learning_rate(optim("wsd", decay_samples=400), samples, 1200) == pytest.approx(rate, rel=1e-15)


@pytest.mark.parametrize(("samples", "rate"), [(10, 0.1), (100, 1.0), (1200, 1.0)])
def test_constant_stays(samples, rate):
    assert learning_rate(optim("constant", min_lr=None), samples, 1200) == rate


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(optim("constant", min_lr=None, warmup_samples=0), 1, 10) == 1.0


@pytest.mark.parametrize(("config", "total", "named"), [
    (optim("cosine"), 100, "warmup_samples"), (optim("wsd", decay_samples=400), 499, r"decay_samples \(400\)"),
])
def test_a_schedule_longer_than_the_run_is_refused(config, total, named):
    with pytest.raises(ConfigError, match=named):
        check_schedule(config, total)
    check_schedule(config, total + 1)


def test_decay_spares_vectors_biases_and_the_decay_rates_of_both_mambas(recipe_of):
    names = {name: decays(name, parameter) for name, parameter in Model(recipe_of("M1*-").model).named_parameters()}
    spared = {name for name, decayed in names.items() if not decayed}
    assert {"layers.0.layer.A_log", "layers.0.layer.D", "layers.0.layer.dt_bias", "layers.0.layer.norm.weight",
            "layers.0.norm.weight", "layers.1.layer.A_log", "layers.1.layer.D", "layers.1.layer.dt_bias",
            "layers.1.layer.conv.bias", "layers.2.norm.weight", "layers.3.norm.weight", "norm.weight"} <= spared
    assert all(name.endswith((".bias", "A_log", ".D", "dt_bias", "norm.weight")) for name in spared)
    assert names["embedding.weight"]
    assert names["head.weight"]
    assert names["layers.1.layer.conv.weight"]  # the taps are decayed, as in Megatron
    assert names["layers.1.layer.dt_proj.weight"]


def test_the_optimiser_decays_its_first_group_only(recipe_of):
    model = Model(recipe_of("1-").model)
    model.init_weights(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, optim("constant", min_lr=None, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if decays(name, parameter) else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk, rtol=1e-6, atol=0)
