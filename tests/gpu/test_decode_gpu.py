"""Decoding kernels on a GPU: against the torch form in float64, at most 1.5 times as far off as that in few bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import Replay, conv_update, flush_replay, make_replay, mamba2_update, ssd_update, use_backend
from hinny.ops.rounding import round_stochastically

pytestmark = pytest.mark.gpu
ROWS = 12
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
fast = settings(max_examples=6, deadline=None, database=None, derandomize=True)


def normal(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def tokens(b: int, t: int, h: int, p: int, g: int, n: int, dtype: torch.dtype, full: bool,
           seed: int) -> dict[str, Tensor]:
    inputs = {"x": normal(b, t, h, p, seed=seed, dtype=dtype), "dt": normal(b, t, h, seed=seed + 1, dtype=dtype) - 2,
              "A": -normal(h, seed=7).exp(), "B": normal(b, t, g, n, seed=seed + 2, dtype=dtype),
              "C": normal(b, t, g, n, seed=seed + 3, dtype=dtype), "D": normal(h, seed=8), "dt_bias": normal(h, seed=9)}
    return inputs | ({"z": normal(b, t, h, p, seed=seed + 4, dtype=dtype)} if full else {})


def some_slots(b: int, seed: int, padding: bool) -> Tensor:
    slots = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:b]
    if padding:
        slots[seed % b] = -1
    return slots.cuda()


def in_double(value: object) -> object:
    if isinstance(value, Replay):
        return Replay(value.x.double(), value.dt.double(), value.B.double(), value.cursor.clone())
    if isinstance(value, (tuple, list)):
        return tuple(map(in_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def copied(value: object) -> object:
    if isinstance(value, Replay):
        return Replay(*(v.clone() for v in value))
    return value.clone() if isinstance(value, Tensor) else value


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check(op: Callable[..., Tensor], changed: tuple[str, ...], inputs: dict[str, object]) -> dict[str, object]:
    """Runs `op` in float64, in torch and by its kernel (twice), and compares outputs and what it changes in place."""
    exact_inputs = {name: in_double(v) for name, v in inputs.items()}
    exact = op(**exact_inputs)
    torch_inputs = {name: copied(v) if name in changed else v for name, v in inputs.items()}
    with use_backend("torch"):
        torch_y = op(**torch_inputs)
    results = []
    for _ in range(2):
        mine = {name: copied(v) if name in changed else v for name, v in inputs.items()}
        with use_backend("triton"):
            results.append((op(**mine), mine))
    (y, mine), (again, other) = results
    assert torch.equal(y, again)
    assert y.isfinite().all()
    assert error(y, exact) <= 1.5 * error(torch_y, exact) + 1e-6
    for name in changed:
        found, right, near, same = (v[name] for v in (mine, exact_inputs, torch_inputs, other))
        if isinstance(found, Tensor):
            assert torch.equal(found, same)
            assert error(found, right) <= 1.5 * error(near, right) + 1e-6, name
    return mine


@pytest.mark.parametrize(("h", "p", "g", "n", "dtype", "state_dtype", "full", "lengths"), [
    (8, 64, 2, 128, BF16, FP32, False, [1, 2, 5]), (8, 64, 2, 128, BF16, BF16, True, [1, 3]),
    (6, 32, 3, 64, FP16, FP16, False, [1]), (3, 40, 1, 20, FP32, FP32, True, [1, 4]),
    (4, 128, 1, 256, BF16, BF16, False, [1])])
def test_an_update(h: int, p: int, g: int, n: int, dtype: torch.dtype, state_dtype: torch.dtype, full: bool,
                   lengths: list[int]) -> None:
    @fast
    @given(b=st.integers(1, 9), t=st.sampled_from(lengths), seed=st.integers(0, 99), padding=st.booleans())
    def run(b: int, t: int, seed: int, padding: bool) -> None:
        state = normal(ROWS, h, p, n, seed=seed, dtype=state_dtype)
        slots = some_slots(b, seed, padding)
        after = check(ssd_update, ("state",), tokens(b, t, h, p, g, n, dtype, full, seed) | {
            "state": state, "dt_softplus": True, "slots": slots})
        untouched = [row for row in range(ROWS) if row not in slots.tolist()]
        assert torch.equal(after["state"][untouched], state[untouched])

    run()


@pytest.mark.parametrize("step", [-15.0, 0.0, 25.0])
def test_extreme_steps_and_decays(step: float) -> None:
    inputs = tokens(5, 1, 8, 64, 2, 128, BF16, False, 3)
    inputs["dt"] = torch.full_like(inputs["dt"], step)
    inputs["A"] = -torch.logspace(-6, 4, 8, device="cuda")
    check(ssd_update, ("state",), inputs | {"state": normal(5, 8, 64, 128, seed=1), "dt_softplus": True})


@pytest.mark.parametrize(("state_dtype", "dtype", "n", "full", "lengths"), [
    (FP32, BF16, 128, False, [1] * 8 + [3, 2, 6, 1, 4, 1]), (BF16, BF16, 128, True, [1] * 14),
    (FP32, FP32, 48, False, [1] * 14)])
def test_replayed_updates_follow_the_plain_ones(state_dtype: torch.dtype, dtype: torch.dtype, n: int, full: bool,
                                                lengths: list[int]) -> None:
    h, p, g, length = 8, 64, 2, 6
    state = normal(ROWS, h, p, n, seed=1, dtype=state_dtype)
    exact, near = state.double(), state.clone()
    replay, near_replay = (make_replay(state, g, dtype, length) for _ in range(2))
    for buffer in replay[:3]:
        buffer.fill_(torch.nan)
    outputs: dict[str, list[Tensor]] = {"exact": [], "near": [], "mine": []}
    for call, t in enumerate(lengths):
        inputs = tokens(7, t, h, p, g, n, dtype, full, 50 * call) | {
            "dt_softplus": True, "slots": some_slots(7, call, padding=call % 2 == 1)}
        outputs["exact"].append(ssd_update(exact, **{name: in_double(v) for name, v in inputs.items()}).flatten())
        with use_backend("torch"):
            outputs["near"].append(ssd_update(near, **inputs, replay=near_replay).flatten())
        with use_backend("triton"):
            outputs["mine"].append(ssd_update(state, **inputs, replay=replay).flatten())
        assert torch.equal(replay.cursor, near_replay.cursor)
    exact_y, near_y, y = (torch.cat(outputs[name]) for name in ("exact", "near", "mine"))
    assert error(y, exact_y) <= 1.5 * error(near_y, exact_y) + 1e-6
    flush_replay(state, inputs["A"], replay)
    flush_replay(near, inputs["A"], near_replay)
    assert error(state, exact) <= 1.5 * error(near, exact) + 1e-6


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("replayed", [False, True])
def test_random_bits_are_those_of_the_definition_and_unbiased(dtype: torch.dtype, replayed: bool) -> None:
    """A state of zero, steps and B of one, no decay: what is rounded is x, to the bit."""
    b, h, p, n = 64, 8, 64, 128
    x = normal(b, 1, h, p, seed=1) * torch.logspace(-7, 2, h, device="cuda")[:, None]
    ones, seed = torch.ones(b, 1, 1, n, device="cuda"), torch.tensor(2 ** 35 + 3, device="cuda")
    state = torch.zeros(b, h, p, n, dtype=dtype, device="cuda")
    replay = make_replay(state, 1, FP32, 1) if replayed else None
    for value in (x, torch.zeros_like(x)) if replayed else (x,):
        ssd_update(state, value, ones[..., :h].squeeze(2), torch.zeros(h, device="cuda"), ones, ones, seed=seed,
                   replay=replay)
    values = x[:, 0, :, :, None].expand_as(state)
    expected = round_stochastically(values, dtype, seed, torch.arange(b, device="cuda"))
    assert torch.equal(state.view(torch.int16), expected.view(torch.int16))
    assert (state[0] != state[0, :, :, :1]).any(), "no two of equal values went apart"
    errors = state.double() - values.double()
    for head in range(h):
        spread = float(errors[:, head].std())
        # noise has 16 bits: a subnormal's mean is right to 2^-17 of its unit
        assert abs(float(errors[:, head].mean())) < 5 * spread / (b * p * n) ** 0.5 + 2.0 ** -41


@pytest.mark.parametrize(("ch", "w", "dtype", "state_dtype", "biased"), [
    (640, 4, BF16, FP32, True), (300, 4, FP32, FP32, False), (64, 2, FP16, FP16, True)])
def test_a_convolution(ch: int, w: int, dtype: torch.dtype, state_dtype: torch.dtype, biased: bool) -> None:
    @fast
    @given(b=st.integers(1, 9), t=st.sampled_from([1, 1, 2, 7]), seed=st.integers(0, 99))
    def run(b: int, t: int, seed: int) -> None:
        wide = normal(b, t, 2 * ch, seed=seed, dtype=dtype)
        check(conv_update, ("state",), {
            "state": normal(ROWS, ch, w - 1, seed=seed, dtype=state_dtype), "x": wide[..., ch // 2:ch // 2 + ch],
            "weight": normal(ch, w, seed=2), "bias": normal(ch, seed=3) if biased else None, "activation": "silu",
            "slots": some_slots(b, seed, padding=seed % 2 == 0)})

    run()


def mixer(b: int, t: int, h: int, g: int, dtype: torch.dtype, state_dtype: torch.dtype, rows: int) -> dict[str, object]:
    """Arguments of mamba2_update of the 8B layer's head and state sizes, x, B and C out of one row."""
    p, n = 64, 128
    sizes = [h * p, g * n, g * n]
    x, B, C = normal(b, t, sum(sizes), seed=5, dtype=dtype).split(sizes, -1)
    inputs = tokens(b, t, h, p, g, n, dtype, False, 6)
    return {"state": normal(rows, h, p, n, seed=1, dtype=state_dtype),
            "conv_state": normal(rows, sum(sizes), 3, seed=2), "x": x, "B": B, "C": C,
            "weights": tuple(normal(ch, 4, seed=i) for i, ch in enumerate(sizes)),
            "biases": tuple(normal(ch, seed=3 + i) for i, ch in enumerate(sizes)), "dt_softplus": True} | {
                name: inputs[name] for name in ("dt", "A", "D", "dt_bias")}


@pytest.mark.parametrize(("t", "replayed"), [(1, True), (3, False)])
def test_a_mixer(t: int, replayed: bool) -> None:
    inputs = mixer(5, t, 8, 2, BF16, FP32, ROWS) | {"slots": some_slots(5, 1, padding=True)}
    if replayed:
        inputs["replay"] = make_replay(inputs["state"], 2, BF16, 4)
    check(mamba2_update, ("state", "conv_state", "replay")[:2 + replayed], inputs)


@pytest.mark.parametrize("replayed", [False, True])
def test_launches_that_overlap_equal_launches_in_a_row(monkeypatch: pytest.MonkeyPatch, replayed: bool) -> None:
    """A graph of 24 steps on a large batch, replayed three times: a read before its time would show."""
    from hinny.ops.kernels import decode_conv

    # filling new memory would put a launch between the two
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    results = []
    for overlap in (False, True):
        monkeypatch.setattr(decode_conv, "overlaps", lambda device, overlap=overlap: overlap)
        inputs = mixer(48, 1, 128, 8, BF16, FP32, 48)
        if replayed:
            inputs["replay"] = make_replay(inputs["state"], 8, BF16, 5)
        if overlap and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")
        with use_backend("triton"):
            mamba2_update(**inputs)
            graph, outputs = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph):
                for _ in range(24):
                    outputs.append(mamba2_update(**inputs))
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        results.append([inputs["state"], inputs["conv_state"], torch.stack(outputs)])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert error(other, one.double()) < 1e-5


@pytest.mark.parametrize("replayed", [False, True])
def test_pools_beyond_2_31_elements(replayed: bool) -> None:
    rows, (h, p, g, n) = 2 ** 21 + 1000, (1, 64, 1, 16)
    state = torch.empty(rows, h, p, n, dtype=FP16, device="cuda")
    slots = torch.tensor([rows - 1, 0, rows // 2, 2 ** 21 + 3], device="cuda")
    state[slots] = normal(4, h, p, n, seed=1, dtype=FP16)
    small, few = state[slots], torch.arange(4, device="cuda")
    replay = small_replay = None
    if replayed:
        replay, small_replay = make_replay(state, g, BF16, 16), make_replay(small, g, BF16, 16)
    for call in range(18):
        inputs = tokens(4, 1, h, p, g, n, BF16, False, 10 * call)
        y = ssd_update(state, **inputs, dt_softplus=True, slots=slots, replay=replay)
        assert torch.equal(y, ssd_update(small, **inputs, dt_softplus=True, slots=few, replay=small_replay))
    assert torch.equal(state[slots], small)
