"""Initial values and layer arithmetic, as research on Megatron's stack has them (megatron notes, section 5)."""

from __future__ import annotations

import math

import pytest
import torch
from small import small_config
from torch.nn import functional as F

from hinny.layers import LAYERS, MLP
from hinny.layers.attention import positions
from hinny.model import Model


def _wide(pattern: str, **changes: object) -> Model:
    sections = {"M": {"mamba2": dict(d_state=32, head_dim=8, n_groups=2, expand=2, d_conv=4, chunk_len=16)},
                "1": {"mamba1": dict(d_state=16, expand=2, d_conv=4, dt_rank=16, chunk_len=16)}}
    for symbol, section in sections.items():
        if symbol in pattern:
            changes |= section
    model = Model(small_config(pattern, d_model=256, init_std=0.02, **changes))
    model.init_weights(0)
    return model


def _uniform(weight: torch.Tensor, bound: float) -> bool:
    return bool(weight.abs().max() <= bound and weight.std() > 0.9 * bound / math.sqrt(3))


def test_a_mamba2_layer_starts_as_megatrons() -> None:
    model = _wide("MMMM")
    layer = model.blocks[0].layer.state_dict()
    for part in ("z", "x", "B", "C", "dt"):
        assert _uniform(layer[f"in_proj.{part}.weight"], 1 / math.sqrt(256)), part
    for part in ("x", "B", "C"):
        assert _uniform(layer[f"conv.{part}.weight"], 0.5)
        assert _uniform(layer[f"conv.{part}.bias"], 0.5)
    assert abs(layer["out_proj.weight"].std() / (0.02 / math.sqrt(4)) - 1) < 0.02
    dt = F.softplus(layer["dt_bias"])
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - (math.log(1e-3) + math.log(0.1)) / 2) < 0.5
    A = layer["A_log"].exp()
    assert 1 <= A.min() < 2.5
    assert 14.5 < A.max() <= 16
    assert torch.equal(layer["D"], torch.ones(64))
    assert torch.equal(layer["norm.weight"], torch.ones(512))


def test_a_mamba_layer_starts_as_the_mamba_papers() -> None:
    layer = _wide("1111").blocks[0].layer.state_dict()
    torch.testing.assert_close(layer["A_log"].exp(), torch.arange(1.0, 17).expand(512, 16))
    assert _uniform(layer["dt_proj.weight"], 1 / math.sqrt(16))
    assert _uniform(layer["x_proj.B.weight"], 1 / math.sqrt(512))
    assert abs(layer["out_proj.weight"].std() / (0.02 / math.sqrt(4)) - 1) < 0.02


@pytest.mark.parametrize(("given", "expected"), [(None, 0.02 / math.sqrt(8)), (0.0025, 0.0025)])
def test_output_projections_start_smaller(given: float | None, expected: float) -> None:
    model = _wide("*-*-", output_init_std=given, mlp=dict(d_ff=512, activation="relu2"))
    attention, mlp = model.blocks[0].layer.state_dict(), model.blocks[1].layer.state_dict()
    for weight in (attention["o.weight"], mlp["down.weight"]):
        assert abs(weight.std() / expected - 1) < 0.05
    for weight in (attention["q.weight"], attention["k.weight"], mlp["up.weight"], model.head.weight):
        assert abs(weight.std() / 0.02 - 1) < 0.05


def test_layernorm_1p_starts_at_gain_one() -> None:
    model = _wide("*-", norm="layernorm1p")
    assert torch.equal(model.norm.weight, torch.zeros(256))
    x = torch.randn(2, 256)
    torch.testing.assert_close(model.norm(x), F.layer_norm(x, (256,)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
def test_the_mlp_has_three_forms(activation: str) -> None:
    mlp = MLP(small_config("-", mlp=dict(d_ff=24, activation=activation))).double()
    mlp.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    up, down = x @ mlp.up.weight.T, mlp.down.weight.T
    if activation == "gelu":
        expected = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    elif activation == "relu2":
        expected = torch.where(up > 0, up * up, 0)
    else:
        gate = x @ mlp.gate.weight.T
        expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(mlp(x), expected @ down, rtol=0, atol=1e-12)


def test_positions_count_from_the_start_of_each_document() -> None:
    segments = torch.tensor([[5, 5, 5, 2, 2, 9], [1, 2, 2, 2, 1, 1]])
    found = positions(torch.zeros(2, 6, 1), 0, segments)
    assert found.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    assert positions(torch.zeros(2, 3, 1), 4, None).tolist() == [4, 5, 6]


def test_every_symbol_of_a_pattern_has_a_layer() -> None:
    from hinny.config import LAYER_SECTIONS
    from hinny.pattern import SYMBOLS

    assert set(LAYERS) == set(SYMBOLS) == set(LAYER_SECTIONS)
