"""SSD backward within a chunk on a Hopper GPU, in Gluon: `ssd_gram` and `ssd_inputs` in one kernel.

A program takes one half (64 source tokens j) of a chunk of 128 and the heads of a group, or of a part of one, in turn:
one warpgroup, two programs per SM, tiles by TMA into a ring of two stages, products asynchronous, accumulators with a
row per source token. Per head, with the blocks (from j, to i) of the same half and, for the first half, across:

    left = exp2(end - a) B dS^T + sum over blocks of W dy      W = scores exp2(a_i - a_j), from registers
    G    = x dy^T                                              the sum over heads of G exp2(a_i - a_j) step: pairs

The diagonal is taken out of the scores before the loop: its part in `left` is a multiple of dy, which D dy adds anyway,
and the sums over pairs must not have it. Sums over pairs to each token i run over rows, hence over lanes and warps:
three exchanges that halve the columns a lane keeps, then 4 numbers per column in shared memory.
What it takes: see `hopper.takes`; heads of 64 columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hinny.ops.kernels.hopper_forward import widened

SIZES = ["size", "chunks", "H", "heads", "split", "parts"]  # one compilation for all lengths and heads


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
def load_rows(
    x_desc, dy_desc, decays_desc, full, xs, dys, steps, sums, b, token, h, at, size, live, BYTES: gl.constexpr,
):
    """Starts the loads of a head's x, dy and decays; BYTES is all that `full` waits for, the state included."""
    P: gl.constexpr = x_desc.block_type.shape[2]
    mbarrier.expect(full, BYTES, pred=live)
    tma.async_copy_global_to_shared(x_desc, [b, token, h * P], full, xs, pred=live)
    tma.async_copy_global_to_shared(dy_desc, [b, token, h * P], full, dys, pred=live)
    tma.async_copy_global_to_shared(decays_desc, [at], full, steps, pred=live)
    tma.async_copy_global_to_shared(decays_desc, [at + size], full, sums, pred=live)


@gluon.jit
def of_pairs(products, scores, decay, step, total):
    """Of one head and block: the total of pairs with it, products times scores but for the step, and the weights."""
    layout: gl.constexpr = products.type.layout
    block = unpacked(scores, layout)
    products = products * decay
    total += products * gl.expand_dims(step, 1)
    weights = gl.convert_layout((block * decay).to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))
    return total, products * block, weights


@gluon.jit
def half_chunk(
    x_desc, dy_desc, B_desc, C_desc, dS_desc, dx_desc, decays_desc, D, direct, leaving, skipped, enclosed, crossed,
    pairs, size, chunks, H, heads, b, c, g, part, parts, N: gl.constexpr, STAGES: gl.constexpr, CROSS: gl.constexpr,
):
    """The program's work: the first half of chunk c if CROSS, else the second; `part` of all `parts`, of group g."""
    P: gl.constexpr = x_desc.block_type.shape[2]
    HALF: gl.constexpr = x_desc.block_type.shape[1]
    Q: gl.constexpr = 2 * HALF
    WIDTH: gl.constexpr = Q if CROSS else HALF
    dtype: gl.constexpr = x_desc.dtype
    BYTES: gl.constexpr = (2 + CROSS) * 2 * HALF * P + 2 * P * N + 2 * 4 * Q
    OWN: gl.constexpr = 0 if CROSS else HALF  # where the sources lie in the chunk
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, square)
    columns: gl.constexpr = gl.SliceLayout(0, square)
    across: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    spread: gl.constexpr = gl.SliceLayout(0, across)

    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, HALF, P], x_desc.layout)
    dys = gl.allocate_shared_memory(dtype, [STAGES, 1, WIDTH, P], dy_desc.layout)
    dSs = gl.allocate_shared_memory(dtype, [STAGES, 1, P, N], dS_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [1, 1, HALF, N], B_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [1, HALF, P], dx_desc.layout)
    steps_s = gl.allocate_shared_memory(gl.float32, [STAGES, Q], decays_desc.layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [STAGES, Q], decays_desc.layout)
    plain1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    gains = gl.allocate_shared_memory(gl.float32, [4, WIDTH], plain2)
    losses = gl.allocate_shared_memory(gl.float32, [WIDTH], plain1)
    diagonal = gl.allocate_shared_memory(gl.float32, [HALF], plain1)  # of the scores; 2 registers fewer in the loop
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(s), count=1)
    losses.store(gl.zeros([WIDTH], gl.float32, spread))
    fence_async_shared()

    token = c * Q + OWN
    first = part * heads
    at = (b * H + first) * (chunks * Q) + c * Q
    state = (b * chunks + c) * H + first
    # B and C first; C lies where the states will
    start = full.index(STAGES)
    mbarrier.expect(start, (2 + CROSS) * 2 * HALF * N)
    tma.async_copy_global_to_shared(B_desc, [b, token, g * N], start, Bs.index(0))
    tma.async_copy_global_to_shared(C_desc, [b, token, g * N], start, dSs.index(0))
    if CROSS:
        tma.async_copy_global_to_shared(C_desc, [b, token + HALF, g * N], start, dSs.index(1))
    for s in gl.static_range(STAGES):
        load_rows(x_desc, dy_desc, decays_desc, full.index(s), xs.index(s), dys.index(s), steps_s.index(s),
                  sums_s.index(s), b, token, first + s, at + s * (chunks * Q), size, s < heads, BYTES)

    j = gl.arange(0, HALF, rows)
    i = gl.arange(0, HALF, columns)
    zero = gl.zeros([HALF, HALF], gl.float32, square)
    mbarrier.wait(start, 0)
    bs = Bs.index(0).reshape([HALF, N])
    scores = warpgroup_mma(bs, dSs.index(0).reshape([HALF, N]).permute((1, 0)), zero, use_acc=False, is_async=True)
    if CROSS:
        scores1 = warpgroup_mma(bs, dSs.index(1).reshape([HALF, N]).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores, scores1 = warpgroup_mma_wait(0, deps=(scores, scores1))
        scores1 = packed(scores1)
        total1 = zero
    else:
        scores = warpgroup_mma_wait(0, deps=(scores,))
    diagonal.store(gl.sum(gl.where(gl.expand_dims(i, 0) == gl.expand_dims(j, 1), scores, 0.0), 1))
    scores = packed(gl.where(gl.expand_dims(i, 0) > gl.expand_dims(j, 1), scores, 0.0))
    total = zero
    gl.thread_barrier()  # all warps have read C
    for s in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(dS_desc, [state + s, 0, 0], full.index(s), dSs.index(s), pred=s < heads)

    q = gl.arange(0, WIDTH, spread)
    for r in range(heads):
        now = r % STAGES
        d = 0.0
        if D is not None:
            d = gl.load(D + first + r).to(gl.float32)
        x_tile = xs.index(now).reshape([HALF, P])
        dy_tiles = dys.index(now).reshape([WIDTH, P])
        dy_tile = dy_tiles.slice(0, HALF, 0)
        mbarrier.wait(full.index(now), (r // STAGES) & 1)
        B_tile = Bs.index(r >> 30).reshape([HALF, N])  # 0, but so that its descriptors take no registers over the loop
        dS_tile = dSs.index(now).reshape([P, N])
        left = warpgroup_mma(B_tile, dS_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        products = warpgroup_mma(x_tile, dy_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        step = steps_s.index(now).slice(OWN, HALF, 0).load(rows)
        sources = sums_s.index(now).slice(OWN, HALF, 0)
        before = sources.load(rows)
        # below the diagonal scores are 0 and the decay must only be finite, also times products
        decay = gl.expand_dims(sources.load(columns), 0) - gl.expand_dims(before, 1)
        decay = gl.exp2(gl.minimum(decay, 64.0))
        leave = gl.exp2(sums_s.index(now).slice(Q - 1, 1, 0).load(rows) - before)

        left = warpgroup_mma_wait(1, deps=(left,))
        left = left * gl.expand_dims(leave, 1)
        gl.store(leaving + at + OWN + j, step * gl.sum(widened(x_tile.load(square)) * left, 1))
        products = warpgroup_mma_wait(0, deps=(products,))
        total, felt, weights = of_pairs(products, scores, decay, step, total)
        if CROSS:
            other = dy_tiles.slice(HALF, HALF, 0)
            products = warpgroup_mma(x_tile, other.permute((1, 0)), zero, use_acc=False, is_async=True)
        left = warpgroup_mma(weights, dy_tile, left, is_async=True)
        lost = step * gl.sum(felt, 1)
        gain = column_sums(felt * gl.expand_dims(step, 1))
        if CROSS:
            decay = gl.expand_dims(sums_s.index(now).slice(HALF, HALF, 0).load(columns), 0) - gl.expand_dims(before, 1)
            decay = gl.exp2(decay)
            products = warpgroup_mma_wait(1, deps=(products,))
            total1, felt, weights = of_pairs(products, scores1, decay, step, total1)
            left = warpgroup_mma(weights, other, left, is_async=True)
            gl.store(crossed + at + OWN + j, -step * gl.sum(felt, 1))
            gain1 = column_sums(felt * gl.expand_dims(step, 1))
        tma.store_wait(0)  # and a barrier: the last head's dx and sums have been read
        if CROSS:
            gains.store(gl.permute(gl.join(gain, gain1), (0, 2, 1)).reshape([4, WIDTH]))
            losses.slice(0, HALF, 0).store(lost)
        else:
            gains.store(gain)
            losses.store(lost)
        x = widened(x_tile.load(square))
        dy = widened(dy_tile.load(square))
        skip = gl.sum(x * dy, 1)
        if D is not None:
            gl.store(skipped + at + OWN + j, skip)
        own = diagonal.load(rows)
        left = warpgroup_mma_wait(0, deps=(left,))
        gl.store(direct + at + OWN + j, gl.sum(x * left, 1) + own * skip)
        left = left * gl.expand_dims(step, 1) + gl.expand_dims(own * step + d, 1) * dy
        outs.reshape([HALF, P]).store(left.to(dtype))
        fence_async_shared()
        h = first + r
        tma.async_copy_shared_to_global(dx_desc, [b, token, h * P], outs)
        # after the barrier that this store needs: all warps have left the stage
        live = r + STAGES < heads
        load_rows(x_desc, dy_desc, decays_desc, full.index(now), xs.index(now), dys.index(now), steps_s.index(now),
                  sums_s.index(now), b, token, h + STAGES, at + STAGES * (chunks * Q), size, live, BYTES)
        tma.async_copy_global_to_shared(dS_desc, [state + STAGES, 0, 0], full.index(now), dSs.index(now), pred=live)
        gained = gl.sum(gains.load(across), 0) - losses.load(spread)
        gl.store(enclosed + at + OWN + q, gained, mask=q < HALF)
        if CROSS:
            gl.store(crossed + at + q, gained, mask=q >= HALF)
        at += chunks * Q
        state += 1
    tma.store_wait(0)
    square_of = ((b.to(gl.int64) * chunks + token // Q) * parts + part) * (Q * Q)
    tile = gl.expand_dims(j, 1) * Q + gl.expand_dims(i, 0) + square_of
    # the 0 that is added: comparisons that the compiler knows from before the loop would take registers in it
    total = gl.where(gl.expand_dims(i, 0) >= gl.expand_dims(j + (heads >> 30), 1), total, 0.0)
    if CROSS:
        gl.store(pairs + tile, total.to(dtype))
        gl.store(pairs + tile + HALF, total1.to(dtype))
    else:
        gl.store(pairs + tile + (HALF * Q + HALF), total.to(dtype))


@gluon.jit(do_not_specialize=SIZES)
def hopper_within(
    x_desc, dy_desc, dys_desc, B_desc, C_desc, dS_desc, dx_desc, decays_desc, D, direct, leaving, skipped, enclosed,
    crossed, pairs, size, chunks, H, heads, split, parts, N: gl.constexpr, STAGES: gl.constexpr,
):
    """Program (c and half, g and split, b); decays (2 b h c*q): steps, then sums; `size` numbers of each.

    dy_desc has tiles of half a chunk, dys_desc of a whole one. Fills dx (b t h p), the sums per head and token
    (b h c*q) float32, and pairs (b c g split q q) but for the block from second to first half; skipped if D is given.
    """
    c, half = gl.program_id(0) // 2, gl.program_id(0) % 2
    part, b = gl.program_id(1), gl.program_id(2)
    g = part // split
    if half == 0:
        half_chunk(x_desc, dys_desc, B_desc, C_desc, dS_desc, dx_desc, decays_desc, D, direct, leaving, skipped,
                   enclosed, crossed, pairs, size, chunks, H, heads, b, c, g, part, parts, N, STAGES, True)
    else:
        half_chunk(x_desc, dy_desc, B_desc, C_desc, dS_desc, dx_desc, decays_desc, D, direct, leaving, skipped,
                   enclosed, crossed, pairs, size, chunks, H, heads, b, c, g, part, parts, N, STAGES, False)
