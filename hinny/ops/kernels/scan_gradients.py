"""Selective scan, the gradients: chunks of Q tokens at once, each from the states at its edges.

A program has 32 channels, one a lane, and all tokens of a chunk in registers. For each of the n states it runs the
recurrence forwards from the state that enters the chunk, then backwards from the gradient that reaches its end, both
left by the walks. The sums over n (dx, ddt) stay in a lane. Those over channels (dB, dC) go over the lanes for Q tokens
at once: in each of four steps a lane gives half of what it has for the half of the other's that it keeps, so that 16
sums cost 16 exchanges where one by one they cost 80. They add up over the group of channel blocks that a program walks,
and dA over its chunks, in memory that no other program writes: a lane reads back what it wrote. `sum_parts` adds up
the programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hinny.ops.kernels.gates import sigmoid
from hinny.ops.kernels.scan_walks import channel_values, decay_steps, step_sizes

LN_2 = tl.constexpr(0.6931471805599453)
CHUNK = 16
"""Tokens a chunk: the sums over lanes are laid out for it."""


@triton.jit
def halved(values, lane, S: tl.constexpr):
    """Of values 0..2S-1 (32) S: lanes with bit S have the sum of values S.., the others of values ..S, with their twin.

    Twins are the lanes that differ in bit S; S = 16 adds up twins, of values that no lane is to give away.
    """
    out = ()
    for i in tl.static_range(S if S < 16 else 1):
        kept = values[i]
        given = kept
        if S < 16:
            upper = (lane & S) != 0
            kept = tl.where(upper, values[i + S], values[i])
            given = tl.where(upper, values[i], values[i + S])
        # a + b - a, in integers: the twin's value, bit by bit; the compiler makes one exchange between lanes of it
        bits = tl.reshape(given.to(tl.uint32, bitcast=True), (16 // S, 2, S))
        bits = tl.sum(bits, 1, keep_dims=True) - bits
        out += (kept + tl.reshape(bits, (32,)).to(tl.float32, bitcast=True),)
    return out


@triton.jit
def sums_over_lanes(values, lane):
    """16 values (32) → (32): lane l has the sum over all lanes of values l % 16."""
    return halved(halved(halved(halved(halved(values, lane, 8), lane, 4), lane, 2), lane, 1), lane, 16)[0]


@triton.jit
def rows_of(tile, rows):
    """A tile (16 32) as a tuple of its rows."""
    out = ()
    for i in tl.static_range(16):
        out += (tl.sum(tl.where((rows == i)[:, None], tile, 0.0), 0),)
    return out


@triton.jit
def tile_of(values, rows):
    """The tile (16 32) of a tuple of rows."""
    tile = tl.broadcast_to(values[0][None, :], (16, 32))
    for i in tl.static_range(1, 16):
        tile = tl.where((rows == i)[:, None], values[i][None, :], tile)
    return tile


@triton.jit
def from_the_end(values):
    """The 16 values, the last first."""
    out = ()
    for i in tl.static_range(16):
        out += (values[15 - i],)
    return out


@triton.jit
def one_state(a, h, g, b_at, c_at, steps, decays, inputs, douts, dinputs, ddecays, lane, N: tl.constexpr):
    """One state of 32 channels through a chunk: dinputs, ddecays, dA, and over channels dB (lanes ..16) and dC (16..).

    a: its rates; h, g: at the edges; tuples of rows: steps, steps as decays see them, dt x, gated dy, and the sums over
    states so far of the gradients of dt x and of the decays' exponents, in units of a.
    """
    kept = ()
    before = ()
    terms = ()
    for i in tl.static_range(16):
        k = tl.exp2(a * decays[i])
        kept += (k,)
        before += (h,)
        h = k * h + inputs[i] * tl.load(b_at + i * N)
        terms += (douts[i] * h,)
    dC = sums_over_lanes(terms, lane)
    da = tl.zeros_like(a)
    terms = ()
    more_dinputs = ()
    more_ddecays = ()
    for i in tl.static_range(15, -1, -1):
        g = g + douts[i] * tl.load(c_at + i * N)
        terms += (g * inputs[i],)
        more_dinputs += (dinputs[i] + g * tl.load(b_at + i * N),)
        g = g * kept[i]
        slope = g * before[i]
        more_ddecays += (ddecays[i] + slope * a,)
        da += slope * steps[i]
    dB = sums_over_lanes(from_the_end(terms), lane)
    return from_the_end(more_dinputs), from_the_end(more_ddecays), da, tl.where(lane < 16, dB, dC)


@triton.jit(do_not_specialize=["t", "d", "padded", "chunks_each", "group"])
def scan_gradients(
    x, dt, z, rates, B, C, D, dt_bias, first_tokens, dy, edges, dedges, dx, ddt, parts, channel_parts,
    t, d, padded, chunks_each, group, n: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    """dx, ddt (b t d) of some chunks and channel blocks of sequence b, from edges and dedges (b chunks n d).

    parts (p 2 b t n): dB and dC of group p of channel blocks. channel_parts (b s n+2 d): of chunks s, dA of state n-1
    to 0, dD, and the gradient of dt_bias.
    """
    lane = tl.arange(0, 32)
    rows = tl.arange(0, 16)
    b = tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(t, 16)
    start = tl.program_id(1) * chunks_each
    # lanes ..16 write dB of the chunk's tokens, lanes 16.. dC
    half = tl.num_programs(2).to(tl.int64) * t * n
    parts += tl.program_id(0).to(tl.int64) * 2 * half + b * t * n + (lane // 16) * half + (lane % 16) * n
    channel_parts += (b * tl.num_programs(1) + tl.program_id(1)) * (n + 2) * d
    for block in range(group):
        c = (tl.program_id(0) * group + block) * 32 + lane
        inside = c < d
        bias = channel_values(dt_bias, c, inside)
        skip = channel_values(D, c, inside)
        dskip = tl.zeros((32,), tl.float32)
        dbias = tl.zeros((32,), tl.float32)
        lanes = inside[None, :]
        for chunk in range(start, tl.minimum(start + chunks_each, chunks)):
            first = chunk * 16
            at = b * t + first
            mask = (first + rows < t)[:, None] & inside[None, :]
            # behind the end: the last token again, as a token of no step and no gradient
            here = (tl.minimum(rows, t - 1 - first)[:, None] * d + c[None, :]).to(tl.uint32)
            value = tl.load(x + at * d + here, mask=lanes, other=0).to(tl.float32)
            dout = tl.load(dy + at * d + here, mask=lanes, other=0).to(tl.float32)
            if z is not None:
                gate = tl.load(z + at * d + here, mask=lanes, other=0).to(tl.float32)
                dout *= gate * sigmoid(gate)
            dout = tl.where(mask, dout, 0.0)
            step = step_sizes(tl.load(dt + at * d + here, mask=lanes, other=0), bias, mask, SOFTPLUS)
            dskip += tl.sum(dout * value, 0)
            steps = rows_of(step, rows)
            decays = steps
            if first_tokens is not None:
                decays = rows_of(decay_steps(step, first_tokens, at, rows, first + rows < t), rows)
            inputs = rows_of(step * value, rows)
            douts = rows_of(dout, rows)
            dinputs = rows_of(tl.zeros((16, 32), tl.float32), rows)
            ddecays = dinputs
            edge = (b * chunks + chunk) * n * d
            a_next = tl.load(rates + c, mask=inside, other=0)
            h_next = tl.load(edges + edge + c, mask=inside, other=0)
            g_next = tl.load(dedges + edge + c, mask=inside, other=0)
            for j in range(n):
                a = a_next
                h = h_next
                g = g_next
                # the next state's, on their way while this one is run
                more = inside & (j + 1 < n)
                a_next = tl.load(rates + (j + 1) * d + c, mask=more, other=0)
                h_next = tl.load(edges + edge + (j + 1) * d + c, mask=more, other=0)
                g_next = tl.load(dedges + edge + (j + 1) * d + c, mask=more, other=0)
                part = parts + (first * n + j)
                live = first + lane % 16 < t
                earlier = tl.load(part, mask=live & (block > 0), other=0)
                channel_part = channel_parts + (n - 1 - j) * d + c
                da_earlier = tl.load(channel_part, mask=inside & (chunk > start), other=0)
                token = (b * padded + first) * N + j
                dinputs, ddecays, da, sums = one_state(a, h, g, B + token, C + token, steps, decays, inputs, douts,
                                                       dinputs, ddecays, lane, N)
                tl.store(part, earlier + sums, mask=live)
                tl.store(channel_part, da_earlier + da, mask=inside)
            step = tile_of(steps, rows)
            dinput = tile_of(dinputs, rows)
            value = tl.load(x + at * d + here, mask=lanes, other=0).to(tl.float32)
            dvalue = dinput * step + skip[None, :] * tile_of(douts, rows)
            tl.store(dx + at * d + here, dvalue.to(dx.dtype.element_ty), mask=mask)
            dstep = tile_of(ddecays, rows) * LN_2 + dinput * value
            if SOFTPLUS:
                dstep *= sigmoid(tl.load(dt + at * d + here, mask=lanes, other=0).to(tl.float32) + bias[None, :])
            dbias += tl.sum(tl.where(mask, dstep, 0), 0)
            tl.store(ddt + at * d + here, dstep.to(ddt.dtype.element_ty), mask=mask)
        tl.store(channel_parts + n * d + c, dskip, mask=inside)
        tl.store(channel_parts + (n + 1) * d + c, dbias, mask=inside)
