"""Products of few rows with narrow weights, without a kernel: the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hinny.ops import thin_linear

NARROW = [torch.int8, torch.float8_e4m3fn]


def narrow(dtype: torch.dtype, n: int = 24, k: int = 40) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n)
    weight = (torch.randn(n, k, generator=random) * 40).clamp(-128, 127).to(dtype)
    return weight, torch.rand(n, generator=random) / 100


@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_narrow_weight_stands_for_its_numbers_times_their_rows_scale(dtype, activation):
    weight, scale = narrow(dtype)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    wanted = thin_linear(x.double(), weight.double() * scale.double()[:, None], activation=activation)
    found = thin_linear(x, weight, scale=scale, activation=activation)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(thin_linear(x, weight, scale=scale, activation=activation, wide=True), found)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_that_a_short_type_could_not_hold_without_their_scale_are_finite(dtype, x_dtype):
    weight, scale = torch.full((16, 4096), 100).to(dtype), torch.full((16,), 2.0 ** -18)
    x = torch.ones(2, 4096, dtype=x_dtype)
    wanted = float(weight[0].double().sum() * 2.0 ** -18)
    for wide in (False, True):
        y = thin_linear(x, weight, scale=scale, wide=wide)
        assert y.dtype == (torch.float32 if wide else x_dtype)
        assert (y.double() / wanted - 1).abs().max() < 2.0 ** -7


def test_a_scale_belongs_to_a_narrow_weight_alone():
    (weight, scale), x = narrow(torch.int8), torch.zeros(1, 40)
    with pytest.raises(ValueError, match="scale in float32"):
        thin_linear(x, weight)
    with pytest.raises(ValueError, match="scale in float32"):
        thin_linear(x, weight.float(), scale=scale)
    with pytest.raises(ValueError, match="scale in float32"):
        thin_linear(x, weight, scale=scale.double())
    with pytest.raises(ValueError, match=r"scale has shape \(23,\)"):
        thin_linear(x, weight, scale=scale[1:])
