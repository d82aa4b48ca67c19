"""The Transformer's small kernels and its linear layers on a GPU: outputs and every gradient against float64.

A kernel's error is held to 1.5 times that of the torch form with the same inputs; both compute in float32 and round
once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import Stretch, layer_norm_1p, linear, relu2, rope, split_linear, swiglu, use_backend

pytestmark = pytest.mark.gpu
FLOOR = 1e-6
"""Errors below it are not compared: of float32 results, whose rounding is 6e-8, and a sigmoid to 3e-7."""
EPS = 1e-5
TYPES = [torch.bfloat16, torch.float16, torch.float32]

Op = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=draw, device="cuda").to(dtype)


def results(op: Op, values: dict[str, Tensor], backend: str, order: tuple[int, ...]) -> dict[str, Tensor]:
    """y and the gradients of a random mixture of it, the same for every backend; float64 for "formula".

    The gradient that comes in lies in memory in the `order` of these axes of y.
    """
    dtype = next(iter(values.values())).dtype
    leaves = {name: (v.double() if backend == "formula" else v.detach().clone()).requires_grad_()
              for name, v in values.items()}
    if backend == "formula":
        y = op(**leaves)
    else:
        with use_backend(backend):
            y = op(**leaves)
    order = order or tuple(range(y.dim()))
    mixture = normal(*(y.shape[i] for i in order), seed=5, dtype=dtype).to(y.dtype)
    mixture = mixture.permute(sorted(range(len(order)), key=lambda i: order[i]))
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), mixture), strict=True))


def check(op: Op, formula: Op, values: dict[str, Tensor], order: tuple[int, ...] = ()) -> None:
    expected = results(formula, values, "formula", order)
    plain, found = (results(op, values, backend, order) for backend in ("torch", "triton"))
    again = results(op, values, "triton", order)
    for name, a in found.items():
        assert a.dtype == plain[name].dtype
        assert torch.equal(a, again[name]), f"{name} has other bits when it is computed again"
        error, allowed = ((v[name].double() - expected[name]).norm().item() for v in (found, plain))
        size = expected[name].norm().item()
        assert error <= 1.5 * allowed + FLOOR * size, f"{name}: {error / size} against {allowed / size}"


def norm_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + 1) + bias


def check_norm(*shape: int, dtype: torch.dtype, seed: int = 0) -> None:
    d = shape[-1]
    values = {"x": normal(*shape, seed=seed, dtype=dtype), "weight": normal(d, seed=1), "bias": normal(d, seed=2)}
    check(partial(layer_norm_1p, eps=EPS), norm_formula, values)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.integers(1, 3000), d=st.sampled_from([24, 64, 200, 1000, 1024, 1536]), seed=st.integers(0, 1000),
       dtype=st.sampled_from(TYPES))
def test_the_layer_norm_equals_the_formula(rows: int, d: int, seed: int, dtype: torch.dtype) -> None:
    check_norm(rows, d, dtype=dtype, seed=seed)


@pytest.mark.parametrize("d", [1, 2048, 4096, 5000, 8192, 12288, 20000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_norms_of_any_width(d: int, dtype: torch.dtype) -> None:
    if d == 1:  # all is the mean, and the gradients are noise about zero
        x = normal(5, 1, dtype=dtype)
        with use_backend("triton"):
            assert torch.equal(layer_norm_1p(x, normal(1), torch.ones(1, device="cuda"), EPS), torch.ones_like(x))
        return
    check_norm(3, 27, d, dtype=dtype)


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    """The mean's own rounding is 1e-5 of a deviation here; a variance by mean squares would be off by 1e-3."""
    values = {"x": normal(50, 1024) + 100, "weight": normal(1024, seed=1), "bias": normal(1024, seed=2)}
    expected = results(norm_formula, values, "formula", ())
    found = results(partial(layer_norm_1p, eps=EPS), values, "triton", ())
    assert all((found[name] - exact).norm() < 1e-4 * exact.norm() for name, exact in expected.items())


def rope_formula(x: Tensor, position: Tensor, rope_dim: int, base: float, stretch: Stretch | None = None) -> Tensor:
    """By complex numbers."""
    half = rope_dim // 2
    frequencies = base ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    amplitude = 1.0
    if stretch is not None:
        kept, amplitude = stretch.kept(base, rope_dim).to(x.device), stretch.amplitude
        frequencies = kept * frequencies + (1 - kept) * frequencies / stretch.factor
    angles = (position.double()[..., None] * frequencies)[..., None, :]
    lengths = torch.full_like(angles, amplitude)
    turned = torch.complex(x[..., :half], x[..., half:rope_dim]) * torch.polar(lengths, angles)
    return torch.cat([turned.real, turned.imag, x[..., rope_dim:]], -1)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(b=st.integers(1, 3), t=st.integers(1, 200), heads=st.sampled_from([1, 3, 16]), rows=st.booleans(),
       head=st.sampled_from([(64, 32), (64, 64), (128, 64), (128, 128), (96, 24), (256, 256), (20, 6), (512, 128)]),
       dtype=st.sampled_from(TYPES), order=st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)]))
def test_rope_equals_the_formula(b: int, t: int, heads: int, rows: bool, head: tuple[int, int], dtype: torch.dtype,
                                 order: tuple[int, ...]) -> None:
    p, rope_dim = head
    position = torch.arange(t, device="cuda") + 5
    if rows:
        position = position % torch.arange(7, 7 + b, device="cuda")[:, None]
    how = {"position": position, "base": 10000.0, "rope_dim": rope_dim}
    check(partial(rope, **how), partial(rope_formula, **how), {"x": normal(b, t, heads, p, dtype=dtype)}, order)


@pytest.mark.parametrize("t", [1, 200])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stretch", [Stretch(4.0, 64), Stretch(4.0, 64, 32.0, 1.0)])
def test_stretched_rope_equals_the_formula(stretch: Stretch, dtype: torch.dtype, t: int) -> None:
    how = {"position": torch.arange(t, device="cuda") + 40, "base": 10000.0, "rope_dim": 32, "stretch": stretch}
    x = normal(2, t, 4, 64, dtype=dtype)
    check(partial(rope, **how), partial(rope_formula, **how), {"x": x}, (0, 1, 2, 3))
    with torch.no_grad():  # few tokens that nothing records take a kernel of their own
        torch.testing.assert_close(rope(x, **how).double(), rope_formula(x.double(), **how), rtol=1e-2, atol=2e-2)


def test_rope_reads_heads_where_they_lie() -> None:
    x, position = normal(2, 300, 8, 64, dtype=torch.bfloat16), torch.arange(300, device="cuda")
    turn = partial(rope, position=position, base=10000.0, rope_dim=32)
    across = x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 300, 24, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
    wide[:, :, 8:16] = x
    y = turn(x)
    for given_x in (across, wide[:, :, 8:16]):
        before = torch.cuda.memory_allocated()
        again = turn(given_x)
        assert torch.cuda.memory_allocated() - before <= again.nbytes + 4096
        assert torch.equal(again, y)
        assert again.is_contiguous()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=st.sampled_from([(1,), (7, 13), (3, 1000), (64, 4096), (2, 77, 512)]), dtype=st.sampled_from(TYPES),
       seed=st.integers(0, 1000))
def test_activations_equal_their_formulas(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = normal(*shape, seed=seed, dtype=dtype)
    check(relu2, lambda x: F.relu(x) ** 2, {"x": x.abs() if shape == (1,) else x})
    check(swiglu, lambda gate, up: F.silu(gate) * up, {"gate": x, "up": normal(*shape, seed=seed + 1, dtype=dtype)})


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_types_stay_under_autocast(backend: str) -> None:
    x, weight = normal(1, 4, 2, 64, dtype=torch.bfloat16).requires_grad_(), torch.zeros(64, device="cuda")
    with use_backend(backend), torch.autocast("cuda", torch.bfloat16):
        found = [relu2(x), swiglu(x, x), layer_norm_1p(x, weight, weight, EPS),
                 rope(x, torch.arange(4, device="cuda"), base=10.0, rope_dim=32)]
    assert [y.dtype for y in found] == [torch.bfloat16] * 4
    assert all(torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16 for y in found)


def test_more_elements_than_32_bits_count() -> None:
    x = torch.zeros(2 ** 15 + 1, 1024, 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = normal(1024, 64, dtype=torch.bfloat16)
    end = x[-1:].clone()
    weight, bias = normal(64), torch.zeros(64, device="cuda")
    assert torch.equal(relu2(x)[-1:], relu2(end))
    assert torch.equal(layer_norm_1p(x, weight, bias, EPS)[-1:], layer_norm_1p(end, weight, bias, EPS))
    turn = partial(rope, base=10000.0, rope_dim=32)
    position = torch.full((2 ** 15 + 1,), 3, device="cuda")
    assert torch.equal(turn(x[None], position)[0, -1:], turn(end[None], position[:1])[0])


def test_the_compiler_traces_them() -> None:
    x, up = (normal(2, 6, 4, 64, seed=i, dtype=torch.bfloat16).requires_grad_() for i in range(2))
    weight, bias = (normal(64, seed=i).requires_grad_() for i in range(2))
    position = torch.arange(6, device="cuda")

    def block(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = layer_norm_1p(x, weight, bias, EPS)
        return relu2(swiglu(rope(y, position, base=10000.0, rope_dim=32), up))

    leaves = [x, up, weight, bias]
    with use_backend("triton"):
        expected = block(*leaves)
        found = torch.compile(block, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(found, expected)
    mixture = normal(*found.shape, seed=3, dtype=torch.bfloat16)
    for a, e in zip(*(torch.autograd.grad(y, leaves, mixture) for y in (found, expected)), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float16])
def test_gradients_of_linear_layers_are_rounded_to_their_own_type_alone(
    x_dtype: torch.dtype, products: torch.dtype,
) -> None:
    values = [normal(2, 77, 64, dtype=x_dtype), normal(48, 64, seed=1), normal(16, 64, seed=2)]
    grads = [normal(2, 77, n, seed=n).to(products) for n in (48, 16)]

    def gradients(run: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in leaves]
        enabled = leaves[0].dtype != torch.float64
        with torch.autocast("cuda", products, enabled=enabled, cache_enabled=False):
            outputs = run(*leaves)
        assert not enabled or {y.dtype for y in outputs} == {products}
        return list(torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]))

    def separate(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight) for weight in weights)

    exact = gradients(separate, [v.to(products).double() for v in values])
    plain = gradients(separate, values)
    for run in (lambda x, a, b: split_linear(x, (a, b)), lambda x, a, b: (linear(x, a), linear(x, b))):
        found = gradients(run, values)
        assert [v.dtype for v in found] == [v.dtype for v in values]
        errors, allowed = ([((v.double() - e).norm() / e.norm()).item() for v, e in zip(those, exact, strict=True)]
                           for those in (found, plain))
        assert max(errors[1:]) < 1e-5 < 1e-4 < min(allowed[1:])
        assert errors[0] <= 1.1 * allowed[0] + FLOOR
    if x_dtype == torch.float32:
        error = (gradients(lambda x, a, b: split_linear(x, (a, b)), values)[0].double() - exact[0]).norm()
        assert error < 1e-5 * exact[0].norm()
