"""The norms' kernels on a GPU: outputs and every gradient against their formula in float64.

The error is held to 1.5 times that of the torch form with the same inputs; both compute in float32 and round once.
"""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import gated_rms_norm, rms_norm, use_backend

pytestmark = pytest.mark.gpu
FLOOR = 1e-6
"""Errors below it are not compared: of float32 results, whose rounding is 6e-8, and a sigmoid to 3e-7."""

EPS = 1e-5


def inputs(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16, gated: bool = True,
           scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda")

    found = {"x": (normal(*shape) * scale).to(dtype), "weight": normal(shape[-1])}
    return found | ({"z": (normal(*shape) * scale).to(dtype)} if gated else {})


def formula(x: Tensor, weight: Tensor, z: Tensor | None, group_size: int) -> Tensor:
    x = x if z is None else x * z * torch.sigmoid(z)
    groups = x.unflatten(-1, (-1, group_size))
    return (groups / (groups.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * weight


def norm(x: Tensor, weight: Tensor, z: Tensor | None, group_size: int) -> Tensor:
    return rms_norm(x, weight, EPS) if z is None else gated_rms_norm(x, z, weight, EPS, group_size)


def results(values: dict[str, Tensor], group_size: int, backend: str) -> dict[str, Tensor]:
    """y and the gradients of a random mixture of it that is the same for every backend; float64 for "formula"."""
    dtype = values["x"].dtype
    leaves = {name: (v.double() if backend == "formula" else v.detach().clone()).requires_grad_()
              for name, v in values.items()}
    if backend == "formula":
        y = formula(leaves["x"], leaves["weight"], leaves.get("z"), group_size)
    else:
        with use_backend(backend):
            y = norm(leaves["x"], leaves["weight"], leaves.get("z"), group_size)
    draw = torch.Generator("cuda").manual_seed(5)
    mixture = torch.randn(y.shape, generator=draw, device="cuda").to(dtype).to(y.dtype)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), mixture), strict=True))


def check(values: dict[str, Tensor], group_size: int) -> None:
    expected, plain, found = (results(values, group_size, backend) for backend in ("formula", "torch", "triton"))
    for name, a in found.items():
        assert a.dtype == plain[name].dtype
        error, allowed = ((v[name].double() - expected[name]).norm().item() for v in (found, plain))
        size = expected[name].norm().item()
        assert error <= 1.5 * allowed + FLOOR * size, f"{name}: {error / size} against {allowed / size}"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.integers(1, 300), groups=st.integers(1, 5), size=st.sampled_from([24, 64, 200, 1000, 1024]),
       seed=st.integers(0, 1000))
def test_the_gated_norm_equals_the_formula(rows: int, groups: int, size: int, seed: int) -> None:
    check(inputs(seed, rows, groups * size), size)


@pytest.mark.parametrize(("size", "groups"), [(1, 7), (21, 3), (1536, 1), (4096, 1), (5000, 2)])
def test_groups_of_any_size(size: int, groups: int) -> None:
    check(inputs(size, 3, 11, groups * size), size)


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.float32), (300, torch.float16), (4096, torch.bfloat16),
                                          (8192, torch.bfloat16), (20000, torch.bfloat16)])
def test_the_plain_norm_equals_the_formula(d: int, dtype: torch.dtype) -> None:
    check(inputs(d, 5, 27, d, dtype=dtype, gated=False), d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(dtype: torch.dtype) -> None:
    check(inputs(2, 70, 2048, dtype=dtype), 1024)


def test_many_rows_and_two_runs_of_identical_bits() -> None:
    """A size that takes the launches of large calls, with a ragged end."""
    values = inputs(3, 4099, 2048)
    check(values, 1024)
    first, second = (results(values, 1024, "triton") for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


def test_slices_of_wider_rows_are_read_in_place() -> None:
    values = inputs(4, 2, 50, 2048)
    wide = torch.full((2, 50, 4608), torch.nan, dtype=torch.bfloat16, device="cuda")
    x, z = wide[..., 256:2304], wide[..., 2304:4352]
    x.copy_(values["x"])
    z.copy_(values["z"])
    y = norm(values["x"], values["weight"], values["z"], 1024)
    before = torch.cuda.memory_allocated()
    again = norm(x, values["weight"], z, 1024)
    assert torch.cuda.memory_allocated() - before <= again.nbytes + 4096
    assert torch.equal(again, y)


def test_large_and_tiny_inputs_stay_finite() -> None:
    for scale in (1e4, 1e-4):
        check(inputs(5, 40, 128, scale=scale), 64)


def test_checkpointing_gives_the_same_gradients() -> None:
    leaves = {name: v.requires_grad_() for name, v in inputs(6, 30, 128).items()}
    y = norm(leaves["x"], leaves["weight"], leaves["z"], 64)
    again = torch.utils.checkpoint.checkpoint(norm, leaves["x"], leaves["weight"], leaves["z"], 64, use_reentrant=False)
    mixture = torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, list(leaves.values()), mixture),
                torch.autograd.grad(again, list(leaves.values()), mixture), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_more_elements_than_32_bits_count() -> None:
    rows, d, tail = 2 ** 19 + 3, 4104, 9
    x = torch.randn(rows, d, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(d, device="cuda")
    end = x[-tail:].clone().requires_grad_()
    y = gated_rms_norm(x.requires_grad_(), x.detach(), weight, EPS, 1368)
    y_end = gated_rms_norm(end, end.detach(), weight, EPS, 1368)
    assert torch.equal(y[-tail:], y_end)
    mixture = torch.randn_like(y_end)
    whole = torch.zeros_like(y)
    whole[-tail:] = mixture
    dx, = torch.autograd.grad(y, x, whole)
    dx_end, = torch.autograd.grad(y_end, end, mixture)
    assert torch.equal(dx[-tail:], dx_end)
    assert not dx[:-tail].any()
