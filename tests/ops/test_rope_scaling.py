"""Rotary positions past the trained length: as transformers makes them, and through the whole model alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import small_config

from hinny.config import ModelConfig, load_recipe, validate
from hinny.errors import ConfigError
from hinny.model import Model
from hinny.ops import Stretch, rope
from hinny.ops.rope import rope_rates

YARN = {"method": "yarn", "factor": 4.0, "trained_len": 64}
ROPE = dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=0.5, rope_base=10000.0)


@pytest.mark.parametrize(("kind", "trained", "factor", "fast", "slow", "dim", "base"), [
    ("linear", 1024, 4.0, None, None, 32, 10000.0), ("yarn", 1024, 4.0, 32.0, 1.0, 64, 10000.0),
    ("yarn", 4096, 8.0, 32.0, 1.0, 32, 500000.0), ("yarn", 64, 2.5, 16.0, 2.0, 16, 100.0),
    ("yarn", 2048, 16.0, 64.0, 4.0, 128, 10000.0)])
def test_rates_and_amplitude_are_those_of_transformers(kind: str, trained: int, factor: float, fast: float | None,
                                                       slow: float | None, dim: int, base: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    told: dict[str, Any] = {"rope_type": kind, "rope_theta": base, "factor": factor,
                            "original_max_position_embeddings": trained}
    if fast is not None:
        told |= {"beta_fast": fast, "beta_slow": slow}
    config = transformers.LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=told,
                                      max_position_embeddings=int(trained * factor))
    expected, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    stretch = Stretch(factor, trained, fast, slow)
    found = rope_rates(base, dim, torch.float32, torch.device("cpu"), stretch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert stretch.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_interpolated_positions_are_the_trained_ones_between() -> None:
    x = torch.randn(1, 8, 2, 16, dtype=torch.float64)
    found = rope(x, torch.arange(8) * 4, base=100.0, rope_dim=16, stretch=Stretch(4.0, 8))
    torch.testing.assert_close(found, rope(x, torch.arange(8), base=100.0, rope_dim=16), rtol=1e-12, atol=1e-12)


def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones() -> None:
    stretch = Stretch(8.0, 4096, 32.0, 1.0)
    kept = stretch.kept(10000.0, 64)
    turns = 4096 * 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32) / (2 * math.pi)
    assert torch.equal(kept[turns > 40], torch.ones_like(kept[turns > 40]))
    assert torch.equal(kept[turns < 0.9], torch.zeros_like(kept[turns < 0.9]))
    assert bool((kept.diff() <= 0).all())


def config(**attention: Any) -> ModelConfig:
    return small_config("M*-", attention={**ROPE, **attention})


def model(**attention: Any) -> Model:
    made = Model(config(**attention))
    made.init_weights(0)
    return made.double().eval()


@pytest.mark.parametrize("attention", [
    {"rope_scaling": YARN}, {"rope_scaling": {"method": "interpolation", "factor": 2.0, "trained_len": 8}},
    {"score_scale": 1.5}, {"rope_scaling": YARN, "score_scale": 1.25}])
def test_reading_in_pieces_equals_one_pass_and_differs_from_plain_positions(attention: dict[str, Any]) -> None:
    made, plain = model(**attention), model()
    tokens = torch.randint(37, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = made(tokens)
        state = made.init_state(2)
        pieces = torch.cat([made(tokens[:, a:b], state) for a, b in ((0, 7), (7, 8), (8, 9), (9, 20))], 1)
        assert float((whole - plain(tokens)).abs().max()) > 1e-3
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def test_a_scale_of_scores_multiplies_queries() -> None:
    scaled, plain = model(score_scale=2.0), model()
    with torch.no_grad():
        plain.layers[1].layer.q.weight.mul_(2.0)
        tokens = torch.arange(12)[None]
        torch.testing.assert_close(scaled(tokens), plain(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_scaling": {"method": "interpolation", "factor": 2.0, "trained_len": 8, "beta_fast": 3.0}},
     "beta_fast has no effect with method"),
    ({"rope_scaling": YARN | {"beta_fast": 1.0}}, "must be above beta_slow"),
    ({"rope_scaling": YARN | {"factor": 1.0}}, "factor is 1.0"),
    ({"positions": "none", "rope_fraction": None, "rope_base": None, "rope_scaling": YARN},
     'rope_scaling has no effect with positions = "none"'),
    ({"score_scale": 0.0}, "score_scale is 0.0")])
def test_what_has_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    attention = {key: value for key, value in {**ROPE, **changes}.items() if value is not None}
    data = small_config("*-").model_dump(exclude_none=True) | {"attention": attention}
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, data, "test")


def test_a_length_past_what_scaling_allows_is_refused_with_the_figures() -> None:
    keys = [f"model.attention.rope_scaling.{item}" for item in ('method="yarn"', "factor=4.0", "trained_len=64")]
    assert load_recipe("tiny-transformer", [*keys, "train.seq_len=256"])
    with pytest.raises(ConfigError, match=r"train\.seq_len \(257\) is past what .* factor \(4\.0\) x trained_len "
                                          r"\(64\) = 256 tokens\. Raise factor to 4\.02"):
        load_recipe("tiny-transformer", [*keys, "train.seq_len=257"])
    # a factor is what is written: 1.15 x 100 is 115
    keys = [f"model.attention.rope_scaling.{item}" for item in ('method="yarn"', "factor=1.15", "trained_len=100")]
    assert load_recipe("tiny-transformer", [*keys, "train.seq_len=115"])
    with pytest.raises(ConfigError, match=r"Raise factor to 1\.16"):
        load_recipe("tiny-transformer", [*keys, "train.seq_len=116"])


def test_in_segments_scaling_must_reach_over_one_of_them() -> None:
    keys = [f"model.attention.rope_scaling.{item}" for item in ('method="yarn"', "factor=4.0", "trained_len=64")]
    keys += ["train.seq_len=2048", "train.cuda_graphs=false"]
    assert load_recipe("30m-hybrid-rope", [*keys, "train.segment_len=256"])
    with pytest.raises(ConfigError, match=r"train\.segment_len \(512\) is past what .* = 256 tokens"):
        load_recipe("30m-hybrid-rope", [*keys, "train.segment_len=512"])
