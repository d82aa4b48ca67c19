"""What a call of the selective scan's kernels is cut into, and the small launches that forward and backward share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hinny.ops.kernels.launches import launch
from hinny.ops.kernels.scan_gradients import CHUNK
from hinny.ops.kernels.scan_walks import LANES, scan_combine, scan_prepare

PREPARED = {"R": 64, "BD": 64, "num_warps": 4}
COMBINED = {"BD": 128, "num_warps": 4}
"""Launches of the two small kernels, which take no longer than a launch does."""


class Piece(NamedTuple):
    """Rows of the batch and tokens that the backward takes at once: whole sequences, or a part of one."""

    rows: slice
    tokens: slice

    @property
    def b(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def t(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.t, CHUNK)

    def of(self, v: Tensor | None) -> Tensor | None:
        """This piece of v (b t ...): one block of memory, like v."""
        return None if v is None else v[self.rows, self.tokens]


class Call(NamedTuple):
    """Sizes of a call; its spans of `span` tokens, walked at once if `split`; piece: tokens that the backward takes."""

    b: int
    t: int
    d: int
    n: int
    N: int
    padded: int
    spans: int
    span: int
    split: bool
    piece: int

    @classmethod
    def of(cls, x: Tensor, n: int) -> Call:
        b, t, d = x.shape
        walk, back = launch("scan_walk", x.device, n=n), launch("scan_walk_back", x.device, n=n)
        # a token's edges are 2 n d / 16 float32
        piece = max(launch("scan_gradients", x.device, n=n)["EDGE_BYTES"] * 2 // (n * d), CHUNK)
        programs = b * triton.cdiv(d, LANES)
        spans = max(min(triton.cdiv(walk["PROGRAMS"], programs), t // walk["SHORTEST"]), triton.cdiv(t, piece), 1)
        span = min(whole(triton.cdiv(t, spans), CHUNK), piece // CHUNK * CHUNK)
        N = max(triton.next_power_of_2(n), walk["num_warps"], back["num_warps"])
        return cls(b, t, d, n, N, whole(t, CHUNK), triton.cdiv(t, span), span, programs < walk["ENOUGH"] and span < t,
                   piece)

    def pieces(self) -> Iterator[Piece]:
        """The pieces of the backward; those of one sequence begin where a span does, and come last first."""
        if self.piece >= self.t:
            rows = self.piece // self.t
            for row in range(0, self.b, rows):
                yield Piece(slice(row, min(row + rows, self.b)), slice(0, self.t))
            return
        tokens = self.piece // self.span * self.span
        for row in range(self.b):
            for first in reversed(range(0, self.t, tokens)):
                yield Piece(slice(row, row + 1), slice(first, min(first + tokens, self.t)))

    def walk(self, kernel: Any, b: int, spans: int, softplus: bool, device: torch.device, *args: Any) -> None:
        """Launches scan_walk or scan_walk_back over `spans` spans of b sequences."""
        name = kernel.fn.__name__
        use = launch(name, device, n=self.n)
        kernel[triton.cdiv(self.d, LANES), spans, b](
            *args, n=self.n, N=self.N, U=use["U"], W=use["num_warps"], SOFTPLUS=softplus, num_warps=use["num_warps"],
            num_stages=use["num_stages"])

    def prepare(self, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rates (n d), and B and C as float32 (b padded N), zero behind the sequence and the states."""
        rates = A.new_empty(self.n, self.d, dtype=torch.float32)
        wide = A.new_empty(2, self.b, self.padded, self.N, dtype=torch.float32)
        rows = self.b * self.padded
        grid = (triton.cdiv(rows, PREPARED["R"]) + triton.cdiv(self.d, PREPARED["BD"]),)
        scan_prepare[grid](A.contiguous(), B.contiguous(), C.contiguous(), rates, wide, self.t, self.padded, self.d,
                           rows, n=self.n, N=self.N, **PREPARED)
        return rates, wide[0], wide[1]

    def combine(self, ends: Tensor, totals: Tensor, rates: Tensor, entering: Tensor | None, *, backward: bool) -> None:
        """Makes of ends (b s n d), in place, what enters the spans; entering (b n d): what enters the first walked."""
        scan_combine[triton.cdiv(self.d, COMBINED["BD"]), self.n, self.b](
            ends, totals, rates, entering, self.spans, self.d, n=self.n, BACKWARD=backward, **COMBINED)


def whole(value: int, unit: int) -> int:
    """The multiple of `unit` from `value` on."""
    return triton.cdiv(value, unit) * unit


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if v is None else v.contiguous() for v in tensors]


def in_float32(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()
