"""Launches of the selective scan's Gluon kernels for Hopper GPUs, behind `scan.py`: bfloat16, 33 to 128 states.

    forward     scan_fast_walk: y and the final state; where the backward will take a sequence in pieces, also the
                states between pieces
    backward    of each piece, the last first: scan_fast_walk again for the states before each 8 tokens, and dz;
                scan_fast_gradients for all else, from these and from the gradient that the piece behind it left

States before each 8 tokens take n/2 bytes a token and channel: a piece is as many rows as keep the GPU full, of as many
tokens as EDGE_BYTES hold. A multiprocessor has WARPS of scan_fast_gradients at a time, and all take as long: a round of
a few takes as long as a full one, so rows are shared out to launches for the fewest rounds (`fewest_rounds`).
A program walks a whole piece by itself, so few sequences of few channels are left to the kernels that walk spans at
once. Steps, decays and resets between documents are those of `scan_walks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.hopper import runs_on
from hinny.ops.kernels.launches import find, launch, rules
from hinny.ops.kernels.scan_call import PREPARED, contiguous, in_float32, whole
from hinny.ops.kernels.scan_fast_gradients import WARP_CHANNELS, scan_fast_gradients
from hinny.ops.kernels.scan_fast_walk import BLOCK, scan_fast_walk
from hinny.ops.kernels.scan_walks import scan_prepare
from hinny.ops.kernels.sums import sum_into
from hinny.ops.kernels.waves import processors

STATES = (33, 128)
"""The fewest and the most: tiles have 64 or 128 states, which fill a lane's registers."""
ALIGNED = 16
"""What d is a multiple of: with loads of single numbers there are more addresses, and registers spill."""
WARPS = 8
"""Of scan_fast_gradients, whose registers a multiprocessor holds: one program, or two of half as many."""
WALKED = 32
"""Tokens that a walk loads at once: a piece has whole ones."""


def takes(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> bool:
    """Whether these kernels compute this, with at least ENOUGH programs; `scan.py` has kernels for all of it."""
    b, _, d = x.shape
    if not (STATES[0] <= B.shape[2] <= STATES[1] and d % ALIGNED == 0 and x.is_cuda and runs_on(x.device)):
        return False
    if any(v is not None and v.dtype is not torch.bfloat16 for v in (x, dt, B, C, z)):
        return False
    return bool(b * triton.cdiv(d, WARPS * WARP_CHANNELS) >= launch("scan_fast_gradients", x.device)["ENOUGH"])


class Piece(NamedTuple):
    """What the backward takes at once: `length` tokens from `begin` on of some rows of the batch."""

    rows: slice
    begin: int
    length: int
    number: int
    """Of the sequence's pieces."""

    @property
    def b(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def edges(self) -> int:
        return self.b * triton.cdiv(self.length, BLOCK)

    def of(self, v: Tensor) -> Tensor:
        return v[self.rows, self.begin:self.begin + self.length]


class FastCall(NamedTuple):
    """Sizes of a call, and of its pieces: rows and tokens."""

    b: int
    t: int
    d: int
    n: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, x: Tensor, n: int) -> FastCall:
        b, t, d = x.shape
        use = launch("scan_fast_gradients", x.device)
        room = use["EDGE_BYTES"] * 2 // (n * d)  # tokens: one's share of the states is n d / 8 float32
        warps = use["num_warps"]
        groups, slots = triton.cdiv(d, WARP_CHANNELS * warps), processors(x.device) * (WARPS // warps)
        rows = fewest_rounds(b, groups, slots, max(slots // groups, room // t, 1))
        return cls(b, t, d, n, rows, min(t, max(room // rows // WALKED, 1) * WALKED))

    @property
    def N(self) -> int:
        return max(triton.next_power_of_2(self.n), 64)

    @property
    def between(self) -> int:
        """How many states of a sequence are kept for the backward: one between each two pieces."""
        return triton.cdiv(self.t, self.tokens) - 1

    def pieces(self) -> Iterator[Piece]:
        """Of each group of rows the last tokens first."""
        for row in range(0, self.b, self.rows):
            for number in range(self.between, -1, -1):
                begin = number * self.tokens
                yield Piece(slice(row, min(row + self.rows, self.b)), begin, min(self.tokens, self.t - begin), number)

    def walk(self, b: int, begin: int, length: int, softplus: bool, device: torch.device, *args: Any) -> None:
        """Launches scan_fast_walk; args: its tensors."""
        edges = args[12]
        use = launch("scan_fast_walk", device, edges=int(edges is not None))
        warps = use["num_warps"]
        scan_fast_walk[triton.cdiv(self.d, 8 * warps), b](
            *args, self.t, begin, length, self.d, n=self.n, N=self.N, T=WALKED, W=warps, SOFTPLUS=softplus,
            num_warps=warps)

    def rates(self, A: Tensor) -> Tensor:
        """A's rates (n d)."""
        rates = A.new_empty(self.n, self.d, dtype=torch.float32)
        # no rows of B and C to be made wide: all programs have channels
        scan_prepare[triton.cdiv(self.d, PREPARED["BD"]),](
            A.contiguous(), rates, rates, rates, rates, self.t, whole(self.t, WALKED), self.d, 0, n=self.n, N=self.N,
            **PREPARED)
        return rates


@cache
def fewest_rounds(b: int, groups: int, slots: int, most: int) -> int:
    """How many of b rows a launch has, `most` at most: `groups` programs a row, of which `slots` run at a time.

    Of what takes the fewest rounds the fewest launches, and of these the fewest rows: they need the least memory.
    """
    def cost(rows: int) -> tuple[int, int, int]:
        full, rest = divmod(b, rows)
        rounds = full * triton.cdiv(rows * groups, slots) + triton.cdiv(rest * groups, slots)
        return rounds, triton.cdiv(b, rows), rows

    return min(range(1, min(b, most) + 1), key=cost)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, first_tokens: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t d), the final state (b n d), and the states between the pieces of the backward (s b n d)."""
    call = FastCall.of(x, B.shape[2])
    x, dt, z, A, B, C, D, dt_bias = contiguous(x, dt, z, A, B, C, D, dt_bias)
    state = in_float32(initial)
    y, final, entering = outputs(x, call.n)
    for number, begin in enumerate(range(0, call.t, call.tokens)):
        ends = entering[number] if number < call.between else final
        call.walk(call.b, begin, min(call.tokens, call.t - begin), softplus, x.device, x, dt, z, A, B, C, D, dt_bias,
                  first_tokens, state, None, y, None, ends)
        state = ends
    return y, final, entering


def outputs(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The forward's results, yet empty."""
    call = FastCall.of(x, n)
    shape = (call.b, n, call.d)
    return (torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(shape, dtype=torch.float32),
            x.new_empty(call.between, *shape, dtype=torch.float32))


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, first_tokens: Tensor | None, entering: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `scan_backward.backward`; entering (s b n d): the states between pieces."""
    call = FastCall.of(x, B.shape[2])
    dy, x, dt, z, A, B, C, D, dt_bias = contiguous(dy, x, dt, z, A, B, C, D, dt_bias)
    given, carried = in_float32(initial), in_float32(dfinal)
    n, d, rates, pieces = call.n, call.d, call.rates(A), list(call.pieces())
    dx, ddt, dB, dC = (torch.empty_like(v) for v in (x, dt, B, C))
    dz = x.new_empty(0) if z is None else torch.empty_like(z)
    weights, dbias = rates.new_empty(d, n + 1), rates.new_empty(d)
    # what reaches the state before a piece: of the first piece the gradient of the initial state
    passed = rates.new_empty(call.b, n, d)
    warps = launch("scan_fast_gradients", x.device)["num_warps"]
    groups = triton.cdiv(d, WARP_CHANNELS * warps)
    edges = rates.new_empty(max(piece.edges for piece in pieces), n, d)
    channel_sums = rates.new_empty(sum(piece.b for piece in pieces), n + 2, d)
    for piece, channel_parts in zip(pieces, channel_sums.split([piece.b for piece in pieces]), strict=True):
        px, pdt, pB, pC, pdy, pdx, pddt = (v[piece.rows] for v in (x, dt, B, C, dy, dx, ddt))
        pz, first, starts = (None if v is None else v[piece.rows] for v in (z, first_tokens, given))
        if piece.number:
            starts = entering[piece.number - 1, piece.rows]
        call.walk(piece.b, piece.begin, piece.length, softplus, x.device, px, pdt, pz, A, pB, pC, D, dt_bias, first,
                  starts, None if z is None else pdy, None if z is None else dz[piece.rows], edges, None)
        behind = carried if piece.number == call.between else passed
        parts = rates.new_empty(groups, 2, piece.b * piece.length * n)
        scan_fast_gradients[groups, piece.b](
            px, pdt, pz, rates, pB, pC, D, dt_bias, first, pdy, edges, None if behind is None else behind[piece.rows],
            pdx, pddt, parts, channel_parts, passed[piece.rows], call.t, piece.begin, piece.length, d, n=n, N=call.N,
            W=warps, SOFTPLUS=softplus, num_warps=warps)
        _sum_parts(parts, piece.of(dB), piece.of(dC))
    sum_into(channel_sums, weights, dbias)
    return dx, ddt, weights, dB, dC, dz, dbias, rates.new_empty(0) if initial is None else passed


def _sum_parts(parts: Tensor, dB: Tensor, dC: Tensor) -> None:
    """Fills dB and dC of a piece, parts of whole tensors, with the sums of parts (p 2 numbers)."""
    if dB.is_contiguous():
        sum_into(parts, dB.view(-1, 1), dC.view(-1))
        return
    found = dB.new_empty(2, *dB.shape)
    sum_into(parts, found[0].view(-1, 1), found[1].view(-1))
    dB.copy_(found[0])
    dC.copy_(found[1])


ABSENT: dict[Any, dict[str, tuple[str, ...]]] = {
    scan_fast_walk: {"forward": ("dy", "edges"), "plain": ("dy", "edges", "starts", "first_tokens"),
                     "edges": ("ends",), "edges-alone": ("z", "dy", "y", "ends")},
    scan_fast_gradients: {"all": (), "plain": ("first_tokens", "starts")}}
"""Kernel → what launches of it leave out."""
HALF = ("x", "dt", "z", "B", "C", "dy", "y", "dx", "ddt")
NUMBERS = ("t", "begin", "length", "d")


def compilations(table: str) -> list[Compilation]:
    """Both kernels as they are launched, for numbers of states at the ends of what each layout takes."""
    if scan_fast_walk.fn.__name__ not in rules(table):
        return []
    found = [_compilation(kernel, case, n, absent,
                          find(table, kernel.fn.__name__, edges=int("edges" not in absent))["num_warps"])
             for n in (64, 100, 128) for kernel, cases in ABSENT.items() for case, absent in cases.items()]
    # as `hinny tune` may choose it
    return [*found, _compilation(scan_fast_gradients, "all-half", 128, (), WARPS // 2)]


def _compilation(kernel: Any, case: str, n: int, absent: tuple[str, ...], warps: int) -> Compilation:
    given: dict[str, Any] = {"n": n, "N": max(triton.next_power_of_2(n), 64), "T": WALKED, "W": warps, "SOFTPLUS": True}
    constants = {parameter.name: given[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
    types = dict.fromkeys(HALF, "*bf16") | dict.fromkeys(NUMBERS, "i32") | {"first_tokens": "*i1"}
    signature = {parameter.name: types.get(parameter.name, "*fp32") for parameter in kernel.params
                 if not parameter.is_constexpr and parameter.name not in absent}
    aligned = (*(name for name, kind in signature.items() if kind.startswith("*")), "d")
    return Compilation(f"{kernel.fn.__name__}-n{n}-{case}", kernel, signature, constants | dict.fromkeys(absent),
                       warps, 1, aligned, targets=("sm90",))


def candidates() -> dict[str, list[dict[str, int]]]:
    """Gradients by one program a multiprocessor, or two; the walk's launch is part of its layout."""
    return {"scan_fast_gradients": [{"ENOUGH": 64, "EDGE_BYTES": 2 ** 30, "num_warps": warps}
                                    for warps in (WARPS, WARPS // 2)]}
