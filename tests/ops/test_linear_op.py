"""Products with weights: those of F.linear, with gradients that autocast rounds less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from op_checks import assert_same, normal
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hinny.ops import linear, split_linear

X, A, B = normal(2, 7, 24, seed=0), normal(16, 24, seed=1), normal(5, 24, seed=2)
GRADS = normal(2, 7, 16, seed=3), normal(2, 7, 5, seed=4)
FULL, HALF = torch.float32, torch.bfloat16

Run = Callable[..., tuple[Tensor, ...]]


def separate(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, a), F.linear(x, b)


def together(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return split_linear(x, (a, b))


def one_by_one(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return linear(x, a), linear(x, b)


def leaves(*dtypes: torch.dtype) -> list[Tensor]:
    return [v.to(dtype, copy=True).requires_grad_() for v, dtype in zip((X, A, B), dtypes or (FULL,) * 3, strict=True)]


def in_bf16(run: Run, given: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs under autocast, and the gradients of `given` for fixed ones of the outputs."""
    with torch.autocast("cpu", HALF, cache_enabled=False):
        outputs = run(*given)
    return outputs, torch.autograd.grad(outputs, given, [g.to(y.dtype) for g, y in zip(GRADS, outputs, strict=True)])


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (0, 24)])
def test_several_products_of_one_input_equal_separate_ones_with_every_gradient(shape: tuple[int, ...]) -> None:
    assert_same(together, separate, {"x": normal(*shape, seed=0), "a": A, "b": B}, tolerance=1e-12)


def test_gradients_are_those_of_the_outputs_by_differences() -> None:
    given = [v.clone().requires_grad_() for v in (X[:1, :2, :3], A[:2, :3], B[:3, :3])]
    assert torch.autograd.gradcheck(together, given)


@pytest.mark.parametrize("dtype", [torch.float64, FULL])
def test_without_autocast_a_product_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    given = leaves(*(dtype,) * 3)
    grads = [g.to(dtype) for g in GRADS]
    expected = separate(*given)
    for run in (one_by_one, together):
        outputs = run(*given)
        assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
    found = torch.autograd.grad(one_by_one(*given), given, grads)
    assert all(torch.equal(a, e) for a, e in zip(found, torch.autograd.grad(expected, given, grads), strict=True))


def test_operands_of_two_types_are_refused_without_autocast() -> None:
    for op in (linear, lambda x, weight: split_linear(x, (weight,))):
        with pytest.raises(RuntimeError, match="same dtype"):
            op(X.bfloat16(), A.float().requires_grad_())


@pytest.mark.parametrize("run", [one_by_one, together])
@pytest.mark.parametrize("x_dtype", [FULL, HALF])
def test_autocast_gives_the_products_of_torch_and_a_closer_weight_gradient(run: Run, x_dtype: torch.dtype) -> None:
    given = leaves(x_dtype, FULL, FULL)
    outputs, grads = in_bf16(run, given)
    plain, plain_grads = in_bf16(separate, given)
    rounded = [v.detach().bfloat16().double().requires_grad_() for v in given]
    exact = torch.autograd.grad(separate(*rounded), rounded, [g.bfloat16().double() for g in GRADS])
    assert all(y.dtype == HALF and torch.equal(y, e) for y, e in zip(outputs, plain, strict=True))
    assert [g.dtype for g in grads] == [x_dtype, FULL, FULL]
    for name, a, theirs, e in zip("xab", grads, plain_grads, exact, strict=True):
        if name == "x" and (x_dtype == HALF or run is one_by_one):  # two gradients, rounded and added
            assert distance(a, e) <= 1.1 * distance(theirs, e)
        else:
            assert distance(a, e) < 1e-6, name
            assert distance(theirs, e) > 1e-3, name


def test_weights_in_bf16_get_gradients_in_bf16() -> None:
    given = leaves(HALF, HALF, FULL)
    _, grads = in_bf16(together, given)
    _, plain = in_bf16(separate, given)
    assert [g.dtype for g in grads] == [HALF, HALF, FULL]
    assert torch.equal(grads[1], plain[1])


@pytest.mark.parametrize("fixed", [(0,), (1,), (1, 2), (0, 2)])
def test_inputs_without_gradients_get_none_and_are_not_kept(fixed: tuple[int, ...]) -> None:
    given = leaves()
    for i in fixed:
        given[i].requires_grad_(False)
    wanted = [v for v in given if v.requires_grad]
    found, plain = [], []
    for run, into in ((together, found), (separate, plain)):
        with torch.autocast("cpu", HALF):
            outputs = [y for y in run(*given) if y.requires_grad]
        into += torch.autograd.grad([y.float().square().sum() for y in outputs], wanted)
    for a, e in zip(found, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2 * e.abs().max().item())
    with torch.autocast("cpu", HALF):
        assert not any(y.requires_grad for y in together(*(v.detach() for v in given)))


def test_an_output_that_is_not_used_has_no_part_in_the_gradients() -> None:
    given = [v.requires_grad_() for v in (X.clone(), A.clone(), B.clone())]
    dx, da, db = torch.autograd.grad(together(*given)[1].square().sum(), given, allow_unused=True)
    expected = torch.autograd.grad(F.linear(given[0], given[2]).square().sum(), (given[0], given[2]))
    assert da is None
    torch.testing.assert_close((dx, db), expected, rtol=1e-12, atol=1e-12)


def test_the_input_is_kept_once_and_in_the_type_of_the_products() -> None:
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v), torch.autocast("cpu", HALF):
        together(*leaves())
    assert sorted(tuple(v.shape) for v in kept) == [(2, 7, 24), (5, 24), (16, 24)]
    assert {v.dtype for v in kept} == {HALF}


def test_float64_is_left_alone_by_autocast() -> None:
    with torch.autocast("cpu", HALF):
        outputs = (*together(X, A, B), *one_by_one(X, A, B.clone().requires_grad_()))
    assert all(torch.equal(y, e) for y, e in zip(outputs, separate(X, A, B) * 2, strict=True))


def test_a_backward_inside_autocast_has_the_types_of_its_forward() -> None:
    given = leaves()
    outputs = together(*given)
    with torch.autocast("cpu", HALF):
        found = torch.autograd.grad(outputs, given, [g.float() for g in GRADS])
    expected = torch.autograd.grad(separate(*given), given, [g.float() for g in GRADS])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_recomputing_gives_the_same_bits() -> None:
    given = leaves()
    _, expected = in_bf16(together, given)
    _, found = in_bf16(lambda *v: torch.utils.checkpoint.checkpoint(together, *v, use_reentrant=False), given)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_the_compiler_traces_torchs_products() -> None:
    given = leaves()
    compiled = torch.compile(lambda *v: (*together(*v), *one_by_one(*v)), backend="eager", fullgraph=True)
    with torch.autocast("cpu", HALF):
        outputs = compiled(*given)
        expected = separate(*given) * 2
    assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))


def test_shapes_are_known_without_values() -> None:
    with torch.device("meta"):
        x, a, b = torch.empty(2, 7, 24), torch.empty(16, 24, requires_grad=True), torch.empty(5, 24)
    first, second = together(x, a, b)
    assert (first.shape, second.shape, linear(x, a).shape) == ((2, 7, 16), (2, 7, 5), (2, 7, 16))
    first.sum().backward()
    assert a.grad is not None
    assert a.grad.shape == a.shape
