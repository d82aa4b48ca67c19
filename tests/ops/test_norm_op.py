"""Norms against their formulas, in float64 unless said."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_same, normal
from torch import Tensor

from hinny.ops import gated_rms_norm, layer_norm_1p, rms_norm

EPS = 1e-2  # large enough to show


def test_rms_norm_equals_its_formula_with_every_gradient() -> None:
    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight

    assert_same(lambda **v: rms_norm(**v, eps=EPS), formula,
                {"x": normal(2, 3, 8, seed=0), "weight": normal(8, seed=1)})


def test_layer_norm_1p_adds_one_to_the_stored_gain() -> None:
    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (weight + 1) + bias

    assert_same(lambda **v: layer_norm_1p(**v, eps=EPS), formula,
                {"x": normal(2, 3, 8, seed=0), "weight": normal(8, seed=1), "bias": normal(8, seed=2)})


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_the_gate_comes_before_the_norm_and_the_norm_stays_in_its_group(group_size: int) -> None:
    def formula(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        gated = x * z * torch.sigmoid(z)
        parts = [part / (part.pow(2).mean(-1, keepdim=True) + EPS).sqrt() for part in gated.split(group_size, -1)]
        return torch.cat(parts, -1) * weight

    assert_same(lambda **v: gated_rms_norm(**v, eps=EPS, group_size=group_size), formula,
                {"x": normal(2, 3, 8, seed=0), "z": normal(2, 3, 8, seed=1), "weight": normal(8, seed=2)})


def test_norms_compute_in_float32_and_return_the_inputs_dtype() -> None:
    x, z, w, bias = (normal(4, 64, seed=0).bfloat16(), normal(4, 64, seed=1).bfloat16(),
                     normal(64, seed=2).float(), normal(64, seed=3).float())
    exact = [rms_norm(x.float(), w, EPS), layer_norm_1p(x.float(), w, bias, EPS),
             gated_rms_norm(x.float(), z.float(), w, EPS, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [rms_norm(x, w, EPS), layer_norm_1p(x, w, bias, EPS), gated_rms_norm(x, z, w, EPS, 16)]
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.bfloat16())


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\); it must be \(8,\)"):
        rms_norm(x, torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="bias has shape"):
        layer_norm_1p(x, torch.zeros(8), torch.zeros(1), EPS)
    with pytest.raises(ValueError, match="group_size is 3; it must divide the 8 channels"):
        gated_rms_norm(x, x, torch.zeros(8), EPS, 3)
    with pytest.raises(ValueError, match="z has shape"):
        gated_rms_norm(x, torch.zeros(2, 4), torch.zeros(8), EPS, 4)


def test_a_row_without_a_batch_has_gradients_too() -> None:
    assert_same(lambda **v: gated_rms_norm(**v, eps=EPS, group_size=4)[None],
                lambda **v: gated_rms_norm(**{k: t if k == "weight" else t[None] for k, t in v.items()}, eps=EPS,
                                           group_size=4),
                {"x": normal(8, seed=0), "z": normal(8, seed=1), "weight": normal(8, seed=2)})
