"""The kernels for few rows against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hinny.ops.kernels import thin
from hinny.ops.kernels.launches import trial

TOLERANCE = 3e-6
EPS = 1e-2


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("m", [1, 2, 16, 33, 64])
@pytest.mark.parametrize("use", thin.candidates()["rows_kernel"][1:4], ids=str)
def test_a_product_is_whole_whatever_the_rows_and_the_shares_of_its_inputs(m: int, use: dict[str, int]) -> None:
    x, w = normal(m, 1024), normal(208, 1024)
    with trial({"rows_kernel": use}):
        for kind, act in ((None, lambda v: v), ("gelu", torch.nn.functional.gelu), ("relu2", lambda v: v.relu() ** 2)):
            y = thin.thin_linear(x, w, kind, torch.float32)
            assert far(y, act(x.double() @ w.double().T)) < TOLERANCE


def test_the_counters_of_shared_products_are_back_at_zero_behind_each() -> None:
    with trial({"rows_kernel": thin.candidates()["rows_kernel"][2]}):
        for _ in range(2):
            thin.thin_linear(normal(3, 512), normal(80, 512), None, torch.float32)
    assert not thin._counters(torch.device("cpu")).any()


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_narrow_numbers_are_widened_and_their_sums_scaled(m: int, split: int, dtype: torch.dtype) -> None:
    x, scale = normal(m, 1024), normal(208).abs() / 100
    w = (normal(208, 1024) * 40).clamp(-128, 127).to(dtype)
    wanted = x.double() @ (w.double() * scale.double()[:, None]).T
    use = {"TALL": 64, "WIDE": 128, "SPLIT": split, "STAGES": 3, "AHEAD": 0, "num_warps": 4, "num_stages": 1}
    with trial({"rows_kernel": use}):
        for kind, act in ((None, lambda v: v), ("relu2", lambda v: v.relu() ** 2)):
            assert far(thin.thin_linear(x, w, kind, torch.float32, scale), act(wanted)) < TOLERANCE


@pytest.mark.parametrize("use", thin.candidates()["row_kernel"][1:], ids=str)
def test_one_row_is_multiplied_by_rows_that_fill_no_tile(use: dict[str, int]) -> None:
    x, w = normal(1, 2560), normal(19, 2560)
    with trial({"row_kernel": use}):
        assert far(thin.thin_linear(x, w, None, torch.float32), x.double() @ w.double().T) < TOLERANCE


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("d", [40, 256])
def test_the_residual_goes_on_beside_its_norm(d: int, biased: bool) -> None:
    x, delta, weight, bias = normal(5, d), normal(5, d) * 2, normal(d), normal(d) if biased else None
    total, y = thin.add_norm(x, delta, weight, bias, EPS)
    wanted = x.double() + delta.double()
    assert far(total, wanted) < TOLERANCE
    if bias is not None:
        wanted = wanted - wanted.mean(-1, keepdim=True)
        scaled = wanted / (wanted.square().mean(-1, keepdim=True) + EPS).sqrt()
        assert far(y, scaled * (weight.double() + 1) + bias.double()) < TOLERANCE
    else:
        assert far(y, wanted / (wanted.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()) < TOLERANCE


def test_a_first_norm_has_nothing_to_add() -> None:
    x, weight = normal(2, 3, 48), normal(48)
    total, y = thin.add_norm(x, None, weight, None, EPS)
    assert total is x
    assert far(y, x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()) < TOLERANCE


def test_a_gate_may_be_a_slice_of_a_wider_product() -> None:
    x, weight = normal(4, 96), normal(96)
    z = normal(4, 200)[:, 50:146]
    y = thin.gated_norm(x, z, weight, EPS, 24)
    gated = (x.double() * z.double() * torch.sigmoid(z.double())).unflatten(-1, (-1, 24))
    wanted = (gated / (gated.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * weight.double()
    assert far(y, wanted) < TOLERANCE


@pytest.mark.parametrize("rope_dim", [6, 16])
def test_angles_made_in_the_kernel_are_the_formulas(rope_dim: int) -> None:
    x = normal(3, 1, 7, 40)[..., 8:24]
    position = torch.tensor([[0], [5], [1000]])
    rates = 100.0 ** -(torch.arange(0, rope_dim, 2) / rope_dim)
    y = thin.rope(x, position, rates)
    angles = (position.double()[..., None] * rates.double())[:, :, None]
    half = rope_dim // 2
    first, second, rest = x.double().split([half, half, 16 - rope_dim], -1)
    wanted = torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(),
                        rest], -1)
    assert far(y, wanted) < 1e-5  # an angle of 1000 in float32 is known to 6e-5
