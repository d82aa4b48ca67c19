"""What the selective scan's launches for Hopper GPUs are given, and what is made of their results: Gluon kernels run on
no interpreter, so plain loops and autograd stand in for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import selective_scan, selective_scan_recurrence, use_backend
from hinny.ops.kernels import launches, scan, scan_fast

LN_2 = 0.6931471805599453
USE = {"ENOUGH": 1, "EDGE_BYTES": 2 ** 30, "num_warps": 8}
PROCESSORS = 132


class Kernel:
    """Something that is launched like a kernel."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.run, grid[1])


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    first: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y before its gate, the final state (b n d), and the states before each 8 tokens."""
    y, _, edges = [], None, []
    for i in range(x.shape[1]):
        if i % 8 == 0:
            edges.append(state)
        step = F.softplus(dt[:, i] + (0 if bias is None else bias), threshold=1000)
        kept = (step[:, None] * A.t()).exp() * state
        if first is not None:
            kept = kept.masked_fill(first[:, i, None, None], 0)
        state = kept + (step * x[:, i])[:, None] * B[:, i, :, None]
        y.append((state * C[:, i, :, None]).sum(1) + (0 if D is None else D * x[:, i]))
    return torch.stack(y, 1), state, edges


def piece(begin: int, length: int, *tensors: Tensor | None) -> list[Any]:
    return [None if v is None else v[:, begin:begin + length] for v in tensors]


def double(*tensors: Tensor | None) -> list[Any]:
    return [None if v is None else v.double() for v in tensors]


def walk(
    b: int, x: Tensor, dt: Tensor, z: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, first: Tensor | None, starts: Tensor | None, dy: Tensor | None, y: Tensor | None,
    edges: Tensor | None, ends: Tensor | None, t: int, begin: int, length: int, d: int, *, n: int, **_: Any,
) -> None:
    assert x.shape == (b, t, d)
    assert x.is_contiguous()
    first, = piece(begin, length, first)
    cut = double(*piece(begin, length, x, dt, B, C, z, dy))
    state = torch.zeros(b, n, d, dtype=torch.float64) if starts is None else starts.double()
    out, final, states = recurrence(cut[0], cut[1], A.double(), cut[2], cut[3], *double(D), None, *double(bias), first,
                                    state)
    if y is not None and cut[4] is not None:
        gate = cut[4].requires_grad_()
        with torch.enable_grad():
            gated = F.silu(gate)
        out = out * gated if cut[5] is None else torch.autograd.grad(gated, gate, out * cut[5])[0]
    if y is not None:
        y[:, begin:begin + length] = out.detach()
    if edges is not None:
        edges[:b * len(states)] = torch.stack(states, 1).flatten(0, 1)
    if ends is not None:
        ends[:] = final


def back(
    b: int, x: Tensor, dt: Tensor, z: Tensor | None, rates: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, first: Tensor | None, dy: Tensor, edges: Tensor, starts: Tensor | None, dx: Tensor,
    ddt: Tensor, parts: Tensor, channel_parts: Tensor, ends: Tensor, t: int, begin: int, length: int, d: int, *, n: int,
    **_: Any,
) -> None:
    first, = piece(begin, length, first)
    px, pdt, pB, pC, pz, pdy = double(*piece(begin, length, x, dt, B, C, z, dy))
    state = edges[:b * -(-length // 8)].view(b, -1, n, d)[:, 0].double()
    # one A, D and bias a row: what a program leaves of their gradients
    A, D, bias = ((torch.zeros(d) if v is None else v).double().expand(b, *shape).clone() for v, shape in (
        (rates.t() * LN_2, (d, n)), (D, (d,)), (bias, (d,))))
    leaves = [v.requires_grad_() for v in (px, pdt, pB, pC, A, D, bias, state)]
    with torch.enable_grad():
        rows = [recurrence(*(v[i:i + 1] for v in leaves[:2]), A[i], *(v[i:i + 1] for v in leaves[2:4]), D[i], None,
                           bias[i], None if first is None else first[i:i + 1], state[i:i + 1])[:2] for i in range(b)]
        y, final = (torch.cat(v) for v in zip(*rows, strict=True))
        total = (y * pdy * (1 if pz is None else F.silu(pz))).sum()
        if starts is not None:
            total = total + (final * starts.double()).sum()
    gx, gdt, gB, gC, gA, gD, gbias, gstate = torch.autograd.grad(total, leaves)
    dx[:, begin:begin + length], ddt[:, begin:begin + length], ends[:] = gx, gdt, gstate
    parts[:] = 0
    parts[-1] = torch.stack([gB, gC]).view(2, -1)
    channel_parts[:] = torch.cat([gA.transpose(1, 2).flip(1), gD[:, None], gbias[:, None]], 1)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launches of an H100, and of these stand-ins."""
    launches.forget()
    monkeypatch.setattr(launches, "generation", lambda device: "sm90")
    monkeypatch.setattr(scan_fast, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(scan_fast, "takes", lambda *_: True)
    monkeypatch.setattr(scan_fast, "scan_fast_walk", Kernel(walk))
    monkeypatch.setattr(scan_fast, "scan_fast_gradients", Kernel(back))
    yield
    launches._known.clear()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(run: Callable, inputs: dict[str, Tensor]) -> list[Tensor]:
    inputs = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()}
    outputs = list(run(**inputs, dt_softplus=True))
    total = sum((o * normal(*o.shape, seed=900 + i).to(o.dtype)).sum() for i, o in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(total, list(inputs.values()))]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("tokens", "warps"), [(64, 8), (2 ** 20, 8), (64, 4)])
def test_pieces_of_rows_and_tokens_give_every_gradient(
    full: bool, tokens: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five rows two at a time, 70 tokens as 32, 32 and 6, or all at once."""
    monkeypatch.setattr(scan_fast, "processors", lambda device: 5)  # a row has two programs, or three of half as many
    b, t, d, n = 5, 70, 80, 5
    inputs = {"x": normal(b, t, d, seed=0), "dt": normal(b, t, d, seed=1), "A": -normal(d, n, seed=2).exp(),
              "B": normal(b, t, n, seed=3), "C": normal(b, t, n, seed=4)}
    segments = None
    if full:
        inputs |= {"D": normal(d, seed=5), "z": normal(b, t, d, seed=6), "dt_bias": normal(d, seed=7),
                   "initial_state": normal(b, d, n, seed=8)}
        segments = (torch.arange(t) // 29).expand(b, t)
    expected = results(partial(selective_scan_recurrence, segments=segments), inputs)
    use = USE | {"EDGE_BYTES": tokens * n * d // 2, "num_warps": warps}
    single = {name: v.float() for name, v in inputs.items()}
    with launches.trial({"scan_fast_gradients": use}) as seen, use_backend("triton"):
        found = results(partial(selective_scan, segments=segments), single)
        kept = [scan._results(single["x"], single["dt"], single["A"], single["B"], single["C"], *[None] * 5, True),
                scan._forward(single["x"], single["dt"], single["A"], single["B"], single["C"], *[None] * 5, True)]
    assert {"scan_fast_walk", "scan_fast_gradients"} <= {kernel for kernel, _ in seen}
    for a, right in zip(found, expected, strict=True):
        assert (a.double() - right).norm() <= 2e-6 * right.norm()
    assert len(kept[1][2]) == (2 if tokens == 64 else 0)
    assert [v.shape for v in kept[0]] == [v.shape for v in kept[1]]


@given(b=st.integers(1, 300), t=st.integers(1, 2 ** 20), d=st.integers(4, 1024).map(lambda k: 16 * k),
       n=st.integers(33, 128))
def test_pieces_hold_every_token_once_and_their_states_fit(b: int, t: int, d: int, n: int) -> None:
    call = scan_fast.FastCall.of(torch.empty(b, t, d, device="meta", dtype=torch.bfloat16), n)
    pieces = list(call.pieces()) if call.b * call.between < 5000 else []
    for found in pieces:
        assert found.begin % 8 == 0
        assert found.edges * n * d * 4 <= max(2 ** 30, 4 * 32 * n * d // 8) + 4 * n * d * found.b
    rows = {found.rows.start: found.b for found in pieces}
    assert not pieces or sum(rows.values()) == b
    for row in rows:
        own = [found for found in pieces if found.rows.start == row]
        assert [found.number for found in own] == list(range(call.between, -1, -1))
        assert all(later.begin == found.begin + found.length for later, found in pairwise(own))
        assert own[0].begin + own[0].length == t
        assert own[-1].begin == 0


def rounds(launched: list[int], groups: int) -> int:
    """Of an H100, for launches of so many rows."""
    return sum(math.ceil(rows * groups / PROCESSORS) for rows in launched)


@pytest.mark.parametrize(("b", "t", "d", "n", "launched", "taken"), [
    (16, 1536, 2048, 128, [4] * 4, 4),  # in place of 5, 5, 5 and 1: seven rounds
    (16, 2048, 1536, 96, [4] * 4, 4),  # in place of 7, 7 and 2: five
    (32, 1024, 1536, 96, [11, 11, 10], 6),  # in place of 14, 14 and 4: seven
    (32, 1024, 1568, 128, [9, 9, 9, 5], 7),  # as few as 10, 10, 10 and 2 or seven launches take
    (32, 1024, 1024, 128, [16, 16], 4),
    (6, 8192, 1568, 128, [3, 3], 2),  # less memory than 5 and 1 take
    (2, 4096, 64, 128, [2], 1),
    (3, 64, 16384, 128, [3], 6),
])
def test_launches_take_the_fewest_rounds_of_a_gpu(
    b: int, t: int, d: int, n: int, launched: list[int], taken: int
) -> None:
    call = scan_fast.FastCall.of(torch.empty(b, t, d, device="meta", dtype=torch.bfloat16), n)
    found = {piece.rows.start: piece.b for piece in call.pieces()}
    assert list(found.values()) == launched
    assert rounds(launched, math.ceil(d / 64)) == taken


@pytest.mark.parametrize(("warps", "launched"), [(8, [17, 15]), (4, [16, 16])])
def test_programs_of_half_as_many_warps_are_twice_as_many_at_a_time(warps: int, launched: list[int]) -> None:
    """With room for 21 rows: 425 and 375 programs of 132 at a time are 7 rounds, 784 and 784 of 264 are 6."""
    use = USE | {"EDGE_BYTES": 2 ** 31, "num_warps": warps}
    with launches.trial({"scan_fast_gradients": use}):
        call = scan_fast.FastCall.of(torch.empty(32, 1024, 1568, device="meta", dtype=torch.bfloat16), 128)
    assert [piece.b for piece in call.pieces()] == launched


@given(b=st.integers(1, 70), groups=st.integers(1, 300), most=st.integers(1, 80))
def test_no_other_number_of_rows_takes_fewer_rounds_or_as_many_with_fewer_launches(
    b: int, groups: int, most: int
) -> None:
    def launched(rows: int) -> list[int]:
        return [min(rows, b - first) for first in range(0, b, rows)]

    chosen = scan_fast.fewest_rounds(b, groups, PROCESSORS, most)
    assert 1 <= chosen <= min(b, most)
    best = launched(chosen)
    for rows in range(1, min(b, most) + 1):
        other = launched(rows)
        assert (rounds(best, groups), len(best)) <= (rounds(other, groups), len(other))
        if (rounds(best, groups), len(best)) == (rounds(other, groups), len(other)):
            assert chosen <= rows
