"""SSD in chunks against its recurrence, in float64 unless said."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from op_checks import assert_same, gradients, normal, packed
from torch import Tensor

from hinny.ops import ssd, ssd_recurrence, ssd_step, use_backend
from hinny.ops.ssd_scaled import reaches, sums

CHUNK = 8


def given(b: int = 2, t: int = 2 * CHUNK, h: int = 4, p: int = 3, g: int = 2, n: int = 5, full: bool = True,
          dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    make = partial(normal, dtype=dtype)
    inputs = {"x": make(b, t, h, p, seed=0), "dt": make(b, t, h, seed=1), "A": -make(h, seed=2).exp(),
              "B": make(b, t, g, n, seed=3), "C": make(b, t, g, n, seed=4)}
    if full:
        inputs |= {"D": make(h, seed=5), "z": make(b, t, h, p, seed=6), "dt_bias": make(h, seed=7),
                   "initial_state": make(b, h, p, n, seed=8)}
    return inputs


def cut(inputs: dict[str, Tensor], start: int, stop: int | None) -> dict[str, Tensor]:
    return {k: v[:, start:stop] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}


@pytest.mark.parametrize("t", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 13, 37])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_chunks_equal_the_recurrence_with_every_gradient(t: int, g: int) -> None:
    assert_same(partial(ssd, dt_softplus=True, chunk_len=CHUNK), partial(ssd_recurrence, dt_softplus=True),
                given(t=t, g=g))


def test_every_optional_argument_may_be_absent() -> None:
    inputs = given(t=11, full=False)
    inputs["dt"] = inputs["dt"].abs()
    assert_same(partial(ssd, chunk_len=CHUNK), ssd_recurrence, inputs)


@pytest.mark.parametrize("name", ["D", "z", "dt_bias", "initial_state"])
def test_each_optional_argument_alone_equals_the_recurrence(name: str) -> None:
    inputs = given(t=11, full=False) | {name: given(t=11)[name]}
    assert_same(partial(ssd, dt_softplus=True, chunk_len=4), partial(ssd_recurrence, dt_softplus=True), inputs)
    without = ssd(**given(t=11, full=False), dt_softplus=True)
    assert not torch.allclose(ssd(**inputs, dt_softplus=True)[0], without[0])


def test_the_chunk_length_does_not_change_the_result() -> None:
    inputs = given(t=37)
    one = ssd(**inputs, dt_softplus=True, chunk_len=37)
    for length in (1, 2, 5, 16, 1000):
        torch.testing.assert_close(ssd(**inputs, dt_softplus=True, chunk_len=length), one, rtol=1e-12, atol=1e-12)


def test_the_recurrence_equals_the_sum_over_earlier_tokens() -> None:
    inputs = given(b=1, t=6, h=2, g=1)
    y, state = ssd_recurrence(**inputs)
    x, dt, A, B, C = (inputs[k][0] if k != "A" else inputs[k] for k in ("x", "dt", "A", "B", "C"))
    dt = dt + inputs["dt_bias"]
    for h in range(2):
        for i in range(6):
            decay = [torch.exp(A[h] * dt[j + 1:i + 1, h].sum()) for j in range(i + 1)]
            from_start = torch.exp(A[h] * dt[:i + 1, h].sum())
            reach = sum(decay[j] * dt[j, h] * x[j, h, :, None] * B[j, 0] for j in range(i + 1))
            reach = reach + from_start * inputs["initial_state"][0, h]
            expected = (reach @ C[i, 0] + inputs["D"][h] * x[i, h]) * torch.nn.functional.silu(inputs["z"][0, i, h])
            torch.testing.assert_close(y[0, i, h], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[0, h], reach, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5, 4, 7], [CHUNK, CHUNK], [CHUNK - 1, 1, CHUNK, 1], [1] * 9, [3, 20, 2]])
def test_segments_equal_the_recurrence_with_every_gradient(lengths: list[int]) -> None:
    inputs = given(t=sum(lengths)) | {"segments": packed(lengths, 2)}
    assert_same(partial(ssd, dt_softplus=True, chunk_len=CHUNK), partial(ssd_recurrence, dt_softplus=True), inputs)


@pytest.mark.parametrize("lengths", [[5, 4, 7], [CHUNK, CHUNK + 1], [1, 2, 1, 30]])
def test_a_packed_document_gives_the_numbers_it_gives_alone(lengths: list[int]) -> None:
    inputs = given(t=sum(lengths))
    y, state = ssd(**inputs, segments=packed(lengths, 2), dt_softplus=True, chunk_len=CHUNK)
    start = 0
    for i, length in enumerate(lengths):
        part = cut(inputs, start, start + length)
        if i > 0:
            del part["initial_state"]
        alone, alone_state = ssd(**part, dt_softplus=True, chunk_len=CHUNK)
        torch.testing.assert_close(y[:, start:start + length], alone, rtol=1e-12, atol=1e-12)
        start += length
    torch.testing.assert_close(state, alone_state, rtol=1e-12, atol=1e-12)


def test_a_packed_document_does_not_feel_its_neighbours_at_all() -> None:
    inputs = given(t=20) | {"segments": packed([9, 11], 2)}
    other = {k: v.clone() for k, v in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        other[name][:, :9] += 1
    weight = normal(2, 11, 4, 3, seed=50)
    grads = []
    for v in (inputs, other):
        x = v["x"].requires_grad_()
        y, state = ssd(**v, dt_softplus=True, chunk_len=CHUNK)
        grads.append((y[:, 9:], state, torch.autograd.grad((y[:, 9:] * weight).sum() + state.sum(), x)[0]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert (grads[0][2][:, :9] == 0).all()


def test_steps_repeat_the_sequence() -> None:
    inputs = given(t=13)
    y, final = ssd(**inputs, dt_softplus=True, chunk_len=CHUNK)
    state = inputs["initial_state"]
    for i in range(13):
        token = {k: v[:, 0] if v.dim() > 2 and k not in ("initial_state",) else v
                 for k, v in cut(inputs, i, i + 1).items()}
        out, state = ssd_step(**token | {"initial_state": state}, dt_softplus=True)
        torch.testing.assert_close(out, y[:, i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [1, 7, 8, 9, 16])
def test_a_sequence_cut_anywhere_equals_the_whole_with_every_gradient(at: int) -> None:
    def in_two(**v: Tensor) -> tuple[Tensor, Tensor]:
        first, state = ssd(**cut(v, 0, at), dt_softplus=True, chunk_len=CHUNK)
        second, state = ssd(**cut(v, at, None) | {"initial_state": state}, dt_softplus=True, chunk_len=CHUNK)
        return torch.cat([first, second], 1), state

    assert_same(in_two, partial(ssd, dt_softplus=True, chunk_len=CHUNK), given(t=17))


def test_extreme_decays_stay_finite() -> None:
    for scale in (50.0, 1e-8):
        inputs = given(t=20) | {"segments": packed([3, 17], 2)}
        inputs["A"] = torch.full((4,), -scale, dtype=torch.float64)
        inputs["dt"] = torch.ones(2, 20, 4, dtype=torch.float64)
        del inputs["dt_bias"]
        outputs, grads = gradients(partial(ssd, chunk_len=CHUNK), inputs)
        assert all(v.isfinite().all() for v in (*outputs, *grads.values()))
        assert_same(partial(ssd, chunk_len=CHUNK), ssd_recurrence, inputs)
    # in float32 the sums of a chunk reach -3200, exp of their opposite overflows
    inputs = {k: v.float() for k, v in given(t=64, full=False).items()}
    inputs["A"] = torch.full((4,), -50.0)
    inputs["dt"] = torch.ones(2, 64, 4)
    assert_same(ssd, ssd_recurrence, inputs, tolerance=2e-5)


def test_a_neighbour_of_extreme_decay_costs_no_precision() -> None:
    inputs = {k: v.float() for k, v in given(b=1, t=40, full=False).items()}
    inputs["dt"] = inputs["dt"].abs() * 0.01
    alone = ssd(**cut(inputs, 20, None))[0]
    inputs["dt"][:, :20] = 1e5
    packed_y = ssd(**inputs, segments=packed([20, 20], 1))[0][:, 20:]
    torch.testing.assert_close(packed_y, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [None, [70, 1, 57], [10, 20, 98], [62, 66]])
@pytest.mark.parametrize(("halvings", "form"), [(1, 64), (100, 64), (158, 64), (162, 32), (318, 32), (322, 16),
                                                (700, 0)])
def test_every_form_is_right_in_float32_up_to_its_limit(halvings: int, form: int, documents: list[int] | None) -> None:
    """Decays of so many powers of two over 64 tokens, in the strongest head, taken in chunks of `form` tokens."""
    inputs = given(t=128, h=4, p=3, g=2, n=5)
    inputs["A"] = torch.tensor([-1.0, -0.5, -0.1, -0.01], dtype=torch.float64) * halvings * math.log(2) / 64
    inputs["dt"] = torch.ones_like(inputs["dt"])
    del inputs["dt_bias"]
    if documents:
        inputs["segments"] = packed(documents, 2)
    chunks = [length for length in (64, 32, 16) if sums(
        (inputs["dt"] * inputs["A"]).view(2, -1, length, 4), reaches(None, inputs["dt"], length)) is not None]
    assert max(chunks, default=0) == form
    low = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
    outputs, grads = gradients(partial(ssd, chunk_len=64), low)
    expected, expected_grads = gradients(ssd_recurrence, low)
    for found, right in [*zip(outputs, expected, strict=True), *((grads[n], expected_grads[n]) for n in grads)]:
        # the exponents are sums of up to 160, which float32 holds to 1e-5
        torch.testing.assert_close(found, right, rtol=0, atol=3e-5 * float(right.abs().max()))


def test_growing_states_are_not_clamped() -> None:
    inputs = given(t=20, full=False)
    inputs["A"] = -0.1 * inputs["A"]
    assert_same(partial(ssd, dt_softplus=True, chunk_len=CHUNK), partial(ssd_recurrence, dt_softplus=True), inputs,
                tolerance=1e-9)


def test_float32_is_close_to_float64() -> None:
    inputs = given(t=200, h=8, p=16, g=1, n=16)
    inputs["dt_bias"] -= 3
    exact, _ = gradients(partial(ssd_recurrence, dt_softplus=True), inputs)
    single = {k: v.float() for k, v in inputs.items()}
    outputs, grads = gradients(partial(ssd, dt_softplus=True), single)
    for a, b in zip(outputs, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 2e-6 * b.abs().max()
    _, expected_grads = gradients(partial(ssd_recurrence, dt_softplus=True), single)
    for name in grads:
        assert (grads[name] - expected_grads[name]).abs().max() < 1e-5 * expected_grads[name].abs().max(), name


def test_bfloat16_inputs_keep_states_in_float32_also_under_autocast() -> None:
    inputs = {k: v.bfloat16() if k in ("x", "B", "C", "z") else v.float() for k, v in given(t=70).items()}
    same = {k: v.float() for k, v in inputs.items()}
    expected, state = ssd_recurrence(**same, dt_softplus=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, final = ssd(**inputs, dt_softplus=True)
        assert y.dtype == torch.bfloat16
        assert final.dtype == torch.float32
        torch.testing.assert_close(y.float(), expected, rtol=2 ** -8, atol=1e-6)  # y is rounded once, at the end
        torch.testing.assert_close(final, state, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_the_backward() -> None:
    inputs = {k: v.float() for k, v in given(t=20).items()}
    _, expected = gradients(partial(ssd, dt_softplus=True), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(partial(ssd, dt_softplus=True), inputs)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = given(t=19)
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in inputs.items()}
    torch.testing.assert_close(ssd(**strided, dt_softplus=True), ssd(**inputs, dt_softplus=True), rtol=1e-12,
                               atol=1e-12)


def test_the_reference_backend_is_the_recurrence() -> None:
    inputs = given(t=19)
    with use_backend("reference"):
        found = ssd(**inputs, dt_softplus=True)
    for a, b in zip(found, ssd_recurrence(**inputs, dt_softplus=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "shape"), [("dt", (2, 16, 3)), ("A", (5,)), ("C", (2, 16, 1, 5)), ("D", (1,)),
                                             ("z", (2, 16, 4, 1)), ("dt_bias", (1,)), ("initial_state", (1, 4, 3, 5)),
                                             ("segments", (1, 16)), ("B", (2, 16, 3, 5)), ("x", (2, 4, 3))])
@pytest.mark.parametrize("op", [ssd, ssd_recurrence])
def test_shapes_that_do_not_fit_are_refused(op: object, name: str, shape: tuple[int, ...]) -> None:
    inputs = given() | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match="must"):
        op(**inputs)


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_len is 0"):
        ssd(**given(), chunk_len=0)


@pytest.mark.parametrize("scale", [1e-9, 1e-15])
def test_tiny_gradients_do_not_underflow_between_the_factors(scale: float) -> None:
    """The mean over a large batch makes gradients this small; the scaled form multiplies them by 2^-80 … 2^80."""
    inputs = given(t=128, h=4, p=3, g=2, n=5, full=False, dtype=torch.float32)
    inputs["A"], inputs["dt"] = torch.tensor([-1.5, -1.0, -0.5, -0.1]), torch.ones_like(inputs["dt"])
    _, grads = gradients(lambda **given: ssd(**given, chunk_len=64)[0] * scale, inputs)
    _, expected = gradients(lambda **given: ssd_recurrence(**given)[0] * scale, inputs)
    for name, grad in grads.items():
        assert (grad - expected[name]).abs().max() < 3e-5 * expected[name].abs().max(), name
