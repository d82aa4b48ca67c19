"""Selective scan in chunks against its recurrence, in float64 unless said."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_checks import assert_same, gradients, normal, packed
from torch import Tensor

from hinny.ops import selective_scan, selective_scan_recurrence, selective_scan_step, use_backend

CHUNK = 8
scan = partial(selective_scan, dt_softplus=True, chunk_len=CHUNK)
recurrence = partial(selective_scan_recurrence, dt_softplus=True)


def given(b: int = 2, t: int = 2 * CHUNK, d: int = 5, n: int = 3, full: bool = True) -> dict[str, Tensor]:
    inputs = {"x": normal(b, t, d, seed=0), "dt": normal(b, t, d, seed=1), "A": -normal(d, n, seed=2).exp(),
              "B": normal(b, t, n, seed=3), "C": normal(b, t, n, seed=4)}
    if full:
        inputs |= {"D": normal(d, seed=5), "z": normal(b, t, d, seed=6), "dt_bias": normal(d, seed=7),
                   "initial_state": normal(b, d, n, seed=8)}
    return inputs


def cut(inputs: dict[str, Tensor], start: int, stop: int | None) -> dict[str, Tensor]:
    return {k: v[:, start:stop] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}


@pytest.mark.parametrize("t", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 13, 37])
def test_chunks_equal_the_recurrence_with_every_gradient(t: int) -> None:
    assert_same(scan, recurrence, given(t=t))


def test_every_optional_argument_may_be_absent() -> None:
    inputs = given(t=11, full=False)
    inputs["dt"] = inputs["dt"].abs()
    assert_same(partial(selective_scan, chunk_len=CHUNK), selective_scan_recurrence, inputs)


@pytest.mark.parametrize("name", ["D", "z", "dt_bias", "initial_state"])
def test_each_optional_argument_alone_equals_the_recurrence(name: str) -> None:
    inputs = given(t=11, full=False) | {name: given(t=11)[name]}
    assert_same(scan, recurrence, inputs)
    assert not torch.allclose(scan(**inputs)[0], scan(**given(t=11, full=False))[0])


def test_the_recurrence_equals_the_sum_over_earlier_tokens() -> None:
    inputs = given(b=1, t=6, d=2)
    y, state = selective_scan_recurrence(**inputs)
    x, B, C = (inputs[k][0] for k in "xBC")
    dt = inputs["dt"][0] + inputs["dt_bias"]
    for i in range(6):
        reach = torch.exp(inputs["A"] * dt[:i + 1].sum(0)[:, None]) * inputs["initial_state"][0]
        for j in range(i + 1):
            reach = reach + torch.exp(inputs["A"] * dt[j + 1:i + 1].sum(0)[:, None]) * (dt[j] * x[j])[:, None] * B[j]
        expected = (reach @ C[i] + inputs["D"] * x[i]) * torch.nn.functional.silu(inputs["z"][0, i])
        torch.testing.assert_close(y[0, i], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[0], reach, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5, 4, 7], [CHUNK, CHUNK], [CHUNK - 1, 1, CHUNK, 1], [1] * 9, [3, 20, 2]])
def test_segments_equal_the_recurrence_with_every_gradient(lengths: list[int]) -> None:
    assert_same(scan, recurrence, given(t=sum(lengths)) | {"segments": packed(lengths, 2)})


def test_a_packed_document_gives_the_numbers_it_gives_alone() -> None:
    lengths = [5, 11, 1, CHUNK]
    inputs = given(t=sum(lengths))
    y, state = scan(**inputs, segments=packed(lengths, 2))
    start = 0
    for i, length in enumerate(lengths):
        part = cut(inputs, start, start + length)
        if i > 0:
            del part["initial_state"]
        alone, alone_state = scan(**part)
        torch.testing.assert_close(y[:, start:start + length], alone, rtol=1e-12, atol=1e-12)
        start += length
    torch.testing.assert_close(state, alone_state, rtol=1e-12, atol=1e-12)


def test_a_packed_document_does_not_feel_its_neighbours_at_all() -> None:
    inputs = given(t=20) | {"segments": packed([9, 11], 2)}
    other = {k: v.clone() for k, v in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        other[name][:, :9] += 1
    results = []
    for v in (inputs, other):
        x = v["x"].requires_grad_()
        y, state = scan(**v)
        results.append((y[:, 9:], state, torch.autograd.grad((y[:, 9:] ** 2).sum() + state.sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[0][2][:, :9] == 0).all()


def test_steps_repeat_the_sequence() -> None:
    inputs = given(t=13)
    y, final = scan(**inputs)
    state = inputs["initial_state"]
    for i in range(13):
        token = {k: v[:, i] for k, v in inputs.items() if k in ("x", "dt", "B", "C", "z")}
        out, state = selective_scan_step(**inputs | token | {"initial_state": state}, dt_softplus=True)
        torch.testing.assert_close(out, y[:, i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [1, 7, 8, 9, 16])
def test_a_sequence_cut_anywhere_equals_the_whole_with_every_gradient(at: int) -> None:
    def in_two(**v: Tensor) -> tuple[Tensor, Tensor]:
        first, state = scan(**cut(v, 0, at))
        second, state = scan(**cut(v, at, None) | {"initial_state": state})
        return torch.cat([first, second], 1), state

    assert_same(in_two, scan, given(t=17))


def test_extreme_decays_stay_finite_and_right() -> None:
    for scale in (50.0, 1e-8):
        inputs = given(t=20) | {"segments": packed([3, 17], 2)}
        inputs["A"] = torch.full((5, 3), -scale, dtype=torch.float64)
        inputs["dt"] = torch.ones(2, 20, 5, dtype=torch.float64)
        del inputs["dt_bias"]
        outputs, grads = gradients(partial(selective_scan, chunk_len=CHUNK), inputs)
        assert all(v.isfinite().all() for v in (*outputs, *grads.values()))
        assert_same(partial(selective_scan, chunk_len=CHUNK), selective_scan_recurrence, inputs)


def test_float32_is_close_to_its_recurrence() -> None:
    assert_same(scan, recurrence, {k: v.float() for k, v in given(t=100, d=16, n=8).items()}, tolerance=1e-4)


def test_bfloat16_inputs_keep_states_in_float32_also_under_autocast() -> None:
    inputs = {k: v.bfloat16() if k in ("x", "B", "C", "z") else v.float() for k, v in given(t=70).items()}
    expected, state = recurrence(**{k: v.float() for k, v in inputs.items()})
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, final = scan(**inputs)
        assert y.dtype == torch.bfloat16
        assert final.dtype == torch.float32
        torch.testing.assert_close(y.float(), expected, rtol=2 ** -8, atol=1e-6)  # y is rounded once, at the end
        torch.testing.assert_close(final, state, rtol=1e-5, atol=1e-5)


def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = given(t=19)
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in inputs.items()}
    assert_same(lambda **v: scan(**v), recurrence, strided)


def test_the_reference_backend_is_the_recurrence() -> None:
    inputs = given(t=19)
    with use_backend("reference"):
        found = scan(**inputs)
    for a, b in zip(found, recurrence(**inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "shape"), [("dt", (2, 16, 3)), ("A", (5, 2)), ("C", (2, 1, 3)), ("D", (1,)),
                                             ("z", (2, 16, 1)), ("dt_bias", (1,)), ("initial_state", (1, 5, 3)),
                                             ("segments", (1, 16)), ("B", (2, 16)), ("x", (2, 0, 5))])
@pytest.mark.parametrize("op", [selective_scan, selective_scan_recurrence])
def test_shapes_that_do_not_fit_are_refused(op: object, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must"):
        op(**given() | {name: torch.zeros(shape, dtype=torch.float64)})
