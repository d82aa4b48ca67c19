"""The convolution's kernels on a GPU: outputs, final state and every gradient against the definition in float64.

The error is held to 1.5 times that of the torch form with the same inputs; both compute in float32 and round once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import causal_conv, causal_conv_reference, causal_conv_step, use_backend

pytestmark = pytest.mark.gpu
FLOOR = 1e-6
"""Errors below it are not compared: of float32 results, whose rounding is 6e-8, and a sigmoid to 3e-7."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def inputs(seed: int, b: int, t: int, ch: int, w: int, dtype: torch.dtype, *, full: bool,
           scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda")

    found = {"x": (normal(b, t, ch) * scale).to(dtype), "weight": normal(ch, w) / w ** 0.5}
    return found | ({"bias": normal(ch), "initial_state": normal(b, ch, w - 1)} if full else {})


def documents(seed: int, b: int, t: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Ids that change at every third token or so, and come back."""
    draw = torch.Generator("cuda").manual_seed(seed)
    return (torch.rand(b, t, generator=draw, device="cuda") < 0.3).cumsum(1).remainder(2).to(dtype)


def results(op: Any, values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and the gradients of a random mixture of them that is the same in every type."""
    leaves = {name: v.detach().clone().requires_grad_() for name, v in values.items()}
    outputs = op(**leaves, **options)
    draw = torch.Generator("cuda").manual_seed(5)
    mixture = [torch.randn(v.shape, generator=draw, device="cuda").to(leaves["x"].dtype).to(v.dtype) for v in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), mixture)
    return {"y": outputs[0].detach(), "state": outputs[1].detach()} | dict(zip(leaves, grads, strict=True))


def rounded_mixture(op: Any, values: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """As `results`, in float64, with the mixture that inputs of `dtype` would get."""
    leaves = {name: v.double().requires_grad_() for name, v in values.items()}
    outputs = op(**leaves, **options)
    draw = torch.Generator("cuda").manual_seed(5)
    mixture = [torch.randn(v.shape, generator=draw, device="cuda").to(dtype).double() for v in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), mixture)
    return {"y": outputs[0].detach(), "state": outputs[1].detach()} | dict(zip(leaves, grads, strict=True))


def check(values: dict[str, Tensor], **options: Any) -> None:
    expected = rounded_mixture(causal_conv_reference, values, values["x"].dtype, **options)
    with use_backend("torch"):
        plain = results(causal_conv, values, **options)
    with use_backend("triton"):
        found = results(causal_conv, values, **options)
    for name, a in found.items():
        assert a.dtype == plain[name].dtype
        if a.numel() == 0:
            continue
        error, allowed = ((v[name].double() - expected[name]).norm().item() for v in (found, plain))
        size = expected[name].norm().item()
        assert error <= 1.5 * allowed + FLOOR * size, f"{name}: {error / size} against {allowed / size}"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(b=st.integers(1, 3), t=st.integers(2, 150), ch=st.sampled_from([5, 48, 300, 512]), full=st.booleans(),
       seed=st.integers(0, 1000))
def test_outputs_state_and_gradients_equal_the_definition(b: int, t: int, ch: int, full: bool, seed: int) -> None:
    packed = documents(seed, b, t) if full else None
    check(inputs(seed, b, t, ch, 4, torch.bfloat16, full=full), segments=packed, activation="silu")


@pytest.mark.parametrize(("w", "t", "dtype"), [(1, 20, torch.float32), (2, 70, torch.float16), (3, 2, torch.float32),
                                               (8, 90, torch.bfloat16), (8, 3, torch.bfloat16)])
def test_other_widths_and_types(w: int, t: int, dtype: torch.dtype) -> None:
    check(inputs(w, 2, t, 64, w, dtype, full=True), activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_with_segments_of_32_bits_and_no_activation(dtype: torch.dtype) -> None:
    check(inputs(3, 2, 67, 64, 4, dtype, full=False), segments=documents(3, 2, 67, torch.int32), activation=None)


def test_long_walks_of_many_programs() -> None:
    """Sizes that take the launches of large calls: several parts of a sequence, batches of rows, a ragged end."""
    values = inputs(1, 2, 8195, 2304, 4, torch.bfloat16, full=True)
    exact = {name: v.double() for name, v in values.items()}
    with use_backend("torch"):
        expected = rounded_mixture(causal_conv, exact, torch.bfloat16, activation="silu")
        plain = results(causal_conv, values, activation="silu")
    found = results(causal_conv, values, activation="silu")
    for name, a in found.items():
        error, allowed = ((v[name].double() - expected[name]).norm().item() for v in (found, plain))
        assert error <= 1.5 * allowed + FLOOR * expected[name].norm().item(), name
        assert a.isfinite().all()


def test_two_runs_give_identical_bits() -> None:
    values = inputs(2, 2, 8195, 2304, 4, torch.bfloat16, full=True)
    first, second = (results(causal_conv, values, activation="silu") for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


@pytest.mark.parametrize("t", [9, 700])
def test_slices_of_wider_tensors_are_read_in_place(t: int) -> None:
    values = inputs(4, 2, t, 512, 4, torch.bfloat16, full=True)
    wide = torch.full((2, t + 3, 1024), torch.nan, dtype=torch.bfloat16, device="cuda")
    part = wide[:, 1:t + 1, 256:768]
    part.copy_(values["x"])
    y, state = causal_conv(**values, activation="silu")
    before = torch.cuda.memory_allocated()
    again = causal_conv(**values | {"x": part}, activation="silu")
    assert torch.cuda.memory_allocated() - before <= (again[0].nbytes + again[1].nbytes) * 1.1 + 4096
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], state)


@pytest.mark.parametrize("b", [2, 70])
def test_steps_repeat_the_sequence_and_have_its_gradients(b: int) -> None:
    values = inputs(5, b, 5, 320, 4, torch.bfloat16, full=True)
    y, final = causal_conv(**values, activation="silu")
    state = values["initial_state"]
    for i in range(5):
        out, state = causal_conv_step(**values | {"x": values["x"][:, i], "initial_state": state}, activation="silu")
        torch.testing.assert_close(out, y[:, i], rtol=8e-3, atol=1e-6)
    assert torch.equal(state, final)
    check(inputs(6, b, 1, 320, 4, torch.bfloat16, full=True), activation="silu")


def test_large_inputs_saturate_without_nan() -> None:
    check(inputs(7, 1, 40, 48, 4, torch.bfloat16, full=True, scale=1e6), segments=documents(7, 1, 40),
          activation="silu")


def test_a_packed_document_does_not_feel_its_neighbours_at_all() -> None:
    values = inputs(8, 1, 64, 48, 4, torch.bfloat16, full=True)
    ids = torch.tensor([0] * 30 + [1] * 34, device="cuda")[None]
    found = []
    for value in (0.0, torch.inf):
        x = values["x"].clone()
        x[:, :30] = value
        x.requires_grad_()
        y, state = causal_conv(**values | {"x": x}, segments=ids, activation="silu")
        grad, = torch.autograd.grad(y[:, 30:].float().sum() + state.sum(), x)
        found.append((y[:, 30:].detach(), state.detach(), grad[:, 30:]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_gives_the_same_gradients() -> None:
    values = inputs(9, 2, 50, 48, 4, torch.bfloat16, full=True)

    def saved_anew(**leaves: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(causal_conv, use_reentrant=False, activation="silu", **leaves)

    plain, again = results(causal_conv, values, activation="silu"), results(saved_anew, values)
    assert all(torch.equal(a, again[name]) for name, a in plain.items())


def test_more_elements_than_32_bits_count() -> None:
    t, ch, tail = 2 ** 19 + 3, 4104, 9
    x = torch.randn(1, t, ch, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(ch, 4, device="cuda").requires_grad_()
    end = x[:, -tail:].clone().requires_grad_()
    history = x[:, -tail - 3:-tail].transpose(1, 2).float()
    y, state = causal_conv(x.requires_grad_(), weight, activation="silu")
    y_end, state_end = causal_conv(end, weight, activation="silu", initial_state=history)
    torch.testing.assert_close(y[:, -tail:], y_end)
    assert torch.equal(state, state_end)
    mixture = torch.randn_like(y_end)
    whole = torch.zeros_like(y)
    whole[:, -tail:] = mixture
    dx, dweight = torch.autograd.grad(y, (x, weight), whole)
    dx_end, dweight_end = torch.autograd.grad(y_end, (end, weight), mixture)
    torch.testing.assert_close(dx[:, -tail:], dx_end)
    torch.testing.assert_close(dweight, dweight_end, rtol=1e-5, atol=1e-5)
    assert not dx[:, :-tail - 3].any()
