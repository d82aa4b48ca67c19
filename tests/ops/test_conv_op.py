"""Causal convolution against its definition and against torch's convolution, in float64 unless said."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_same, normal, packed
from torch import Tensor

from hinny.ops import causal_conv, causal_conv_reference, causal_conv_step, use_backend


def given(b: int = 2, t: int = 9, ch: int = 3, w: int = 4, full: bool = True) -> dict[str, Tensor]:
    inputs = {"x": normal(b, t, ch, seed=0), "weight": normal(ch, w, seed=1)}
    return inputs | {"bias": normal(ch, seed=2), "initial_state": normal(b, ch, w - 1, seed=3)} if full else inputs


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 37])
@pytest.mark.parametrize("w", [1, 2, 4])
def test_the_fast_form_equals_the_definition_with_every_gradient(t: int, w: int, activation: str | None) -> None:
    assert_same(partial(causal_conv, activation=activation), partial(causal_conv_reference, activation=activation),
                given(t=t, w=w))


def test_it_is_torchs_convolution_padded_on_the_left() -> None:
    v = given(full=False) | {"bias": normal(3, seed=2)}
    expected = F.conv1d(F.pad(v["x"].transpose(1, 2), (3, 0)), v["weight"][:, None], v["bias"], groups=3)
    torch.testing.assert_close(causal_conv(**v)[0], expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(causal_conv(**v, activation="silu")[0], F.silu(expected.transpose(1, 2)), rtol=1e-12,
                               atol=1e-12)


@pytest.mark.parametrize("lengths", [[5, 4], [1, 1, 1, 1, 5], [3, 1, 5], [8, 1]])
@pytest.mark.parametrize("full", [True, False])
def test_segments_equal_the_definition_with_every_gradient(lengths: list[int], full: bool) -> None:
    assert_same(partial(causal_conv, activation="silu"), partial(causal_conv_reference, activation="silu"),
                given(full=full) | {"segments": packed(lengths, 2)})


@pytest.mark.parametrize("lengths", [[5, 4], [1, 1, 1, 6], [3, 4, 2]])
def test_a_packed_document_gives_the_numbers_it_gives_alone(lengths: list[int]) -> None:
    inputs = given()
    y, state = causal_conv(**inputs, segments=packed(lengths, 2))
    start = 0
    for i, length in enumerate(lengths):
        part = inputs | {"x": inputs["x"][:, start:start + length]}
        if i > 0:
            del part["initial_state"]
        alone, alone_state = causal_conv(**part)
        torch.testing.assert_close(y[:, start:start + length], alone, rtol=1e-12, atol=1e-12)
        start += length
    torch.testing.assert_close(state, alone_state, rtol=1e-12, atol=1e-12)


def test_a_packed_document_does_not_feel_its_neighbours_at_all() -> None:
    inputs = given(full=False)
    ids = packed([4, 5], 2)
    results = []
    for shift in (0, 1):
        x = torch.cat([inputs["x"][:, :4] + shift, inputs["x"][:, 4:]], 1).requires_grad_()
        weight = inputs["weight"].clone().requires_grad_()
        y, state = causal_conv(x, weight, segments=ids, activation="silu")
        results.append((y[:, 4:], state, *torch.autograd.grad(y[:, 4:].sum() + state.sum(), (x, weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[0][2][:, :4] == 0).all()


def test_steps_repeat_the_sequence() -> None:
    inputs = given()
    y, final = causal_conv(**inputs, activation="silu")
    state = inputs["initial_state"]
    for i in range(9):
        out, state = causal_conv_step(**inputs | {"x": inputs["x"][:, i], "initial_state": state}, activation="silu")
        torch.testing.assert_close(out, y[:, i], rtol=1e-12, atol=1e-12)
    assert torch.equal(state, final)


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_sequence_cut_anywhere_equals_the_whole_with_every_gradient(at: int) -> None:
    def in_two(x: Tensor, initial_state: Tensor, **v: Tensor) -> tuple[Tensor, Tensor]:
        first, state = causal_conv(x[:, :at], **v, initial_state=initial_state)
        second, state = causal_conv(x[:, at:], **v, initial_state=state)
        return torch.cat([first, second], 1), state

    assert_same(in_two, causal_conv, given())


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    inputs = {k: v.bfloat16().float() for k, v in given(t=40).items()}
    expected, _ = causal_conv(**inputs, activation="silu")
    with torch.autocast("cpu", torch.bfloat16):
        y, state = causal_conv(**inputs | {"x": inputs["x"].bfloat16()}, activation="silu")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, expected.bfloat16())


def test_the_reference_backend_is_the_definition() -> None:
    inputs = given()
    with use_backend("reference"):
        found = causal_conv(**inputs)
    assert torch.equal(found[0], causal_conv_reference(**inputs)[0])


@pytest.mark.parametrize(("name", "value"), [("weight", torch.zeros(2, 4)), ("bias", torch.zeros(1)),
                                             ("initial_state", torch.zeros(2, 3, 4)), ("segments", torch.zeros(2, 8)),
                                             ("x", torch.zeros(2, 3)), ("activation", "gelu")])
def test_what_does_not_fit_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match="must"):
        causal_conv(**given() | {name: value})
