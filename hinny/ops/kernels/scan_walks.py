"""Selective scan, the walks: a program has 32 channels, one a lane, and walks time with their states in registers.

    scan_prepare    A → its rates in units of log 2, B and C → float32, padded with zeros to whole blocks of tokens
    scan_walk       the recurrence: y and the final state, or the gradient of z; on its way the states at edges
    scan_walk_back  the same for the state's gradient, backwards
    scan_combine    spans that were walked at once from zero: what truly enters each of them
    scan_step       one token

A state (n) of a channel is spread over W warps, (M) of it in the registers of a lane. B and C are then the same for a
whole warp, a channel's dt and x are read by one lane, and the sum over n is within a lane and at most once per block
across warps: what is left is the exponentials, 16 a clock and multiprocessor. U tokens make a block, read and written
as one (U 32) tile; taking a row out of it and putting one in cost nothing, all of it is in a lane's registers.
Widths of loads follow what the compiler knows of the alignment of d: nothing, so that a lane has one channel.
Letters: b batch, t time, d channels, n state, s spans.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hinny.ops.kernels.gates import LOG2_E, sigmoid, silu_slope

LANES = 32
NEVER = tl.constexpr(2.0 ** 80)
"""A time step after which nothing of a state is left: that of a document's first token, for the decay alone."""
SLOWEST = tl.constexpr(2.0 ** -60)
"""The slowest rate, so that NEVER ends it: far below what a float32 decay can show."""


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to 2^-20 relative also where exp(v) is tiny.

    log(1 + e) is twice the inverse hyperbolic tangent of s = e / (2 + e), s at most 1/3. The polynomial, fitted to that
    range, is off by 4e-9.
    """
    size = tl.abs(v)
    power = size * LOG2_E
    # what rounding took from the power, and log2(e) from its float32, or |v| would count as relative error
    rest = tl.fma(size, LOG2_E, -power) + size * 1.9259630e-8
    e = tl.exp2(-power) * (1 - rest * 0.6931472)
    root = tl.rsqrt(2 + e)
    s = e * root * root
    q = s * s
    series = 0.2796060276927227 + q * 0.2817833484047532
    series = 2.0 + q * (0.66666314682006 + q * (0.40024910281055 + q * series))
    return tl.maximum(v, 0.0) + s * series


@triton.jit
def step_sizes(raw, bias, mask, SOFTPLUS: tl.constexpr):
    """Time steps (U 32) of raw dt; zero where masked, so that such a token changes nothing."""
    v = raw.to(tl.float32) + bias[None, :]
    if SOFTPLUS:
        v = softplus(v)
    return tl.where(mask, v, 0.0)


@triton.jit
def decay_steps(steps, first_tokens, at, rows, mask):
    """Steps as decays see them: NEVER at the first token of a document."""
    if first_tokens is not None:
        new = tl.load(first_tokens + at + rows, mask=mask, other=0) != 0
        steps = tl.where(new[:, None], NEVER, steps)
    return steps


@triton.jit
def channel_values(values, c, inside):
    """One number a channel, zero if not given."""
    if values is not None:
        return tl.load(values + c, mask=inside, other=0).to(tl.float32)
    return tl.zeros_like(c).to(tl.float32)


@triton.jit
def scan_prepare(
    A, B, C, rates, wide, t, padded, d, rows, n: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):
    """A (d n) → rates (n d), A log2(e); B, C (b t n) → wide (2 b padded N); rows = b padded."""
    j = tl.arange(0, N)
    blocks = tl.cdiv(rows, R)
    if tl.program_id(0) < blocks:
        at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        token = at % padded
        source = ((at // padded) * t + token)[:, None] * n + j[None, :]
        mask = ((at < rows) & (token < t))[:, None] & (j < n)[None, :]
        out = at[:, None] * N + j[None, :]
        inside = (at < rows)[:, None]
        tl.store(wide + out, tl.load(B + source, mask=mask, other=0).to(tl.float32), mask=inside)
        tl.store(wide + rows.to(tl.int64) * N + out, tl.load(C + source, mask=mask, other=0).to(tl.float32),
                 mask=inside)
    else:
        c = (tl.program_id(0) - blocks) * BD + tl.arange(0, BD)
        mask = (c < d)[:, None] & (j < n)[None, :]
        rate = tl.load(A + c[:, None] * n + j[None, :], mask=mask, other=0).to(tl.float32) * LOG2_E
        rate = tl.where(tl.abs(rate) < SLOWEST, -SLOWEST, rate)
        tl.store(rates + j[None, :] * d + c[:, None], rate, mask=mask)


@triton.jit(do_not_specialize=["t", "d", "padded", "span", "spacing"])
def scan_walk(
    x, dt, z, rates, B, C, D, dt_bias, first_tokens, starts, dy, y, edges, ends, totals,
    t, d, padded, span, spacing, n: tl.constexpr, N: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Walks span s of sequence b from starts (b s n d), or from zero.

    y (b t d) is the output; given dy, the gradient of z. edges (b e n d): the states before tokens 0, spacing, ...
    ends: the final state (b n d); with totals, the state at the end of each span (b s n d), and totals (b s d) the sum
    of its time steps.
    """
    M: tl.constexpr = N // W
    c = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = c < d
    s = tl.program_id(1)
    spans = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    j = tl.arange(0, W)[:, None] * M + tl.arange(0, M)[None, :]
    state = (j * d)[:, :, None] + c[None, None, :]
    real = (j < n)[:, :, None] & inside[None, None, :]
    a = tl.load(rates + state, mask=real, other=0)
    h = tl.zeros((W, M, 32), tl.float32)
    if starts is not None:
        h = tl.load(starts + (b * spans + s) * n * d + state, mask=real, other=0)
    bias = channel_values(dt_bias, c, inside)
    skip = channel_values(D, c, inside)
    rows = tl.arange(0, U)
    here = rows[:, None] * d + c[None, :]
    stop = tl.minimum(t, (s + 1) * span)
    sums = tl.zeros((32,), tl.float32)
    at = b * t + s * span
    mask = (s * span + rows < stop)[:, None] & inside[None, :]
    dt_next = tl.load(dt + at * d + here, mask=mask, other=0)
    x_next = tl.load(x + at * d + here, mask=mask, other=0)
    for first in range(s * span, stop, U):
        at = b * t + first
        mask = (first + rows < stop)[:, None] & inside[None, :]
        later = (first + U + rows < stop)[:, None] & inside[None, :]
        value = x_next.to(tl.float32)
        step = step_sizes(dt_next, bias, mask, SOFTPLUS)
        # the next block's, on their way while this one is walked
        dt_next = tl.load(dt + (at + U) * d + here, mask=later, other=0)
        x_next = tl.load(x + (at + U) * d + here, mask=later, other=0)
        if edges is not None:
            if first % spacing == 0:
                tl.store(edges + (b * tl.cdiv(t, spacing) + first // spacing) * n * d + state, h, mask=real)
        decay = decay_steps(step, first_tokens, at, rows, first + rows < stop)
        if totals is not None:
            sums += tl.sum(decay, 0)
        decay = tl.broadcast_to(decay[None, :, :], (W, U, 32))
        value_in = tl.broadcast_to((step * value)[None, :, :], (W, U, 32))
        out = tl.zeros((W, U, 32), tl.float32)
        b_at = B + (b * padded + first) * N
        c_at = C + (b * padded + first) * N
        for i in tl.static_range(U):
            this = (rows == i)[None, :, None]
            b_row = tl.load(b_at + i * N + j)[:, :, None]
            added = b_row * tl.sum(tl.where(this, value_in, 0), 1)[:, None, :]
            h = tl.exp2(a * tl.sum(tl.where(this, decay, 0), 1)[:, None, :]) * h + added
            if y is not None:
                c_row = tl.load(c_at + i * N + j)[:, :, None]
                out = tl.where(this, tl.sum(h * c_row, 1)[:, None, :], out)
        if y is not None:
            result = tl.sum(out, 0) + skip[None, :] * value
            if z is not None:
                gate = tl.load(z + at * d + here, mask=mask, other=0).to(tl.float32)
                if dy is not None:
                    result *= tl.load(dy + at * d + here, mask=mask, other=0).to(tl.float32) * silu_slope(gate)
                else:
                    result *= gate * sigmoid(gate)
            tl.store(y + at * d + here, result.to(y.dtype.element_ty), mask=mask)
    if totals is not None:
        tl.store(totals + (b * spans + s) * d + c, sums, mask=inside)
        tl.store(ends + (b * spans + s) * n * d + state, h, mask=real)
    elif ends is not None:
        if s == spans - 1:
            tl.store(ends + b * n * d + state, h, mask=real)


@triton.jit(do_not_specialize=["t", "d", "padded", "span", "spacing"])
def scan_walk_back(
    dt, z, rates, C, dt_bias, first_tokens, starts, dy, edges, ends, totals,
    t, d, padded, span, spacing, n: tl.constexpr, N: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Walks span s of sequence b backwards with the gradient of the state, from starts (b s n d) or from zero.

    edges (b e n d): what reaches the states after tokens spacing-1, 2 spacing-1, ... and the last from later tokens.
    ends: what reaches the state before the first token (b n d); with totals, that before each span, as in scan_walk.
    """
    M: tl.constexpr = N // W
    c = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = c < d
    s = tl.program_id(1)
    spans = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    j = tl.arange(0, W)[:, None] * M + tl.arange(0, M)[None, :]
    state = (j * d)[:, :, None] + c[None, None, :]
    real = (j < n)[:, :, None] & inside[None, None, :]
    a = tl.load(rates + state, mask=real, other=0)
    g = tl.zeros((W, M, 32), tl.float32)
    if starts is not None:
        g = tl.load(starts + (b * spans + s) * n * d + state, mask=real, other=0)
    bias = channel_values(dt_bias, c, inside)
    rows = tl.arange(0, U)
    here = rows[:, None] * d + c[None, :]
    stop = tl.minimum(t, (s + 1) * span)
    blocks = tl.cdiv(stop - s * span, U)
    sums = tl.zeros((32,), tl.float32)
    at = b * t + s * span + (blocks - 1) * U
    mask = (s * span + (blocks - 1) * U + rows < stop)[:, None] & inside[None, :]
    dt_next = tl.load(dt + at * d + here, mask=mask, other=0)
    dy_next = tl.load(dy + at * d + here, mask=mask, other=0)
    for k in range(blocks):
        first = s * span + (blocks - 1 - k) * U
        at = b * t + first
        mask = (first + rows < stop)[:, None] & inside[None, :]
        value = dy_next.to(tl.float32)
        if z is not None:
            gate = tl.load(z + at * d + here, mask=mask, other=0).to(tl.float32)
            value *= gate * sigmoid(gate)
        decay = decay_steps(step_sizes(dt_next, bias, mask, SOFTPLUS), first_tokens, at, rows, first + rows < stop)
        # the next block's, on their way while this one is walked; there is none before the first
        later = inside[None, :] & (k + 1 < blocks)
        dt_next = tl.load(dt + (at - U) * d + here, mask=later, other=0)
        dy_next = tl.load(dy + (at - U) * d + here, mask=later, other=0)
        if edges is not None:
            if (first + U) % spacing == 0 or first + U >= t:
                tl.store(edges + (b * tl.cdiv(t, spacing) + first // spacing) * n * d + state, g, mask=real)
        if totals is not None:
            sums += tl.sum(decay, 0)
        decay = tl.broadcast_to(decay[None, :, :], (W, U, 32))
        value_in = tl.broadcast_to(value[None, :, :], (W, U, 32))
        c_at = C + (b * padded + first) * N
        for i in tl.static_range(U - 1, -1, -1):
            this = (rows == i)[None, :, None]
            c_row = tl.load(c_at + i * N + j)[:, :, None]
            g += c_row * tl.sum(tl.where(this, value_in, 0), 1)[:, None, :]
            g *= tl.exp2(a * tl.sum(tl.where(this, decay, 0), 1)[:, None, :])
    if totals is not None:
        tl.store(totals + (b * spans + s) * d + c, sums, mask=inside)
        tl.store(ends + (b * spans + s) * n * d + state, g, mask=real)
    elif ends is not None:
        if s == 0:
            tl.store(ends + b * n * d + state, g, mask=real)


@triton.jit(do_not_specialize=["spans", "d"])
def scan_combine(
    ends, totals, rates, initial, spans, d, n: tl.constexpr, BACKWARD: tl.constexpr, BD: tl.constexpr,
):
    """ends (b s n d), walked from zero, become in place what enters each span: from the left, backward the right."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = c < d
    j = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    rate = tl.load(rates + j * d + c, mask=inside, other=0)
    entering = tl.zeros((BD,), tl.float32)
    if initial is not None:
        entering = tl.load(initial + (b * n + j) * d + c, mask=inside, other=0)
    for k in range(spans):
        s = b * spans + (spans - 1 - k if BACKWARD else k)
        at = ends + (s * n + j) * d + c
        added = tl.load(at, mask=inside, other=0)
        decay = tl.exp2(rate * tl.load(totals + s * d + c, mask=inside, other=0))
        tl.store(at, entering, mask=inside)
        entering = decay * entering + added


@triton.jit(do_not_specialize=["rows", "d"])
def scan_step(
    x, dt, A, B, C, D, z, dt_bias, state, y, new_state, rows, d, n: tl.constexpr, N: tl.constexpr, BD: tl.constexpr,
    BB: tl.constexpr, SOFTPLUS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):
    """One token of BB sequences and BD channels: x, dt, z, y (b d), B, C (b n); new_state (b n d), state too if
    CHANNELS_LAST, else (b d n)."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = c < d
    j = tl.arange(0, N)
    real = inside[:, None] & (j < n)[None, :]
    rate = tl.load(A + c[:, None] * n + j[None, :], mask=real, other=0).to(tl.float32) * LOG2_E
    bias = channel_values(dt_bias, c, inside)
    skip = channel_values(D, c, inside)
    at_new = j[None, :] * d + c[:, None]
    at_state = at_new if CHANNELS_LAST else c[:, None] * n + j[None, :]
    for k in range(BB):
        b = tl.program_id(1).to(tl.int64) * BB + k
        mask = inside & (b < rows)
        value = tl.load(x + b * d + c, mask=mask, other=0).to(tl.float32)
        step = tl.load(dt + b * d + c, mask=mask, other=0).to(tl.float32) + bias
        if SOFTPLUS:
            step = softplus(step)
        row_mask = (j < n) & (b < rows)
        b_row = tl.load(B + b * n + j, mask=row_mask, other=0).to(tl.float32)
        c_row = tl.load(C + b * n + j, mask=row_mask, other=0).to(tl.float32)
        h = (step * value)[:, None] * b_row[None, :]
        if state is not None:
            h += tl.exp2(rate * step[:, None]) * tl.load(state + b * d * n + at_state, mask=real & (b < rows), other=0)
        tl.store(new_state + b * d * n + at_new, h, mask=real & (b < rows))
        out = tl.sum(h * c_row[None, :], 1) + skip * value
        if z is not None:
            gate = tl.load(z + b * d + c, mask=mask, other=0).to(tl.float32)
            out *= gate * sigmoid(gate)
        tl.store(y + b * d + c, out.to(y.dtype.element_ty), mask=mask)
