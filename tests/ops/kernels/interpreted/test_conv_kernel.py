"""The convolution's kernels against the definition in float64: outputs, final state, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hinny.ops import causal_conv, causal_conv_reference, causal_conv_step, use_backend
from hinny.ops.kernels.conv import candidates
from hinny.ops.kernels.launches import rules, trial
from hinny.ops.kernels.waves import whole_waves

TOLERANCE = 2e-6
"""Of a relative error in float32; the longest sums have a hundred parts."""

ROWS = rules("default")["conv_forward"][1]["use"]["rows"]
"""Tokens of one program in the forward of a small call; twice as many in the backward."""


def given(b: int, t: int, ch: int, w: int, full: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * t + w)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float().double()

    inputs = {"x": normal(b, t, ch), "weight": normal(ch, w)}
    return inputs | ({"bias": normal(ch), "initial_state": normal(b, ch, w - 1)} if full else {})


def results(op: Any, values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of a fixed random mixture of them."""
    inputs = {name: v.clone().requires_grad_() for name, v in values.items()}
    outputs = op(**inputs, **options)
    generator = torch.Generator().manual_seed(7)
    mixture = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), mixture)
    return {"y": outputs[0].detach(), "state": outputs[1].detach()} | dict(zip(inputs, grads, strict=True))


def check(values: dict[str, Tensor], segments: list[int] | None = None, activation: str | None = "silu") -> None:
    b = len(values["x"])
    ids = None
    if segments is not None:  # the same ids come back: 7, 3, 7, 3, ...
        ids = torch.tensor([7, 3] * len(segments))[:len(segments)].repeat_interleave(torch.tensor(segments))
        ids = ids.expand(b, -1)
    options = {"segments": ids, "activation": activation}
    expected = results(causal_conv_reference, values, **options)
    with use_backend("triton"):
        found = results(causal_conv, {name: v.float() for name, v in values.items()}, **options)
    for name, a in found.items():
        if a.numel():
            error = (a - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
            assert error < TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize(("t", "w"), [(1, 1), (1, 4), (2, 4), (2, 8), (5, 3), (ROWS, 2), (ROWS + 1, 4),
                                      (2 * ROWS + 5, 4), (37, 8)])
def test_outputs_state_and_gradients_equal_the_definition(t: int, w: int) -> None:
    check(given(2, t, 5, w))


def test_what_is_optional_may_be_left_out() -> None:
    check(given(1, 9, 3, 4, full=False), activation=None)


@pytest.mark.parametrize(("lengths", "w", "full"), [
    ([5, 4], 4, True), ([1] * 9, 4, True), ([8, 1], 4, False), ([ROWS, 1, 2, 2 * ROWS], 4, True), ([1, 2], 7, True),
    ([3, 1, 5], 1, True), ([ROWS - 1, ROWS + 3], 2, False)])
def test_segments_equal_the_definition(lengths: list[int], w: int, full: bool) -> None:
    check(given(2, sum(lengths), 3, w, full), segments=lengths)


def test_channels_of_several_programs() -> None:
    check(given(1, 6, 300, 4), segments=[2, 4])


@pytest.mark.parametrize("number", range(0, 9, 4))
def test_candidates_for_tuning_give_the_same(number: int) -> None:
    uses = {kernel: found[min(number, len(found) - 1)] for kernel, found in candidates().items()}
    with trial(uses) as seen:
        check(given(1, 37, 4, 4))
    assert {kernel for kernel, _ in seen} == {"conv_forward", "conv_backward", "sum_parts"}


def test_slices_of_wider_tensors_are_read_in_place() -> None:
    values = {name: v.float() for name, v in given(2, 11, 4, 4).items()}
    wide = torch.full((2, 13, 9), torch.nan)
    wide[:, 1:12, 2:6] = values["x"]
    with use_backend("triton"):
        y, state = causal_conv(**values, activation="silu")
        again = causal_conv(**values | {"x": wide[:, 1:12, 2:6]}, activation="silu")
        turned = causal_conv(**values | {"x": values["x"].mT.contiguous().mT}, activation="silu")
        low = causal_conv(**values | {"x": values["x"].half()}, activation="silu")
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], state)
    assert torch.equal(turned[0], y)
    assert (low[0].dtype, low[1].dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(low[0].float(), y, rtol=1e-2, atol=1e-2)


def test_steps_repeat_the_sequence() -> None:
    values = {name: v.float() for name, v in given(3, 6, 5, 4).items()}
    with use_backend("triton"):
        y, final = causal_conv(**values, activation="silu")
        state = values["initial_state"]
        for i in range(6):
            out, state = causal_conv_step(**values | {"x": values["x"][:, i], "initial_state": state},
                                          activation="silu")
            torch.testing.assert_close(out, y[:, i], rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used: int) -> None:
    values = given(1, 6, 2, 4)
    grads = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        inputs = {name: v.to(dtype).requires_grad_() for name, v in values.items()}
        with use_backend(backend):
            total = causal_conv(**inputs)[used].square().sum()
        grads.append(torch.autograd.grad(total, list(inputs.values()), materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t", "rows", "columns", "slots"), [
    (4096, 256, 128, 1320), (4096, 64, 16, 1320), (32768, 256, 32, 1320), (5, 64, 1, 1320), (100, 256, 5000, 1320)])
def test_programs_fill_whole_rounds_of_the_gpu(t: int, rows: int, columns: int, slots: int) -> None:
    fitting = whole_waves(t, rows, columns, slots, 4)
    assert rows // 2 <= fitting <= rows
    if rows // 2 < fitting < rows:
        rounds = -(-t // fitting) * columns / slots
        assert rounds % 1 == 0 or rounds % 1 > 0.9
    assert whole_waves(t, rows, columns, 0, 4) == rows


def test_a_traced_graph_gives_the_same_for_any_length() -> None:
    def twice(**v: Tensor) -> tuple[Tensor, Tensor]:
        y, state = causal_conv(**v, activation="silu")
        return 2 * y, state

    traced = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend("triton"):
        for t in (7, 9):
            values = {name: v.float() for name, v in given(2, t, 3, 4).items()}
            expected = results(twice, values)
            assert all(torch.equal(a, expected[name]) for name, a in results(traced, values).items())
