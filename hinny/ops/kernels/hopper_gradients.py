"""SSD backward but for the walk on a Hopper GPU, in Gluon: dx, dB, dC and what ddt needs, reading everything once.

A tile is a half (64 tokens) of a chunk of 128 and the heads of a group, or a part of them. The state in the middle of
the chunk (for its second half), or that state's gradient (for the first), is made from the one at the chunk's edge and
the other half's tokens; then a half is a chunk of its own, with S the state entering it and dS the gradient of the one
leaving. Programs stay and take one tile after the other, head after head, in four partitions:

    produce   a ring of stages: x, dy, the states at the chunk's edges, decays; x or dy of the other half
    middle    keep S + (leave x)^T B, or keep dS + (entry dy)^T C, in place of the state that it comes from;
              entered = C S^T for `entering`; sums of S dS
    keys      dC += (entry dy) S   dB += (leave x) dS   and at a tile's end dC += pairs^T B   dB += pairs C
    square    G = x dy^T   left = leave B dS^T + W dy, W = scores decay   dx   pairs = sum over heads of G decay step

The halves of a chunk are neighbours in the order of tiles, so that the second finds what they share in the L2 cache.
Sums over pairs: see `hopper_pairs.py`. What it takes: see `hopper.takes`; heads of 64 columns.
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
from hinny.ops.kernels.hopper_pairs import column_sums, of_pairs, packed

SIZES = ["size", "chunks", "H", "heads", "split", "parts", "tiles", "t"]  # one compilation for all lengths and heads
AHEAD = gl.constexpr(2)  # tiles of the other half that are kept: only `middle` reads them, and soon


@gluon.jit
def place(tile, chunks, parts, ORDER: gl.constexpr):
    """Half, chunk, part of the heads and sequence of a tile; after the halves, chunks or (ORDER 1) parts go fastest."""
    pair = tile // 2
    if ORDER == 0:
        c, part = pair % chunks, pair // chunks % parts
    else:
        c, part = pair // parts % chunks, pair % parts
    return tile % 2, c, part, pair // chunks // parts


@gluon.jit
def of(vectors, i, size):
    """The i-th of the vectors, each of `size` numbers."""
    return vectors + i * size.to(gl.int64)


@gluon.jit
def produce(
    x_desc, dy_desc, B_desc, C_desc, S_desc, dS_desc, decays_desc, full, empty, others_empty, keys_full, keys_empty,
    other_full, other_empty, xs, dys, others, states, Bs, Cs, Ks, decays, size, chunks, H, heads, split, parts, tiles,
    STAGES: gl.constexpr, ORDER: gl.constexpr,
):
    """The producer warp. Decays of a stage: the chunk's steps, then its sums."""
    LATEST: gl.constexpr = AHEAD if AHEAD < STAGES else STAGES - 1
    T: gl.constexpr = xs.shape[2]
    P: gl.constexpr = xs.shape[3]
    N: gl.constexpr = Bs.shape[3]
    it, n = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        half, c, part, b = place(tile, chunks, parts, ORDER)
        token, across = (2 * c + half) * T, (2 * c + 1 - half) * T
        column = part // split * N
        mbarrier.wait(other_empty, (n & 1) ^ 1)
        mbarrier.expect(other_full, 2 * T * N)
        tma.async_copy_global_to_shared(C_desc, [b, across, column], other_full, Ks.index(0), pred=half == 0)
        tma.async_copy_global_to_shared(B_desc, [b, across, column], other_full, Ks.index(0), pred=half == 1)
        for r in range(heads):
            now = it % STAGES
            h = part * heads + r
            at = ((b * H + h) * chunks + c) * (2 * T)
            state = (b * chunks + c) * H + h
            bar = full.index(now)
            mbarrier.wait(empty.index(now), ((it // STAGES) & 1) ^ 1)
            mbarrier.wait(others_empty.index(it % AHEAD), ((it // AHEAD) & 1) ^ 1)
            mbarrier.expect(bar, 3 * 2 * T * P + 2 * 2 * P * N + 4 * 4 * T)
            tma.async_copy_global_to_shared(S_desc, [state, 0, 0], bar, states.index(2 * now))
            tma.async_copy_global_to_shared(dS_desc, [state, 0, 0], bar, states.index(2 * now + 1))
            other = others.index(it % AHEAD)
            tma.async_copy_global_to_shared(dy_desc, [b, across, h * P], bar, other, pred=half == 0)
            tma.async_copy_global_to_shared(x_desc, [b, across, h * P], bar, other, pred=half == 1)
            tma.async_copy_global_to_shared(x_desc, [b, token, h * P], bar, xs.index(now))
            tma.async_copy_global_to_shared(dy_desc, [b, token, h * P], bar, dys.index(now))
            tma.async_copy_global_to_shared(decays_desc, [at], bar, decays.index(2 * now))
            tma.async_copy_global_to_shared(decays_desc, [at + size], bar, decays.index(2 * now + 1))
            # late, since the last tile's B and C are in use; any later, `middle` would wait for them while this waits
            # for it to leave a tile of the other half
            if r == gl.minimum(LATEST, heads - 1):
                mbarrier.wait(keys_empty, (n & 1) ^ 1)
                mbarrier.expect(keys_full, 2 * 2 * T * N)
                tma.async_copy_global_to_shared(B_desc, [b, token, column], keys_full, Bs.index(0))
                tma.async_copy_global_to_shared(C_desc, [b, token, column], keys_full, Cs.index(0))
            it += 1
        n += 1


@gluon.jit
def middle(
    full, ready, empty, others_empty, other_full, other_empty, keys_full, pairs_full, dys, others, states, Cs, Ks,
    decays, vectors, passing, size, chunks, H, heads, parts, tiles, STAGES: gl.constexpr, ORDER: gl.constexpr,
):
    """What the middle of the chunk hands to this half: forwards the state if it is the second one, else its gradient;
    then `entering` and `passing`."""
    T: gl.constexpr = Ks.shape[2]
    N: gl.constexpr = Ks.shape[3]
    P: gl.constexpr = states.shape[2]
    WIDTH: gl.constexpr = 64
    dtype: gl.constexpr = Ks.dtype
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    tokens: gl.constexpr = gl.SliceLayout(1, narrow)
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, left)
    flat: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    single: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q = gl.arange(0, T, tokens)
    first = gl.arange(0, 1, single)
    it, n = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        half, c, part, b = place(tile, chunks, parts, ORDER)
        forwards = half == 1
        out = passing + ((b * chunks + c) * 2 + half) * H + part * heads
        at = (b * H + part * heads) * (chunks * (2 * T)) + (2 * c + half) * T
        mbarrier.wait(other_full, n & 1)
        for r in range(heads):
            now = it % STAGES
            mbarrier.wait(full.index(now), (it // STAGES) & 1)
            far = decays.index(4 * now + 3 - half)
            a = far.load(columns)
            far_end = far.slice(T - 1, 1, 0)
            own = decays.index(4 * now + 2 + half)
            own_end = own.slice(T - 1, 1, 0)
            weight = gl.exp2(gl.where(forwards, far_end.load(columns) - a, a - own_end.load(columns)))
            weight = gl.where(forwards, weight * decays.index(4 * now + 1 - half).load(columns), weight)
            value = widened(others.index(it % AHEAD).reshape([T, P]).permute((1, 0)).load(left))  # (p, token)
            added = (value * gl.expand_dims(weight, 0)).to(dtype)
            keep = gl.exp2(far_end.load(rows) - gl.where(forwards, 0.0, own_end.load(rows)))  # of the other half
            edge = states.index(2 * now + 1 - half).reshape([P, N])
            K_tile = Ks.index(r >> 30).reshape([T, N])  # 0, but so that its descriptors take no registers over the loop
            for k in gl.static_range(N // WIDTH):  # a part at a time, for registers
                some = edge.slice(k * WIDTH, WIDTH, 1)
                state = widened(some.load(wide)) * gl.expand_dims(keep, 1)
                state = warpgroup_mma(added, K_tile.slice(k * WIDTH, WIDTH, 1), state, is_async=True)
                if k == 0:
                    gl.thread_barrier()  # all warps have read the other half's tile
                    mbarrier.arrive(others_empty.index(it % AHEAD), count=1)
                state = warpgroup_mma_wait(0, deps=(state,))
                some.store(state.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(ready.index(now), count=1)

            mbarrier.wait(keys_full, n & 1)
            S_tile = states.index(2 * now).reshape([P, N])
            zero = gl.zeros([T, P], gl.float32, narrow)
            entered = warpgroup_mma(Cs.index(r >> 30).reshape([T, N]), S_tile.permute((1, 0)), zero, use_acc=False,
                                    is_async=True)
            # the same elements of both, in whatever order they lie
            S = states.index(2 * now)._reinterpret(dtype, [P * N], lines).load(flat)
            dS = states.index(2 * now + 1)._reinterpret(dtype, [P * N], lines).load(flat)
            passes = gl.sum(widened(S) * widened(dS), 0)
            kept = own_end.load(single) - gl.where(forwards, far_end.load(single), 0.0)
            entry = gl.exp2(own.load(tokens) - gl.where(forwards, far_end.load(tokens), 0.0))
            dy = widened(dys.index(now).reshape([T, P]).load(narrow))
            entered = warpgroup_mma_wait(0, deps=(entered,))
            gl.thread_barrier()  # all warps have read the stage
            mbarrier.arrive(empty.index(now), count=1)
            gl.store(of(vectors, 2, size) + at + q, gl.sum(entered * dy, 1) * entry)
            gl.store(out + r + first, passes * gl.exp2(kept))
            at += chunks * (2 * T)
            it += 1
        mbarrier.arrive(other_empty, count=1)
        mbarrier.arrive(pairs_full, count=1)
        n += 1


@gluon.jit
def keys(
    dB, dC, full, ready, empty, keys_full, keys_empty, pairs_full, xs, dys, states, Bs, Cs, pairs, decays,
    chunks, heads, split, parts, tiles, t, STAGES: gl.constexpr, ORDER: gl.constexpr,
):
    """dB and dC of the tile's tokens, in registers over its heads."""
    T: gl.constexpr = xs.shape[2]
    P: gl.constexpr = xs.shape[3]
    N: gl.constexpr = Bs.shape[3]
    dtype: gl.constexpr = xs.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    rows: gl.constexpr = gl.SliceLayout(1, left)
    it, n = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        half = tile % 2
        dC_acc = gl.zeros([T, N], gl.float32, wide)
        dB_acc = gl.zeros([T, N], gl.float32, wide)
        for _ in range(heads):
            now = it % STAGES
            mbarrier.wait(full.index(now), (it // STAGES) & 1)
            own = decays.index(4 * now + 2 + half)
            a = own.load(rows)
            entry = gl.exp2(a - gl.where(half == 1, decays.index(4 * now + 2).slice(T - 1, 1, 0).load(rows), 0.0))
            scaled = widened(dys.index(now).reshape([T, P]).load(left)) * gl.expand_dims(entry, 1)
            scaled = scaled.to(dtype)
            mbarrier.wait(ready.index(now), (it // STAGES) & 1)
            dC_acc = warpgroup_mma(scaled, states.index(2 * now).reshape([P, N]), dC_acc, is_async=True)
            leave = gl.exp2(own.slice(T - 1, 1, 0).load(rows) - a) * decays.index(4 * now + half).load(rows)
            added = widened(xs.index(now).reshape([T, P]).load(left)) * gl.expand_dims(leave, 1)
            added = added.to(dtype)
            dB_acc = warpgroup_mma(added, states.index(2 * now + 1).reshape([P, N]), dB_acc, is_async=True)
            dC_acc, dB_acc = warpgroup_mma_wait(0, deps=(dC_acc, dB_acc))
            gl.thread_barrier()  # all warps have read the stage
            mbarrier.arrive(empty.index(now), count=1)
            it += 1
        mbarrier.wait(keys_full, n & 1)
        mbarrier.wait(pairs_full, n & 1)  # from here on B and C are this partition's alone
        square = pairs.reshape([T, T])
        none = it >> 30
        half, c, part, b = place(tile + none, chunks, parts, ORDER)
        dC_acc = warpgroup_mma(square.permute((1, 0)), Bs.index(none).reshape([T, N]), dC_acc, is_async=True)
        dB_acc = warpgroup_mma(square, Cs.index(none).reshape([T, N]), dB_acc, is_async=True)
        dC_acc, dB_acc = warpgroup_mma_wait(0, deps=(dC_acc, dB_acc))
        gl.thread_barrier()
        mbarrier.arrive(keys_empty, count=1)
        token = (2 * c + half) * T + gl.arange(0, T, gl.SliceLayout(1, wide))
        column = gl.arange(0, N, gl.SliceLayout(0, wide))
        width = parts // split * N
        row = part % split * (tiles // 2 // chunks // parts) + b
        places = (row.to(gl.int64) * t + gl.expand_dims(token, 1)) * width + part // split * N
        places += gl.expand_dims(column, 0)
        mask = gl.expand_dims(token, 1) < t
        gl.store(dC + places, dC_acc.to(dC.dtype.element_ty), mask=mask)
        gl.store(dB + places, dB_acc.to(dB.dtype.element_ty), mask=mask)
        n += 1


@gluon.jit
def square(
    dx_desc, D, full, ready, empty, keys_full, pairs_full, xs, dys, states, Bs, Cs, outs, decays, gains, losses,
    diagonal, vectors, size, chunks, H, heads, parts, tiles,
    STAGES: gl.constexpr, ORDER: gl.constexpr,
):
    """dx, and the pairs for `keys`, left where dx was."""
    T: gl.constexpr = xs.shape[2]
    P: gl.constexpr = xs.shape[3]
    N: gl.constexpr = Bs.shape[3]
    dtype: gl.constexpr = xs.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    across: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    spread: gl.constexpr = gl.SliceLayout(0, across)
    j = gl.arange(0, T, rows)
    i = gl.arange(0, T, columns)
    q = gl.arange(0, T, spread)
    zero = gl.zeros([T, T], gl.float32, layout)
    it, n = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        half, c, part, b = place(tile, chunks, parts, ORDER)
        token = (2 * c + half) * T
        at = (b * H + part * heads) * (chunks * (2 * T)) + token
        mbarrier.wait(keys_full, n & 1)
        none = tile >> 30  # 0, but so that what depends on it takes no registers over the heads
        scores = warpgroup_mma(Bs.index(none).reshape([T, N]), Cs.index(none).reshape([T, N]).permute((1, 0)), zero,
                               use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        diagonal.store(gl.sum(gl.where(gl.expand_dims(i, 0) == gl.expand_dims(j + none, 1), scores, 0.0), 1))
        scores = packed(gl.where(gl.expand_dims(i, 0) > gl.expand_dims(j + none, 1), scores, 0.0))
        total = zero
        for r in range(heads):
            now = it % STAGES
            h = part * heads + r
            d = 0.0
            if D is not None:
                d = gl.load(D + h).to(gl.float32)
            x_tile = xs.index(now).reshape([T, P])
            dy_tile = dys.index(now).reshape([T, P])
            mbarrier.wait(full.index(now), (it // STAGES) & 1)
            products = warpgroup_mma(x_tile, dy_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            step = decays.index(4 * now + half).load(rows)
            sums = decays.index(4 * now + 2 + half)
            before = sums.load(rows)
            # below the diagonal scores are 0 and the decay must only be finite, also times products
            decay = gl.expand_dims(sums.load(columns), 0) - gl.expand_dims(before, 1)
            decay = gl.exp2(gl.minimum(decay, 64.0))
            leave = gl.exp2(sums.slice(T - 1, 1, 0).load(rows) - before)
            mbarrier.wait(ready.index(now), (it // STAGES) & 1)
            dS_tile = states.index(2 * now + 1).reshape([P, N])
            # r >> 30 is 0, but so that descriptors take no registers over the loop
            left = warpgroup_mma(Bs.index(r >> 30).reshape([T, N]), dS_tile.permute((1, 0)), zero, use_acc=False,
                                 is_async=True)
            products = warpgroup_mma_wait(1, deps=(products,))
            total, felt, weights = of_pairs(products, scores, decay, step, total)
            lost = step * gl.sum(felt, 1)
            gain = column_sums(felt * gl.expand_dims(step, 1))
            left = warpgroup_mma_wait(0, deps=(left,))
            left = left * gl.expand_dims(leave, 1)
            gl.store(of(vectors, 3, size) + at + j, step * gl.sum(widened(x_tile.load(layout)) * left, 1))
            left = warpgroup_mma(weights, dy_tile, left, is_async=True)
            tma.store_wait(0)
            gl.thread_barrier()  # the last head's dx and sums have been read
            gains.store(gain)
            losses.store(lost)
            x = widened(x_tile.load(layout))
            dy = widened(dy_tile.load(layout))
            skip = gl.sum(x * dy, 1)
            if D is not None:
                gl.store(of(vectors, 4, size) + at + j, skip)
            own = diagonal.load(rows)
            left = warpgroup_mma_wait(0, deps=(left,))
            gl.store(vectors + at + j, gl.sum(x * left, 1) + own * skip)
            left = left * gl.expand_dims(step, 1) + gl.expand_dims(own * step + d, 1) * dy
            outs.reshape([T, P]).store(left.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dx_desc, [b, token, h * P], outs)
            mbarrier.arrive(empty.index(now), count=1)  # since the barrier all warps have left the stage
            gained = gl.sum(gains.load(across), 0) - losses.load(spread)
            gl.store(of(vectors, 1, size) + at + q, gained)
            at += chunks * (2 * T)
            it += 1
        total = gl.where(gl.expand_dims(i, 0) >= gl.expand_dims(j + (tile >> 30), 1), total, 0.0)
        tma.store_wait(0)
        gl.thread_barrier()
        outs.reshape([T, T]).store(total.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(pairs_full, count=1)
        n += 1


@gluon.jit(do_not_specialize=SIZES)
def hopper_gradients(
    x_desc, dy_desc, B_desc, C_desc, S_desc, dS_desc, dx_desc, decays_desc, D, dB, dC, vectors, passing, size, chunks,
    H, heads, split, parts, tiles, t,
    STAGES: gl.constexpr, ORDER: gl.constexpr, KEYS: gl.constexpr, MIDDLE: gl.constexpr, PRODUCE: gl.constexpr,
):
    """Tiles (half, c, g and split, b). Descriptors of x, dy, dx (b t h*p), B, C (b t g*n), in tiles of half a chunk, S,
    dS (b c h, p, n) and decays: `size` steps (b h c*q), then their sums.

    dB, dC (split b t g n). vectors (5 b h c*q): direct, enclosed, entering, leaving and, if D is given, skipped, for
    `ssd_finish` with chunks of half the length, as is passing (b 2*c h). KEYS, MIDDLE, PRODUCE: registers of these
    partitions; `square` has what is left.
    """
    T: gl.constexpr = x_desc.block_type.shape[1]
    P: gl.constexpr = x_desc.block_type.shape[2]
    N: gl.constexpr = B_desc.block_type.shape[2]
    dtype: gl.constexpr = x_desc.dtype
    plain1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, T, P], x_desc.layout)
    dys = gl.allocate_shared_memory(dtype, [STAGES, 1, T, P], x_desc.layout)
    others = gl.allocate_shared_memory(dtype, [AHEAD, 1, T, P], x_desc.layout)
    states = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, P, N], S_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [1, 1, T, N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [1, 1, T, N], C_desc.layout)
    Ks = gl.allocate_shared_memory(dtype, [1, 1, T, N], B_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [1, T, P], dx_desc.layout)
    chunk_decays = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 2 * T], decays_desc.layout)
    decays = chunk_decays._reinterpret(gl.float32, [4 * STAGES, T], plain1)  # of halves
    gains = gl.allocate_shared_memory(gl.float32, [4, T], plain2)
    losses = gl.allocate_shared_memory(gl.float32, [T], plain1)
    diagonal = gl.allocate_shared_memory(gl.float32, [T], plain1)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    others_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    tile_bars = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=3)
    for s in gl.static_range(AHEAD):
        mbarrier.init(others_empty.index(s), count=1)
    for s in gl.static_range(5):
        mbarrier.init(tile_bars.index(s), count=2 if s == 2 else 1)
    fence_async_shared()
    keys_full, keys_empty, pairs_full = tile_bars.index(0), tile_bars.index(1), tile_bars.index(2)
    other_full, other_empty = tile_bars.index(3), tile_bars.index(4)
    gl.warp_specialize([
        (square, (dx_desc, D, full, ready, empty, keys_full, pairs_full, xs, dys, states, Bs, Cs, outs, decays, gains,
                  losses, diagonal, vectors, size, chunks, H, heads, parts, tiles, STAGES, ORDER)),
        (keys, (dB, dC, full, ready, empty, keys_full, keys_empty, pairs_full, xs, dys, states, Bs, Cs, outs, decays,
                chunks, heads, split, parts, tiles, t, STAGES, ORDER)),
        (middle, (full, ready, empty, others_empty, other_full, other_empty, keys_full, pairs_full, dys, others, states,
                  Cs, Ks, decays, vectors, passing, size, chunks, H, heads, parts, tiles, STAGES, ORDER)),
        (produce, (x_desc, dy_desc, B_desc, C_desc, S_desc, dS_desc, decays_desc, full, empty, others_empty, keys_full,
                   keys_empty, other_full, other_empty, xs, dys, others, states, Bs, Cs, Ks, chunk_decays, size, chunks,
                   H, heads, split, parts, tiles, STAGES, ORDER)),
    ], [4, 4, 1], [KEYS, MIDDLE, PRODUCE])
