"""The backward of the selective scan's kernels, a piece at a time: EDGE_BYTES of states at chunk edges at most."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hinny.ops.kernels import scan_fast
from hinny.ops.kernels.launches import launch
from hinny.ops.kernels.scan_call import Call, Piece, contiguous, in_float32
from hinny.ops.kernels.scan_gradients import CHUNK, scan_gradients
from hinny.ops.kernels.scan_walks import LANES, scan_walk, scan_walk_back
from hinny.ops.kernels.sums import sum_into


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, first_tokens: Tensor | None, entering: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, of D and A as (d n+1), of B, C, z, dt_bias and the initial state (b n d).

    Empty where z or the initial state was not given. entering (b s n d): the states that enter the spans, or what
    `scan_fast` kept.
    """
    if scan_fast.takes(x, dt, B, C, z):
        return scan_fast.backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial, first_tokens, entering, softplus)
    parts = _Backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, first_tokens, entering, softplus)
    return parts.run(initial is not None)


class _Backward:
    def __init__(
        self, dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, first_tokens: Tensor | None, entering: Tensor,
        softplus: bool,
    ) -> None:
        self.call = Call.of(x, B.shape[2])
        self.dy, self.x, self.dt, self.D, self.z, self.dt_bias = contiguous(dy, x, dt, D, z, dt_bias)
        self.dfinal, self.first_tokens = in_float32(dfinal), first_tokens
        self.entering, self.softplus = entering, softplus
        self.rates, self.B, self.C = self.call.prepare(A, B, C)
        self.dx, self.ddt = torch.empty_like(self.x), torch.empty_like(self.dt)
        self.dz = x.new_empty(0) if z is None else torch.empty_like(self.z)
        self.dB, self.dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (B, C))
        self._cut(launch("scan_gradients", x.device, n=self.call.n))

    def _cut(self, use: dict[str, int]) -> None:
        """How many chunks and channel blocks a program of scan_gradients takes: as many as leave PROGRAMS programs."""
        call = self.call
        self.options = {key: use[key] for key in ("num_warps", "num_stages")}
        blocks = triton.cdiv(call.d, LANES)
        units = blocks * call.b * triton.cdiv(call.t, CHUNK) // use["PROGRAMS"]
        self.chunks_each = max(1, min(use["CHUNKS"], units))
        self.group = max(1, min(blocks, units // self.chunks_each))
        self.groups = triton.cdiv(blocks, self.group)

    def run(self, initial: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        call, pieces = self.call, list(self.call.pieces())
        weights, dbias = self.rates.new_empty(call.d, call.n + 1), self.rates.new_empty(call.d)
        dinitial = self.rates.new_empty((call.b, call.n, call.d) if initial else 0)
        counts = [piece.b * triton.cdiv(piece.chunks, self.chunks_each) for piece in pieces]
        channel_sums = self.rates.new_empty(sum(counts), call.n + 2, call.d)
        leaving = self._leaving() if call.split else None
        carried = None
        for piece, channel_parts in zip(pieces, channel_sums.split(counts), strict=True):
            edges, dedges = self.rates.new_empty(2, piece.b, piece.chunks, call.n, call.d)
            self._walk(piece, edges)
            carried = self._walk_back(piece, leaving, carried, dinitial if initial else None, dedges)
            self._gradients(piece, edges, dedges, channel_parts)
        sum_into(channel_sums, weights, dbias)
        return self.dx, self.ddt, weights, self.dB, self.dC, self.dz, dbias, dinitial

    def _leaving(self) -> Tensor:
        """What reaches the end of every span (b s n d) from later ones."""
        call = self.call
        ends = self.rates.new_empty(call.b, call.spans, call.n, call.d)
        totals = self.rates.new_empty(call.b, call.spans, call.d)
        call.walk(scan_walk_back, call.b, call.spans, self.softplus, self.dt.device,
                  self.dt, self.z, self.rates, self.C, self.dt_bias, self.first_tokens, None, self.dy, None, ends,
                  totals, call.t, call.d, call.padded, call.span, call.span)
        call.combine(ends, totals, self.rates, self.dfinal, backward=True)
        return ends

    def _spans(self, piece: Piece) -> slice:
        return slice(piece.tokens.start // self.call.span, triton.cdiv(piece.tokens.stop, self.call.span))

    def _wide(self, v: Tensor, piece: Piece) -> Tensor:
        return v[piece.rows, piece.tokens.start:]

    def _walk(self, piece: Piece, edges: Tensor) -> None:
        """States at chunk edges, and dz."""
        call, spans = self.call, self._spans(piece)
        dz = None if self.z is None else piece.of(self.dz)
        dy = None if self.z is None else piece.of(self.dy)
        call.walk(scan_walk, piece.b, spans.stop - spans.start, self.softplus, edges.device,
                  piece.of(self.x), piece.of(self.dt), piece.of(self.z), self.rates, self._wide(self.B, piece),
                  self._wide(self.C, piece), self.D, self.dt_bias, piece.of(self.first_tokens),
                  self.entering[piece.rows, spans], dy, dz, edges, None, None,
                  piece.t, call.d, call.padded, call.span, CHUNK)

    def _walk_back(
        self, piece: Piece, leaving: Tensor | None, carried: Tensor | None, dinitial: Tensor | None, dedges: Tensor
    ) -> Tensor | None:
        """Gradients of states at chunk edges; what the piece before this one, in time, is to be given."""
        call, spans = self.call, self._spans(piece)
        first, last = piece.tokens.start == 0, piece.tokens.stop == call.t
        count, span = (spans.stop - spans.start, call.span) if leaving is not None else (1, piece.chunks * CHUNK)
        if leaving is not None:
            starts: Tensor | None = leaving[piece.rows, spans]
        elif last:
            starts = None if self.dfinal is None else self.dfinal[piece.rows]
        else:
            starts = carried
        if first:
            ends = None if dinitial is None else dinitial[piece.rows]
        else:
            ends = None if leaving is not None else self.rates.new_empty(1, call.n, call.d)
        call.walk(scan_walk_back, piece.b, count, self.softplus, dedges.device,
                  piece.of(self.dt), piece.of(self.z), self.rates, self._wide(self.C, piece), self.dt_bias,
                  piece.of(self.first_tokens), starts, piece.of(self.dy), dedges, ends, None,
                  piece.t, call.d, call.padded, span, CHUNK)
        return ends

    def _gradients(self, piece: Piece, edges: Tensor, dedges: Tensor, channel_parts: Tensor) -> None:
        """dx, ddt, dB and dC of a piece, and its part of the sums over tokens."""
        call = self.call
        parts = self.rates.new_empty(self.groups, 2, piece.b * piece.t * call.n)
        scan_gradients[self.groups, triton.cdiv(piece.chunks, self.chunks_each), piece.b](
            piece.of(self.x), piece.of(self.dt), piece.of(self.z), self.rates, self._wide(self.B, piece),
            self._wide(self.C, piece), self.D, self.dt_bias, piece.of(self.first_tokens), piece.of(self.dy), edges,
            dedges, piece.of(self.dx), piece.of(self.ddt), parts, channel_parts, piece.t, call.d, call.padded,
            self.chunks_each, self.group, n=call.n, N=call.N, SOFTPLUS=self.softplus, **self.options)
        sum_into(parts, piece.of(self.dB).view(-1, 1), piece.of(self.dC).view(-1))
