"""Sums over pairs of tokens, for the backward of SSD in Gluon: a block is 64 source tokens j by 64 target tokens i.

Accumulators have a row per source. Scores C_i B_j are kept as bf16, two to a register, and their diagonal is taken out
before: its part in dx is a multiple of dy, which D dy adds anyway, and the sums over pairs must not have it. Sums to
each target run over rows, hence over lanes and warps: three exchanges that halve the columns a lane keeps, then 4
numbers per column in shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def packed(x):
    """float32 (q k) -> pairs of neighbouring columns as bf16, (q k/2) int32: one register each, not two."""
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32,
                                     is_pure=True, pack=1)


@gluon.jit
def unpacked(pairs, layout: gl.constexpr):
    """What `packed` was given, rounded; not pure, so that it stays in the loop: hoisted, it doubles the registers."""
    even, odd = gl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [pairs],
                                          dtype=(gl.float32, gl.float32), is_pure=False, pack=1)
    both = gl.join(even, odd).reshape([pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon.jit
def exchanged(x, BIT: gl.constexpr):
    """x (warp 8 k), 8 being lanes / 4: adds what the lane that differs in BIT has; the first k/2 stay where it is 0."""
    k: gl.constexpr = x.shape[2]
    first, second = gl.split(gl.permute(x.reshape([4, 8, 2, k // 2]), (0, 1, 3, 2)))
    layout: gl.constexpr = first.type.layout
    lane = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    upper = gl.expand_dims(gl.expand_dims((lane >> BIT) & 1, 0), 2) != 0
    keep = gl.where(upper, second, first)
    send = gl.where(upper, first, second)
    if BIT == 2:
        got = gl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 16, 31, -1;", "=f,f", [send], dtype=gl.float32,
                                        is_pure=True, pack=1)
    elif BIT == 1:
        got = gl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 8, 31, -1;", "=f,f", [send], dtype=gl.float32,
                                        is_pure=True, pack=1)
    else:
        got = gl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 4, 31, -1;", "=f,f", [send], dtype=gl.float32,
                                        is_pure=True, pack=1)
    return keep + got


@gluon.jit
def column_sums(x):
    """Sums of x (64 64), a row accumulator, over the 16 rows of each warp: (4 64), two columns a lane."""
    rows = gl.sum(x.reshape([4, 2, 8, 64]), 1)  # rows 8 apart lie in one lane
    rows = exchanged(exchanged(exchanged(rows, 2), 1), 0)  # (4 8 8): lane group k has columns 8k to 8k + 7
    return rows.reshape([4, 64])


@gluon.jit
def of_pairs(products, scores, decay, step, total):
    """Of one head and block: the total of pairs with it, products times scores but for the step, and the weights."""
    layout: gl.constexpr = products.type.layout
    block = unpacked(scores, layout)
    products = products * decay
    total += products * gl.expand_dims(step, 1)
    weights = gl.convert_layout((block * decay).to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))
    return total, products * block, weights
