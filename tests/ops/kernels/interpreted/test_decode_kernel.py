"""Decoding kernels against the torch form in float64, and their random bits against `hinny.ops.rounding`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hinny.ops import conv_update, flush_replay, make_replay, mamba2_update, ssd_update, use_backend
from hinny.ops.rounding import round_stochastically

SLOTS = torch.tensor([4, -1, 1])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(t: int, h: int, p: int, g: int, n: int, full: bool = True, seed: int = 0) -> dict[str, Tensor]:
    dt = normal(3, t, h, seed=seed + 1)
    inputs = {"x": normal(3, t, h, p, seed=seed), "dt": dt - 2 if full else dt.abs() / 10,
              "A": -normal(h, seed=7).exp(), "B": normal(3, t, g, n, seed=seed + 2),
              "C": normal(3, t, g, n, seed=seed + 3)}
    return inputs | ({"D": normal(h, seed=8), "z": normal(3, t, h, p, seed=seed + 4), "dt_bias": normal(h, seed=9)}
                     if full else {})


def single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("slots", [None, SLOTS])
@pytest.mark.parametrize(("t", "h", "p", "g", "n", "full"), [
    (1, 4, 8, 2, 16, True), (1, 2, 3, 1, 5, False), (3, 4, 40, 4, 24, True), (2, 3, 64, 1, 128, False),
    (1, 1, 1, 1, 1, True)])
def test_an_update_equals_the_torch_form(t: int, h: int, p: int, g: int, n: int, full: bool,
                                         slots: Tensor | None) -> None:
    inputs, state = given(t, h, p, g, n, full), normal(5, h, p, n, seed=20)
    low = state.float()
    expected = ssd_update(state, **inputs, dt_softplus=full, slots=slots)
    with use_backend("triton"):
        y = ssd_update(low, **single(inputs), dt_softplus=full, slots=slots)
    close(y, expected)
    close(low, state)
    if slots is not None:
        assert (y[1] == 0).all()
        assert torch.equal(low[[0, 2, 3]], normal(5, h, p, n, seed=20).float()[[0, 2, 3]])


@pytest.mark.parametrize("step", [-20.0, -8.0, 0.0, 19.0, 30.0])
def test_step_sizes_keep_their_relative_precision(step: float) -> None:
    """The outputs are the steps themselves: a state of zero, and ones."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    dt = step + torch.linspace(-1, 1, 8, dtype=torch.float64).view(8, 1, 1)
    inputs = {"x": one.expand(8, 1, 1, 1), "dt": dt, "A": -torch.ones(1), "B": one.expand(8, 1, 1, 1),
              "C": one.expand(8, 1, 1, 1)}
    with use_backend("triton"):
        y = ssd_update(torch.zeros(8, 1, 1, 1), **single(inputs), dt_softplus=True)
    torch.testing.assert_close(y.flatten().double(), torch.nn.functional.softplus(dt).flatten(),
                               rtol=4e-7 + 5e-8 * abs(step), atol=0)


def test_inputs_may_be_slices_of_wider_rows_and_states_of_a_wider_pool() -> None:
    inputs, state = given(2, 2, 8, 1, 16), normal(3, 2, 2, 8, 16, seed=20)
    low = state.float()
    expected = ssd_update(state[:, 1], **inputs)
    sliced = {name: torch.cat([v, torch.full_like(v, torch.nan)], 2).narrow(2, 0, v.shape[2]) if v.dim() > 1 else v
              for name, v in single(inputs).items()}
    assert not sliced["x"].is_contiguous()
    with use_backend("triton"):
        close(ssd_update(low[:, 1], **sliced), expected)
    close(low, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_bits_are_those_of_the_definition(dtype: torch.dtype) -> None:
    """A state of zero, steps and B of one: what is rounded is x, to the bit."""
    x = torch.cat([normal(3, 1, 2, 3, seed=1) * scale for scale in (1.0, 1e-5)], 3).float()
    state, seed = torch.zeros(5, 2, 6, 21, dtype=dtype), torch.tensor(2 ** 35 + 3)
    with use_backend("triton"):
        ssd_update(state, x, torch.ones(3, 1, 2), -torch.ones(2), torch.ones(3, 1, 1, 21), torch.ones(3, 1, 1, 21),
                   slots=SLOTS, seed=seed)
    values = x[[0, 2], 0][..., None].expand(2, 2, 6, 21)
    expected = round_stochastically(values, dtype, seed, SLOTS[[0, 2]])
    assert torch.equal(state[[4, 1]].view(torch.int16), expected.view(torch.int16))
    assert (state[4] != state[4, :, :, :1]).any(), "no two of equal values went apart"


def test_a_nan_in_a_state_is_not_rounded_away() -> None:
    inputs = single(given(1, 1, 2, 1, 8, full=False))
    inputs["x"][:] = torch.nan
    for dtype in (torch.float16, torch.bfloat16):
        state = torch.zeros(3, 1, 2, 8, dtype=dtype)
        with use_backend("triton"):
            ssd_update(state, **inputs, seed=1)
        assert state.isnan().all()


@pytest.mark.parametrize(("length", "tokens", "full"), [(2, [1] * 5, True), (5, [2, 3, 1, 5], False)])
def test_replayed_outputs_equal_the_torch_form(length: int, tokens: list[int], full: bool) -> None:
    h, p, g, n = 2, 10, 2, 12
    state = normal(5, h, p, n, seed=20)
    low, replay, expected_replay = state.float(), make_replay(state.float(), g, torch.float32, length), \
        make_replay(state, g, torch.float64, length)
    for buffer in (replay.x, replay.dt, replay.B):
        buffer.fill_(torch.nan)
    for call, t in enumerate(tokens):
        inputs = given(t, h, p, g, n, full, seed=100 * call)
        slots = SLOTS if call % 3 else torch.tensor([1, 2, 4])
        expected = ssd_update(state, **inputs, dt_softplus=full, slots=slots, replay=expected_replay)
        with use_backend("triton"):
            y = ssd_update(low, **single(inputs), dt_softplus=full, slots=slots, replay=replay)
        close(y, expected)
        assert torch.equal(replay.cursor, expected_replay.cursor)
        close(low, state)
    flush_replay(low, inputs["A"], replay)
    flush_replay(state, inputs["A"], expected_replay)
    close(low, state)


def test_a_strong_decay_costs_its_neighbours_in_the_buffer_no_precision() -> None:
    state = normal(3, 1, 4, 8, seed=20)
    low, replay = state.float(), make_replay(state.float(), 1, torch.float32, 8)
    for call in range(5):
        inputs = given(1, 1, 4, 1, 8, full=False, seed=call)
        inputs["dt"] = torch.full_like(inputs["dt"], 1e6 if call == 2 else 1e-3)
        inputs["x"] = inputs["x"] * (1e-6 if call == 2 else 1)
        expected = ssd_update(state, **inputs)
        with use_backend("triton"):
            close(ssd_update(low, **single(inputs), replay=replay), expected)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("t", "w", "ch"), [(1, 4, 300), (5, 4, 6), (2, 2, 7), (1, 1, 5), (1, 6, 3)])
def test_a_convolution_equals_the_torch_form(t: int, w: int, ch: int, activation: str | None) -> None:
    x, weight, bias = normal(3, t, ch, seed=0), normal(ch, w, seed=1), normal(ch, seed=2) if t < 5 else None
    state = normal(5, ch, w - 1, seed=3)
    low = state.float()
    expected = conv_update(state, x, weight, bias, activation=activation, slots=SLOTS)
    with use_backend("triton"):
        y = conv_update(low, x.float(), weight.float(), None if bias is None else bias.float(), activation=activation,
                        slots=SLOTS)
    close(y, expected)
    assert (y[1] == 0).all()
    assert torch.equal(low, state.float())


@pytest.mark.parametrize(("packed", "replayed"), [(False, True), (True, False)])
def test_a_mixer_equals_the_torch_form(packed: bool, replayed: bool) -> None:
    h, p, g, n = 2, 8, 1, 16
    sizes = [h * p, g * n, g * n]
    weights = [normal(ch, 4, seed=i) for i, ch in enumerate(sizes)]
    biases = [normal(ch, seed=5 + i) for i, ch in enumerate(sizes)]
    state, conv = normal(5, h, p, n, seed=20), normal(5, sum(sizes), 3, seed=30)
    low, low_conv = state.float(), conv.float()
    replay = make_replay(low, g, torch.float32, 2) if replayed else None
    for call in range(2):
        inputs = given(2, h, p, g, n, seed=call)
        parts = normal(3, 2, sum(sizes), seed=40 + call).split(sizes, -1)
        rest = {name: inputs[name] for name in ("D", "z", "dt_bias")} | {"slots": SLOTS}
        expected = mamba2_update(state, conv, parts[0], inputs["dt"], inputs["A"], *parts[1:], weights, biases,
                                 dt_softplus=True, **rest)
        x, B, C = (part.float() if packed else part.float().contiguous() for part in parts)
        with use_backend("triton"):
            y = mamba2_update(low, low_conv, x, inputs["dt"].float(), inputs["A"].float(), B, C,
                              [v.float() for v in weights], [v.float() for v in biases], dt_softplus=True,
                              replay=replay, **single(rest))
        close(y, expected)
        close(low_conv, conv)
    if replay is not None:
        flush_replay(low, inputs["A"], replay)
    close(low, state)


def test_the_ops_are_traced_as_operators_that_change_their_states() -> None:
    state = normal(3, 2, 4, 8, seed=20).float()
    conv, low = normal(3, 24, 3, seed=30).float(), state.clone()
    plain_conv = conv.clone()
    replay = make_replay(state, 1, torch.float32, 4)
    weights = [normal(ch, 4, seed=i).float() for i, ch in enumerate((8, 8, 8))]

    def step(state: Tensor, conv: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        y = mamba2_update(state, conv, x, dt, A, B, C, weights, dt_softplus=True, replay=replay)
        ones = torch.ones(*y.shape[:2], 1, 8)
        return ssd_update(state, y, dt, A, ones, ones, replay=replay) + 1

    inputs = single(given(1, 2, 4, 1, 8, full=False))
    given_step = (inputs["x"].flatten(2), inputs["dt"], inputs["A"], inputs["B"].flatten(2), inputs["C"].flatten(2))
    with use_backend("triton"):
        expected = step(low, plain_conv, *given_step)
        replay.cursor.zero_()
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(state, conv, *given_step)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, low)
    torch.testing.assert_close(conv, plain_conv)
