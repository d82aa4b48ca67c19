"""Stochastic rounding of a tile, as a Triton function for kernels: the bits of `hinny.ops.rounding`."""

from __future__ import annotations

import triton
import triton.language as tl

from hinny.ops import rounding

ROUNDS = tl.constexpr(rounding.ROUNDS)
SHARED = tl.constexpr(rounding.SHARED)


@triton.jit
def noise(seed, stream, rows, blocks: tl.constexpr, N: tl.constexpr):
    """Uniform uint32 of 0 ... 2^16 - 1 (rows N), N a multiple of SHARED, for rows of `blocks` blocks of Philox."""
    first = rows[:, None] * blocks + tl.arange(0, N // SHARED)[None, :]
    zero = first * 0
    a, b, c, d = tl.philox(seed, first, zero + stream, zero, zero, ROUNDS)
    # element k of a block takes half k % 2 of word k // 2; joined axes lie in one thread, so nothing moves
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (rows.shape[0], N))


@triton.jit
def round_up_or_down(s, noise, dtype: tl.constexpr):
    """A float32 tile in bfloat16 or float16, up where the part cut off is larger than the noise."""
    if dtype == tl.bfloat16:
        bits = s.to(tl.uint32, bitcast=True)
        # a carry would turn a NaN into zero
        bits = tl.where(s == s, bits + noise, bits | 0x400000) >> 16
        rounded = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # in units of the last place, which below the smallest normal number stay 2^-24
        exponent = tl.maximum(s.to(tl.int32, bitcast=True) & 0x7F800000, 113 << 23)
        unit = exponent - (10 << 23)
        scaled = s * ((254 << 23) - unit).to(tl.float32, bitcast=True)
        below = tl.floor(scaled)
        below = tl.where((scaled - below) * 65536.0 > noise.to(tl.float32), below + 1, below)
        rounded = (below * unit.to(tl.float32, bitcast=True)).to(tl.float16)
    return rounded
