"""Selective scan on a Hopper GPU, in Gluon: the walk of `scan_walk` with all of a channel's states in one warp.

A program has 8 channels a warp and all their states (8 W n) in registers. Lanes take 2 channels by 4 states at a time,
4 lanes along channels and 8 along states, so that a token's B and C, in shared memory as float32 like its steps, are
read by whole vectors: a number read from shared memory serves two channels, and one of x and dt several states. The sum
over n is over 8 lanes. What is left are the exponentials, 16 a clock and multiprocessor; one in eight is computed by a
polynomial on the other units instead, which run beside (`exponentials`). On an H100 at b 4, t 4096, d 2048, n 128:
1.46 ms, with states at edges and dz 1.73 ms; a copy of these edges alone takes 1.6 ms.
T tokens are loaded while the T before are walked, 8 at a time. Letters: b batch, t time, d channels, n states.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)
NEVER = gl.constexpr(2.0 ** 80)
SLOWEST = gl.constexpr(2.0 ** -60)
"""As in `scan_walks`."""
BLOCK = 8
"""Tokens walked at a time, and between the states kept for the backward."""

POLYNOMIAL = """{
.reg .f32 whole, power, rest, p; .reg .b32 bits, k;
max.f32 power, $15, 0fC2FE0000;
add.rn.f32 whole, power, 0f4B400000;
sub.rn.f32 rest, whole, 0f4B400000;
sub.rn.f32 rest, power, rest;
mov.b32 k, whole; shl.b32 k, k, 23;
fma.rn.f32 p, rest, 0f3AADDD09, 0f3C1E7544;
fma.rn.f32 p, p, rest, 0f3D635BA9;
fma.rn.f32 p, p, rest, 0f3E75FCDE;
fma.rn.f32 p, p, rest, 0f3F317215;
fma.rn.f32 p, p, rest, 0f3F800000;
mov.b32 bits, p; add.s32 bits, bits, k; mov.b32 $7, bits;
}
"""
"""2 to the power of $15, no less than -127: 1.5 2^23 added rounds it to a whole number, which goes to the exponent."""

EIGHT = gl.constexpr("".join(f"ex2.approx.ftz.f32 ${i}, ${i + 8};\n" for i in range(7)) + POLYNOMIAL)
EIGHT_NUMBERS = gl.constexpr(",".join(["=f"] * 8 + ["f"] * 8))


@gluon.jit
def exponentials(x):
    """2^x, of each 8 registers 7 by the special-function unit and one by a polynomial, off by 2^-22 as they are."""
    return gl.inline_asm_elementwise(EIGHT, EIGHT_NUMBERS, [x], dtype=gl.float32, is_pure=True, pack=8)


@gluon.jit
def sigmoid(x):
    """As in `gates`."""
    root = gl.rsqrt(1 + gl.exp2(x * -LOG2_E))
    return root * root


@gluon.jit
def softplus(v):
    """As in `scan_walks`."""
    size = gl.abs(v)
    power = size * LOG2_E
    rest = gl.fma(size, LOG2_E, -power) + size * 1.9259630e-8
    e = gl.exp2(-power) * (1 - rest * 0.6931472)
    root = gl.rsqrt(2 + e)
    s = e * root * root
    q = s * s
    series = 0.2796060276927227 + q * 0.2817833484047532
    series = 2.0 + q * (0.66666314682006 + q * (0.40024910281055 + q * series))
    return gl.maximum(v, 0.0) + s * series


@gluon.jit
def step_sizes(raw, bias, mask, SOFTPLUS: gl.constexpr):
    """Time steps of raw dt; zero where masked, so that such a token changes nothing."""
    v = raw.to(gl.float32) + bias
    if SOFTPLUS:
        v = softplus(v)
    return gl.where(mask, v, 0.0)


@gluon.jit
def decay_steps(steps, first_tokens, at, mask):
    """Steps as decays see them: NEVER at the first token of a document; at, mask: of the rows."""
    if first_tokens is not None:
        new = gl.load(first_tokens + at, mask=mask, other=0) != 0
        steps = gl.where(new[:, None], NEVER, steps)
    return steps


@gluon.jit
def channel_values(values, c, inside):
    """One number a channel, zero if not given."""
    if values is not None:
        return gl.load(values + c, mask=inside, other=0).to(gl.float32)
    else:
        return gl.zeros_like(c).to(gl.float32)


@gluon.jit
def together(ys):
    """8 rows (c) as a tile (8 c)."""
    low = gl.join(gl.join(ys[0], ys[4]), gl.join(ys[2], ys[6]))
    high = gl.join(gl.join(ys[1], ys[5]), gl.join(ys[3], ys[7]))
    return gl.join(low, high).permute([1, 2, 3, 0]).reshape([8, ys[0].shape[0]])


@gluon.jit
def result(out, value, skip, z, dy, here, mask):
    """y of what the states gave, or given dy the gradient of z."""
    out += skip[None, :] * value
    if z is not None:
        gate = gl.load(z + here, mask=mask, other=0).to(gl.float32)
        open = sigmoid(gate)
        if dy is not None:
            out *= gl.load(dy + here, mask=mask, other=0).to(gl.float32) * (open + gate * open * (1 - open))
        else:
            out *= gate * open
    return out


@gluon.jit(do_not_specialize=["t", "begin", "length"])
def scan_fast_walk(
    x, dt, z, A, B, C, D, dt_bias, first_tokens, starts, dy, y, edges, ends, t, begin, length, d,
    n: gl.constexpr, N: gl.constexpr, T: gl.constexpr, W: gl.constexpr, SOFTPLUS: gl.constexpr,
):
    """Walks `length` tokens from `begin` on, of program (8 W channels, b), from starts (b n d) or from zero.

    y (b t d) is the output; given dy, the gradient of z. edges (b e n d): the states before tokens begin, begin+8, ...
    ends (b n d): the state behind the last. A (d n), B, C (b t n).
    """
    BD: gl.constexpr = 8 * W
    H: gl.constexpr = gl.BlockedLayout([2, 4], [4, 8], [W, 1], [0, 1])  # states
    P: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [W, 1], [1, 0])  # tokens by channels
    V: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [W, 1], [1, 0])  # tokens by states
    HD: gl.constexpr = gl.SliceLayout(1, H)
    HN: gl.constexpr = gl.SliceLayout(0, H)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # a row of these is read by itself, and all of them written at once
    rows_decay = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
    rows_input = gl.allocate_shared_memory(gl.float32, [T, BD], flat)
    rows_B = gl.allocate_shared_memory(gl.float32, [T, N], flat)
    rows_C = gl.allocate_shared_memory(gl.float32, [T, N], flat)
    rows_y = gl.allocate_shared_memory(gl.float32, [T // 8, 8, BD], tile)
    tile_decay = rows_decay._reinterpret(gl.float32, [T, BD], tile)
    tile_input = rows_input._reinterpret(gl.float32, [T, BD], tile)
    tile_B = rows_B._reinterpret(gl.float32, [T, N], tile)
    tile_C = rows_C._reinterpret(gl.float32, [T, N], tile)
    tile_y = rows_y._reinterpret(gl.float32, [T, BD], tile)

    b = gl.program_id(1).to(gl.int64)
    c0 = gl.program_id(0) * BD
    ch = c0 + gl.arange(0, BD, HD)
    jh = gl.arange(0, N, HN)
    real = (ch < d)[:, None] & (jh < n)[None, :]
    state = jh[None, :] * d + ch[:, None]
    rate = gl.load(A + ch[:, None] * n + jh[None, :], mask=real, other=0).to(gl.float32) * LOG2_E
    rate = gl.where(gl.abs(rate) < SLOWEST, -SLOWEST, rate)
    if starts is not None:
        h = gl.load(starts + b * n * d + state, mask=real, other=0)
    else:
        h = gl.zeros([BD, N], gl.float32, H)

    rows = gl.arange(0, T, gl.SliceLayout(1, P))
    cp = c0 + gl.arange(0, BD, gl.SliceLayout(0, P))
    inside = cp < d
    bias = channel_values(dt_bias, cp, inside)
    skip = channel_values(D, cp, inside)
    here = rows[:, None] * d + cp[None, :]
    rows_v = gl.arange(0, T, gl.SliceLayout(1, V))
    jv = gl.arange(0, N, gl.SliceLayout(0, V))
    here_v = rows_v[:, None] * n + jv[None, :]
    base = b * t + begin
    mask = (rows < length)[:, None] & inside[None, :]
    mask_v = (rows_v < length)[:, None] & (jv < n)[None, :]
    x_next = gl.load(x + base * d + here, mask=mask, other=0)
    dt_next = gl.load(dt + base * d + here, mask=mask, other=0)
    B_next = gl.load(B + base * n + here_v, mask=mask_v, other=0)
    C_next = gl.load(C + base * n + here_v, mask=mask_v, other=0)
    E = (length + 7) // 8
    for first in range(0, length, T):
        at = base + first
        mask = (first + rows < length)[:, None] & inside[None, :]
        value = x_next.to(gl.float32)
        step = step_sizes(dt_next, bias[None, :], mask, SOFTPLUS)
        tile_decay.store(decay_steps(step, first_tokens, at + rows, first + rows < length))
        tile_input.store(step * value)
        tile_B.store(B_next.to(gl.float32))
        if y is not None:
            tile_C.store(C_next.to(gl.float32))
        # the next tokens', on their way while these are walked
        later = (first + T + rows < length)[:, None] & inside[None, :]
        later_v = (first + T + rows_v < length)[:, None] & (jv < n)[None, :]
        x_next = gl.load(x + (at + T) * d + here, mask=later, other=0)
        dt_next = gl.load(dt + (at + T) * d + here, mask=later, other=0)
        B_next = gl.load(B + (at + T) * n + here_v, mask=later_v, other=0)
        if y is not None:
            C_next = gl.load(C + (at + T) * n + here_v, mask=later_v, other=0)
        for i0 in range(0, T, 8):
            if edges is not None:
                if first + i0 < length:
                    gl.store(edges + (b * E + (first + i0) // 8) * n * d + state, h, mask=real)
            ys = ()
            for k in gl.static_range(8):
                decay = exponentials(rate * rows_decay.index(i0 + k).load(HD)[:, None])
                added = rows_input.index(i0 + k).load(HD)[:, None] * rows_B.index(i0 + k).load(HN)[None, :]
                h = decay * h + added
                if y is not None:
                    ys += (gl.sum(h * rows_C.index(i0 + k).load(HN)[None, :], 1),)
            if y is not None:
                rows_y.index(i0 // 8).store(together(ys))
        if y is not None:
            out = result(tile_y.load(P), value, skip, z, dy, at * d + here, mask)
            gl.store(y + at * d + here, out.to(y.dtype.element_ty), mask=mask)
    if ends is not None:
        gl.store(ends + b * n * d + state, h, mask=real)
