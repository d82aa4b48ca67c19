"""The norms' kernels against their formula in float64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hinny.ops import gated_rms_norm, rms_norm, use_backend
from hinny.ops.kernels.launches import trial
from hinny.ops.kernels.norm import candidates

EPS = 1e-2  # large enough to show
TOLERANCE = 2e-6
"""Of a relative error in float32; the longest sums have a few hundred parts."""


def given(*shape: int, gated: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float().double()

    return {"x": normal(*shape), "weight": normal(shape[-1])} | ({"z": normal(*shape)} if gated else {})


def formula(x: Tensor, weight: Tensor, z: Tensor | None, group_size: int) -> Tensor:
    x = x if z is None else x * z * torch.sigmoid(z)
    groups = x.unflatten(-1, (-1, group_size))
    return (groups / (groups.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * weight


def kernel(x: Tensor, weight: Tensor, z: Tensor | None, group_size: int) -> Tensor:
    with use_backend("triton"):
        return rms_norm(x, weight, EPS) if z is None else gated_rms_norm(x, z, weight, EPS, group_size)


def check(values: dict[str, Tensor], group_size: int) -> None:
    found = []
    for op, dtype in ((formula, torch.float64), (kernel, torch.float32)):
        inputs = {name: v.to(dtype).requires_grad_() for name, v in values.items()}
        y = op(inputs["x"], inputs["weight"], inputs.get("z"), group_size)
        mixture = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
        found.append({"y": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), mixture),
                                                  strict=True)))
    for name, expected in found[0].items():
        error = (found[1][name] - expected).norm() / expected.norm()
        assert error < TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize(("shape", "group_size"), [
    ((2, 3, 8), 4), ((5, 7, 48), 16), ((70, 12), 12), ((3, 4), 1), ((8,), 4), ((3, 200), 100), ((2, 600), 300)])
def test_the_gated_norm_and_its_gradients_equal_the_formula(shape: tuple[int, ...], group_size: int) -> None:
    check(given(*shape), group_size)


@pytest.mark.parametrize("shape", [(2, 3, 8), (66, 5), (2, 300)])
def test_the_plain_norm_and_its_gradients_equal_the_formula(shape: tuple[int, ...]) -> None:
    check(given(*shape, gated=False), shape[-1])


@pytest.mark.parametrize("number", [1, 5])
def test_candidates_for_tuning_give_the_same(number: int) -> None:
    uses = {name: found[number] for name, found in candidates().items()}
    with trial(uses) as seen:
        check(given(9, 40), 20)
    assert {name for name, _ in seen} == {"norm_forward", "norm_backward", "sum_parts"}


def test_slices_of_wider_rows_are_read_in_place() -> None:
    values = {name: v.float() for name, v in given(2, 5, 12).items()}
    wide = torch.full((2, 5, 40), torch.nan)
    wide[..., 3:15], wide[..., 20:32] = values["x"], values["z"]
    y = kernel(**values, group_size=6)
    assert torch.equal(kernel(wide[..., 3:15], values["weight"], wide[..., 20:32], 6), y)
    low = kernel(values["x"].half(), values["weight"], values["z"].half(), 6)
    assert low.dtype == torch.float16
    torch.testing.assert_close(low.float(), y, rtol=1e-2, atol=1e-2)


def test_no_rows_give_no_rows_and_a_zero_gradient() -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = kernel(x, weight, x, 4)
    assert y.shape == (0, 8)
    assert (torch.autograd.grad(y.sum(), weight)[0] == 0).all()
