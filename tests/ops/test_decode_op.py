"""Decoding in place: the torch form against ssd's and causal_conv's definitions, in float64 unless said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import normal
from torch import Tensor

from hinny.ops import (
    Replay,
    causal_conv_reference,
    conv_update,
    flush_replay,
    make_replay,
    mamba2_update,
    ssd_recurrence,
    ssd_step,
    ssd_update,
    use_backend,
)

H, P, G, N = 4, 3, 2, 5
SLOTS = torch.tensor([6, 0, -1, 3])
LIVE = SLOTS >= 0


def given(t: int, b: int = 4, full: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """x, dt, A, B, C for t tokens, and D, z, dt_bias if `full`."""
    inputs = {"x": normal(b, t, H, P, seed=seed), "dt": normal(b, t, H, seed=seed + 1),
              "A": -normal(H, seed=7).exp(), "B": normal(b, t, G, N, seed=seed + 2),
              "C": normal(b, t, G, N, seed=seed + 3)}
    return inputs | ({"D": normal(H, seed=8), "z": normal(b, t, H, P, seed=seed + 4), "dt_bias": normal(H, seed=9)}
                     if full else {})


def pool(rows: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(rows, H, P, N, seed=20).to(dtype)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("t", [1, 2, 5])
def test_an_update_is_the_recurrence_in_place(t: int, full: bool, backend: str) -> None:
    inputs, state = given(t, full=full), pool()
    expected, final = ssd_recurrence(**inputs, dt_softplus=True, initial_state=state[:4])
    rest = state[4:].clone()
    with use_backend(backend):
        y = ssd_update(state, **inputs, dt_softplus=True)
    close(y, expected)
    close(state[:4], final)
    assert torch.equal(state[4:], rest)


def test_one_token_is_a_step() -> None:
    inputs, state = given(1), pool()
    token = {name: v[:, 0] if v.dim() > 1 else v for name, v in inputs.items()}
    expected, final = ssd_step(**token, initial_state=state[:4])
    close(ssd_update(state, **inputs)[:, 0], expected)
    close(state[:4], final)


@pytest.mark.parametrize("t", [1, 3])
def test_slots_choose_the_states_and_padding_touches_nothing(t: int) -> None:
    inputs, state = given(t), pool()
    before = state.clone()
    expected, final = ssd_recurrence(**inputs, initial_state=before[SLOTS])
    y = ssd_update(state, **inputs, slots=SLOTS)
    close(y[LIVE], expected[LIVE])
    assert (y[~LIVE] == 0).all()
    close(state[SLOTS[LIVE]], final[LIVE])
    untouched = [row for row in range(8) if row not in SLOTS]
    assert torch.equal(state[untouched], before[untouched])


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    state = pool()
    before = state.clone()
    assert (ssd_update(state, **given(1), slots=torch.full((4,), -1)) == 0).all()
    assert torch.equal(state, before)


def test_strided_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"slots\.contiguous"):
        ssd_update(pool(), **given(1), slots=torch.stack([SLOTS, SLOTS], 1)[:, 0])


def test_a_layer_of_a_wider_pool_can_be_updated_in_place() -> None:
    states = normal(8, 3, H, P, N, seed=1)
    before, inputs = states.clone(), given(2)
    _, final = ssd_recurrence(**inputs, initial_state=before[SLOTS.clamp(min=0), 1])
    ssd_update(states[:, 1], **inputs, slots=SLOTS)
    close(states[SLOTS[LIVE], 1], final[LIVE])
    assert torch.equal(states[:, [0, 2]], before[:, [0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_state_is_rounded_once(dtype: torch.dtype) -> None:
    inputs = {name: v.float() for name, v in given(3).items()}
    state = pool(dtype=dtype)
    expected, final = ssd_recurrence(**inputs, initial_state=state[:4])
    close(ssd_update(state, **inputs), expected, 1e-5)
    torch.testing.assert_close(state[:4], final.to(dtype), rtol=1e-2, atol=1e-5)
    assert (state[:4] == final.to(dtype)).double().mean() > 0.99  # the last bit of float32 may tip a tie


def held_between(length: int, tokens: list[int]) -> tuple[Tensor, Replay, list[Tensor], list[Tensor]]:
    """A pool and its replay after calls of so many tokens; the outputs with and without replay."""
    state = pool()
    plain, replay = state.clone(), make_replay(state, G, torch.float64, length)
    found, expected = [], []
    for call, t in enumerate(tokens):
        inputs = given(t, seed=100 * call)
        slots = SLOTS if call % 3 else SLOTS.flip(0)
        found.append(ssd_update(state, **inputs, dt_softplus=True, slots=slots, replay=replay))
        expected.append(ssd_update(plain, **inputs, dt_softplus=True, slots=slots))
    flush_replay(state, given(1)["A"], replay)
    close(state, plain)
    return state, replay, found, expected


@pytest.mark.parametrize(("length", "tokens"), [(4, [1] * 13), (4, [3, 2, 4, 1, 1, 4]), (1, [1] * 3), (5, [5, 5])])
def test_replayed_outputs_are_the_plain_ones(length: int, tokens: list[int]) -> None:
    _, replay, found, expected = held_between(length, tokens)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert (replay.cursor == 0).all()


def test_a_replayed_state_is_written_only_when_there_is_no_room() -> None:
    state = pool()
    replay = make_replay(state, G, torch.float64, 4)
    written = []
    for call in range(10):
        before = state.clone()
        ssd_update(state, **given(1, seed=call), slots=SLOTS, replay=replay)
        written.append(not torch.equal(state, before))
    assert written == [call in (4, 8) for call in range(10)]
    assert replay.cursor[SLOTS[LIVE]].tolist() == [[1, 2]] * 3
    assert (replay.cursor[[1, 2, 4, 5, 7]] == 0).all()


def test_what_is_not_buffered_is_never_read() -> None:
    state = pool()
    plain, replay = state.clone(), make_replay(state, G, torch.float64, 4)
    for buffer in (replay.x, replay.dt, replay.B):
        buffer.fill_(torch.nan)
    for call in range(6):
        inputs = given(1, seed=call)
        close(ssd_update(state, **inputs, replay=replay), ssd_update(plain, **inputs))


def test_slots_have_cursors_of_their_own() -> None:
    state = pool()
    plain, replay = state.clone(), make_replay(state, G, torch.float64, 3)
    for call in range(9):
        inputs = given(1, seed=call)
        slots = torch.where(torch.arange(4) <= call % 4, torch.arange(4), -1)
        close(ssd_update(state, **inputs, slots=slots, replay=replay), ssd_update(plain, **inputs, slots=slots))
    assert len(set(replay.cursor[:4, 1].tolist())) > 1
    flush_replay(state, inputs["A"], replay, slots=torch.tensor([2, -1]))
    close(state[2], plain[2])
    assert replay.cursor[2].tolist() == [0, 0]
    assert (replay.cursor[[0, 3]] != 0).any()


def test_tokens_of_the_last_call_can_be_taken_back() -> None:
    state = pool()
    plain, replay = state.clone(), make_replay(state, G, torch.float64, 4)
    for call in range(5):
        inputs = given(3, seed=call)
        ssd_update(state, **inputs, replay=replay)
        replay.cursor[:, 1] -= 2
        kept = {name: v[:, :1] if v.dim() > 1 else v for name, v in inputs.items()}
        ssd_update(plain, **kept)
    inputs = given(1, seed=50)
    close(ssd_update(state, **inputs, replay=replay), ssd_update(plain, **inputs))


def test_a_strong_decay_costs_its_neighbours_in_the_buffer_no_precision() -> None:
    state = pool(dtype=torch.float32)
    plain, replay = state.clone(), make_replay(state, G, torch.float32, 8)
    for call in range(6):
        inputs = {name: v.float() for name, v in given(1, full=False, seed=call).items()}
        inputs["dt"] = torch.full_like(inputs["dt"], 1e6 if call == 2 else 1e-3)
        inputs["x"] = inputs["x"] * (1e-6 if call == 2 else 1)
        close(ssd_update(state, **inputs, replay=replay), ssd_update(plain, **inputs), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("t", "w"), [(1, 4), (2, 4), (7, 4), (1, 2), (3, 1)])
def test_a_convolution_goes_on_where_its_state_ends(t: int, w: int, activation: str | None, backend: str) -> None:
    x, weight, bias = normal(4, t, 6, seed=0), normal(6, w, seed=1), normal(6, seed=2)
    state = normal(8, 6, w - 1, seed=3)
    before = state.clone()
    expected, final = causal_conv_reference(x, weight, bias, activation=activation,
                                            initial_state=before[SLOTS.clamp(min=0)])
    with use_backend(backend):
        y = conv_update(state, x, weight, bias, activation=activation, slots=SLOTS)
    close(y[LIVE], expected[LIVE])
    assert (y[~LIVE] == 0).all()
    close(state[SLOTS[LIVE]], final[LIVE])
    untouched = [row for row in range(8) if row not in SLOTS]
    assert torch.equal(state[untouched], before[untouched])


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_mixer_is_its_convolution_and_its_ssd(biased: bool, replayed: bool) -> None:
    sizes = [H * P, G * N, G * N]
    weights = tuple(normal(ch, 4, seed=i) for i, ch in enumerate(sizes))
    biases = tuple(normal(ch, seed=5 + i) for i, ch in enumerate(sizes)) if biased else None
    state, conv_state = pool(), normal(8, sum(sizes), 3, seed=30)
    other, other_conv = state.clone(), conv_state.clone()
    replay = make_replay(state, G, torch.float64, 2) if replayed else None
    for call in range(4):
        packed = normal(4, 2, sum(sizes), seed=40 + call)
        x, B, C = packed.split(sizes, -1)
        rest = {name: v for name, v in given(2, seed=call).items() if name not in ("x", "B", "C", "dt", "A")}
        dt, A = given(2, seed=call)["dt"], given(2)["A"]
        y = mamba2_update(state, conv_state, x, dt, A, B, C, weights, biases, slots=SLOTS, replay=replay, **rest)
        mixed = conv_update(other_conv, packed, torch.cat(weights), None if biases is None else torch.cat(biases),
                            activation="silu", slots=SLOTS)
        x, B, C = (v.unflatten(-1, (-1, size)) for v, size in zip(mixed.split(sizes, -1), (P, N, N), strict=True))
        close(y, ssd_update(other, x, dt, A, B, C, slots=SLOTS, **rest))
    assert torch.equal(conv_state, other_conv)
    if replay is not None:
        flush_replay(state, A, replay)
    close(state, other)


@pytest.mark.parametrize(("changed", "message"), [
    ({"dt": torch.zeros(4, 1, 3)}, "dt has shape"), ({"A": torch.zeros(3)}, "A has shape"),
    ({"B": torch.zeros(4, 1, 3, N), "C": torch.zeros(4, 1, 3, N)}, "3 groups"),
    ({"z": torch.zeros(4, 1, H, 1)}, "z has shape"), ({"x": torch.zeros(4, H, P)}, "x has shape"),
    ({"state": torch.zeros(3, H, P, N)}, "3 rows for a batch of 4"), ({"state": torch.zeros(4, H, N, P)}, "state has"),
    ({"state": torch.zeros(4, H, N, P).transpose(2, 3)}, "must be contiguous"),
    ({"state": torch.zeros(4, H, P, N, dtype=torch.float64)}, "float64 beside float64"),
    ({"slots": torch.arange(4, dtype=torch.int32)}, "must be torch.int64"), ({"slots": torch.arange(3)}, "slots are"),
    ({"seed": 1}, "a seed is for stochastic rounding"),
    ({"state": torch.zeros(4, H, P, N, dtype=torch.float16), "seed": torch.zeros(2)}, "one of torch.int64"),
    ({"replay": make_replay(pool(4), 1, torch.float32)}, "replay.B has shape"),
    ({"replay": make_replay(pool(4), G, torch.bfloat16)}, "replay keeps"),
    ({"replay": make_replay(pool(4), G, torch.float32)._replace(cursor=torch.zeros(4, 2))}, "replay keeps"),
])
def test_arguments_that_do_not_fit_are_refused(changed: dict[str, object], message: str) -> None:
    inputs = {name: v.float() for name, v in given(1).items()} | {"state": pool(4, torch.float32)} | changed
    with pytest.raises(ValueError, match=message):
        ssd_update(**inputs)


def test_more_tokens_than_a_replay_holds_are_refused() -> None:
    state = pool(4)
    with pytest.raises(ValueError, match="at most 2"):
        ssd_update(state, **given(3), replay=make_replay(state, G, torch.float64, 2))


@pytest.mark.parametrize(("changed", "message"), [
    ({"weight": torch.zeros(5, 4)}, "weight has shape"), ({"bias": torch.zeros(5)}, "bias has shape"),
    ({"state": torch.zeros(4, 6, 4)}, "state has shape"), ({"activation": "relu"}, "must be 'silu' or None"),
    ({"state": torch.zeros(3, 6, 3)}, "3 rows"),
])
def test_a_convolution_that_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    inputs = {"state": torch.zeros(4, 6, 3), "x": torch.zeros(4, 1, 6), "weight": torch.zeros(6, 4)} | changed
    with pytest.raises(ValueError, match=message):
        conv_update(**inputs)


def test_parts_of_different_dtypes_or_widths_are_refused() -> None:
    state, conv = pool(4, torch.float32), torch.zeros(4, H * P + 2 * G * N, 3)
    parts = [torch.zeros(4, 1, ch) for ch in (H * P, G * N, G * N)]
    weights = tuple(torch.zeros(part.shape[-1], 4) for part in parts)
    for wrong in (parts[1].half(), parts[1][..., :N], torch.zeros(4, 1, G * N + 1)):
        with pytest.raises(ValueError, match="all one dtype"):
            mamba2_update(state, conv, parts[0], torch.zeros(4, 1, H), torch.zeros(H), wrong, parts[2], weights)


@pytest.mark.parametrize("run", [lambda w: ssd_update(pool(), **given(1) | {"A": w[:, 0]}),
                                 lambda w: conv_update(torch.zeros(4, 4, 3, dtype=w.dtype), w[:, None].detach(), w)])
def test_gradients_are_refused(run: Callable[[Tensor], Tensor]) -> None:
    weight = normal(4, 4, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        run(weight)
    with torch.no_grad():
        run(weight)
