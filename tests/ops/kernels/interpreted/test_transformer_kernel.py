"""The Transformer's small kernels against their formulas in float64: layer norm, rotary positions, activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import layer_norm_1p, relu2, rope, swiglu, use_backend
from hinny.ops.kernels import activations, layer_norm
from hinny.ops.kernels import rope as rope_kernel
from hinny.ops.kernels.launches import trial

EPS = 1e-2  # large enough to show
TOLERANCE = 2e-6
"""Of a relative error in float32; the longest sums have a few hundred parts."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return draw.float().double()


def results(op: Callable[..., Tensor], values: dict[str, Tensor], dtype: torch.dtype, order: list[int]) -> dict:
    """y and the gradients of a random mixture of it, which lies in memory in the order of these axes."""
    leaves = {name: v.to(dtype).requires_grad_() for name, v in values.items()}
    y = op(**leaves)
    mixture = normal(*(y.shape[i] for i in order), seed=7).to(dtype)
    mixture = mixture.permute(sorted(range(len(order)), key=lambda i: order[i]))
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), mixture), strict=True))


def check(op: Callable[..., Tensor], formula: Callable[..., Tensor], values: dict[str, Tensor],
          order: list[int] | None = None) -> None:
    order = order or list(range(next(iter(values.values())).dim()))
    expected = results(formula, values, torch.float64, order)
    with use_backend("triton"):
        found = results(op, values, torch.float32, order)
    for name, exact in expected.items():
        error = (found[name] - exact).norm() / exact.norm()
        assert error < TOLERANCE, f"{name}: {error}"


def norm_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + 1) + bias


def norm_inputs(*shape: int) -> dict[str, Tensor]:
    return {"x": normal(*shape), "weight": normal(shape[-1], seed=1), "bias": normal(shape[-1], seed=2)}


@pytest.mark.parametrize("shape", [(2, 3, 8), (70, 12), (66, 5), (2, 300), (8,), (3, 600)])
def test_the_layer_norm_and_its_gradients_equal_the_formula(shape: tuple[int, ...]) -> None:
    check(partial(layer_norm_1p, eps=EPS), norm_formula, norm_inputs(*shape))


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    x = (normal(5, 40) / 64 + 1024).float()
    with use_backend("triton"):
        y = layer_norm_1p(x, torch.zeros(40), torch.zeros(40), 1e-12)
    torch.testing.assert_close(y.double().square().mean(-1), torch.ones(5).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(y.mean(-1), torch.zeros(5), rtol=0, atol=1e-2)


def test_the_layer_norm_reads_slices_in_place_and_takes_no_rows() -> None:
    values = {name: v.float() for name, v in norm_inputs(2, 5, 12).items()}
    wide = torch.full((2, 5, 40), torch.nan)
    wide[..., 3:15] = values["x"]
    with use_backend("triton"):
        y = layer_norm_1p(**values, eps=EPS)
        assert torch.equal(layer_norm_1p(wide[..., 3:15], values["weight"], values["bias"], EPS), y)
        weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
        empty = layer_norm_1p(torch.zeros(0, 8, requires_grad=True), weight, bias, EPS)
        assert empty.shape == (0, 8)
        assert all((grad == 0).all() for grad in torch.autograd.grad(empty.sum(), (weight, bias)))


def rope_formula(x: Tensor, position: Tensor, rope_dim: int) -> Tensor:
    """By complex numbers."""
    half = rope_dim // 2
    frequencies = 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = (position.double()[..., None] * frequencies)[..., None, :]  # ([b] t 1 half)
    turned = torch.complex(x[..., :half], x[..., half:rope_dim]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., rope_dim:]], -1)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("shape", "rope_dim"), [((2, 5, 3, 8), 8), ((2, 5, 3, 8), 2), ((3, 7, 1, 12), 6),
                                                 ((1, 1, 2, 10), 6), ((2, 9, 5, 64), 32)])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]])
def test_rope_and_its_gradient_equal_the_formula(
    shape: tuple[int, ...], rope_dim: int, rows: bool, order: list[int],
) -> None:
    b, t = shape[:2]
    position = torch.arange(b * t).view(b, t) % 11 if rows else torch.arange(t) + 3
    check(partial(rope, position=position, base=100.0, rope_dim=rope_dim),
          partial(rope_formula, position=position, rope_dim=rope_dim), {"x": normal(*shape)}, order)


def test_rope_reads_heads_of_any_strides() -> None:
    x, position = normal(2, 3, 5, 8).float(), torch.arange(5)
    wide = torch.full((2, 5, 40), torch.nan)
    wide[..., 8:32] = x.transpose(1, 2).flatten(2)
    with use_backend("triton"):
        y = rope(x.transpose(1, 2).contiguous(), position, base=10.0, rope_dim=4)
        assert torch.equal(rope(x.transpose(1, 2), position, base=10.0, rope_dim=4), y)
        assert torch.equal(rope(wide[..., 8:32].unflatten(-1, (3, 8)), position, base=10.0, rope_dim=4), y)
        assert torch.equal(y[..., 4:], x.transpose(1, 2)[..., 4:])
    assert y.is_contiguous()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 1700)])
def test_activations_and_their_gradients_equal_the_formulas(shape: tuple[int, ...]) -> None:
    check(relu2, lambda x: F.relu(x) ** 2, {"x": normal(*shape).abs() if shape == (1,) else normal(*shape)})
    check(swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up,
          {"gate": normal(*shape), "up": normal(*shape, seed=1)})


def test_activations_keep_types_and_take_tensors_that_are_not_dense() -> None:
    x, up = normal(6, 8).float(), normal(6, 8, seed=1).float()
    with use_backend("triton"):
        for op, given in ((relu2, (x,)), (swiglu, (x, up))):
            y = op(*given)
            assert torch.equal(op(*(v.t().contiguous().t() for v in given)), y)
            low = op(*(v.half() for v in given))
            assert low.dtype == torch.float16
            torch.testing.assert_close(low.float(), y, rtol=1e-2, atol=1e-2)
        assert relu2(torch.tensor([torch.nan, -torch.inf])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("number", [0, 4])
def test_candidates_for_tuning_give_the_same(number: int) -> None:
    uses = {name: found[number] for module in (activations, layer_norm, rope_kernel)
            for name, found in module.candidates().items()}
    with trial(uses) as seen:
        check(partial(layer_norm_1p, eps=EPS), norm_formula, norm_inputs(9, 40))
        test_rope_and_its_gradient_equal_the_formula((2, 9, 5, 16), 8, False, [0, 1, 2, 3])
        test_activations_and_their_gradients_equal_the_formulas((3, 5))
    assert {name for name, _ in seen} == set(uses) | {"sum_parts"}
