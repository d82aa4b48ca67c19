"""Gradients of B and C on a Hopper GPU, in Gluon: `ssd_queries` and `ssd_keys` in one kernel.

One program of 4 warps takes half the tokens of a chunk of 128 for the heads of a group; dC and dB stay in registers.
Two programs share an SM. The halves of a chunk are neighbours in the grid, so that the second finds the states in the
L2 cache. Order for one head (G: asynchronous products, committed in this order):

    G1 entered = C S^T   G2 dC += (dy entry) S   G3 dB += (x leave) dS   then the sums over p, half of S dS

The blocks of `pairs`, B and C that end the work come through the same ring, as one head more: their sizes are the same.
What it takes: see `hopper.takes`.
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

STAGES = gl.constexpr(2)
SIZES = ["size", "chunks", "H", "units", "t"]  # one compilation for all lengths and heads


@gluon.jit
def load_unit(x_desc, dy_desc, S_desc, dS_desc, full, xs, dys, Ss, dSs, s, b, token, column, state):
    """Starts the loads of one head's x, dy, entering and leaving states into stage s."""
    T: gl.constexpr = x_desc.block_type.shape[1]
    P: gl.constexpr = x_desc.block_type.shape[2]
    N: gl.constexpr = S_desc.block_type.shape[2]
    mbarrier.expect(full, 4 * T * P + 4 * P * N)
    tma.async_copy_global_to_shared(S_desc, [state, 0, 0], full, Ss.index(s))
    tma.async_copy_global_to_shared(dy_desc, [b, token, column], full, dys.index(s))
    tma.async_copy_global_to_shared(dS_desc, [state, 0, 0], full, dSs.index(s))
    tma.async_copy_global_to_shared(x_desc, [b, token, column], full, xs.index(s))


@gluon.jit
def load_pairs(pairs_desc, B_desc, C_desc, full, xs, dys, Ss, dSs, s, b, token, g, square):
    """Starts the loads for the pairs of tokens into stage s: in xs the pairs within the half of a chunk at `token`,
    in dys those from its first half to its second, in Ss the half's B, in dSs C or B of the other half."""
    T: gl.constexpr = B_desc.block_type.shape[1]
    N: gl.constexpr = B_desc.block_type.shape[2]
    mbarrier.expect(full, 4 * T * T + 4 * T * N)
    tma.async_copy_global_to_shared(pairs_desc, [square, token & T, token & T], full, xs.index(s))
    tma.async_copy_global_to_shared(pairs_desc, [square, 0, T], full, dys.index(s))
    tma.async_copy_global_to_shared(B_desc, [b, token, g * N], full, Ss.index(s))
    if token & T == 0:
        tma.async_copy_global_to_shared(C_desc, [b, token + T, g * N], full, dSs.index(s))
    else:
        tma.async_copy_global_to_shared(B_desc, [b, token - T, g * N], full, dSs.index(s))


@gluon.jit(do_not_specialize=SIZES)
def hopper_keys(
    x_desc, dy_desc, B_desc, C_desc, S_desc, dS_desc, pairs_desc, dB, dC, decays, entering, passing,
    size, chunks, H, units, t,
    SPLIT: gl.constexpr,
):
    """Program (c and half J of its tokens, g and split, b): dB, dC (split b t g n), descriptors if SPLIT is 1.

    decays (2 b h c*q): steps, then sums; `size` numbers of each. entering (b h c*q); passing (J b c h): each half J
    sums half of the states' elements. units: heads of a program, of 64 columns each.
    """
    T: gl.constexpr = x_desc.block_type.shape[1]
    P: gl.constexpr = x_desc.block_type.shape[2]
    N: gl.constexpr = S_desc.block_type.shape[2]
    dtype: gl.constexpr = x_desc.dtype
    c = gl.program_id(0) // 2
    J = gl.program_id(0) % 2
    b = gl.program_id(2)
    g = gl.program_id(1) // SPLIT
    split = gl.program_id(1) % SPLIT
    batch = gl.num_programs(2)
    u0 = gl.program_id(1) * units
    token = gl.program_id(0) * T
    state0 = (b * chunks + c) * H + u0
    square = (b * chunks + c) * gl.num_programs(1) + gl.program_id(1)

    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, T, P], x_desc.layout)
    dys = gl.allocate_shared_memory(dtype, [STAGES, 1, T, P], x_desc.layout)
    Ss = gl.allocate_shared_memory(dtype, [STAGES, 1, P, N], S_desc.layout)
    dSs = gl.allocate_shared_memory(dtype, [STAGES, 1, P, N], S_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [1, T, N], C_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    load_unit(x_desc, dy_desc, S_desc, dS_desc, full.index(0), xs, dys, Ss, dSs, 0, b, token, u0 * P, state0)
    mbarrier.expect(full.index(STAGES), 2 * T * N)
    tma.async_copy_global_to_shared(C_desc, [b, token, g * N], full.index(STAGES), Cs)
    if units > 1:
        load_unit(x_desc, dy_desc, S_desc, dS_desc, full.index(1), xs, dys, Ss, dSs, 1, b, token, u0 * P + P,
                  state0 + 1)
    else:
        load_pairs(pairs_desc, B_desc, C_desc, full.index(1), xs, dys, Ss, dSs, 1, b, token, g, square)

    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    rows: gl.constexpr = gl.SliceLayout(1, narrow)
    left_rows: gl.constexpr = gl.SliceLayout(1, left)
    flat: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])

    q = gl.arange(0, T, rows)
    # this half's numbers of head h lie at h * chunks * 2T from these
    row = (b * H + u0).to(gl.int64) * (chunks * (2 * T)) + token
    sums_at = decays + size + row
    steps_at = decays + row
    entering_at = entering + row
    passing_at = passing + (J * batch + b).to(gl.int64) * (chunks * H) + c * H + u0
    last_token = T - 1 + (1 - J) * T
    a = gl.load(sums_at + q)
    step = gl.load(steps_at + q)
    end = gl.load(sums_at + last_token)
    dC_acc = gl.zeros([T, N], gl.float32, wide)
    dB_acc = gl.zeros([T, N], gl.float32, wide)
    mbarrier.wait(full.index(STAGES), 0)
    gl.assume(units > 0)
    for u in range(units):
        now = u % STAGES
        entry = gl.exp2(a)
        leave = gl.convert_layout(gl.exp2(end - a) * step, left_rows, assert_trivial=True)
        mbarrier.wait(full.index(now), (u // STAGES) & 1)
        S = Ss.index(now).reshape([P, N])
        dS = dSs.index(now).reshape([P, N])
        zero = gl.zeros([T, P], gl.float32, narrow)
        entered = warpgroup_mma(Cs.reshape([T, N]), S.permute((1, 0)), zero, use_acc=False, is_async=True)
        scaled = widened(dys.index(now).reshape([T, P]).load(left))
        scaled *= gl.expand_dims(gl.convert_layout(entry, left_rows, assert_trivial=True), 1)
        dC_acc = warpgroup_mma(scaled.to(dtype), S, dC_acc, is_async=True)
        added = widened(xs.index(now).reshape([T, P]).load(left)) * gl.expand_dims(leave, 1)
        dB_acc = warpgroup_mma(added.to(dtype), dS, dB_acc, is_async=True)
        ahead = gl.minimum(u + 1, units - 1) * (chunks * (2 * T))
        next_a = gl.load(sums_at + ahead + q)
        next_step = gl.load(steps_at + ahead + q)
        next_end = gl.load(sums_at + ahead + last_token)
        entered, dC_acc, dB_acc = warpgroup_mma_wait(0, deps=(entered, dC_acc, dB_acc))
        entered *= widened(dys.index(now).reshape([T, P]).load(narrow))  # read again: no registers to keep it in
        entered_now = gl.sum(entered, 1) * entry
        # the same half of the elements of both, in whatever order they lie
        edge = Ss.index(now)._reinterpret(dtype, [2, P * N // 2], lines).index(J).load(flat)
        dedge = dSs.index(now)._reinterpret(dtype, [2, P * N // 2], lines).index(J).load(flat)
        gl.thread_barrier()  # all warps have read the stage
        following = u + STAGES
        if following < units:
            load_unit(x_desc, dy_desc, S_desc, dS_desc, full.index(now), xs, dys, Ss, dSs, now, b, token,
                      (u0 + following) * P, state0 + following)
        elif following == units:
            load_pairs(pairs_desc, B_desc, C_desc, full.index(now), xs, dys, Ss, dSs, now, b, token, g, square)
        passing_now = gl.sum(widened(edge) * widened(dedge), 0)
        gl.store(entering_at + u * (chunks * (2 * T)) + q, entered_now)
        gl.store(passing_at + u, gl.exp2(end) * passing_now)
        a, step, end = next_a, next_step, next_end

    # The pairs across the chunk are dB's in the first half, dC's in the second, and zero in the other product. Not two
    # arms of a branch: ptxas 12.8 then takes the second arm's descriptors from registers that only the first one sets.
    now = units % STAGES
    dys.index(1 - now)._reinterpret(dtype, [T * P], lines).store(gl.zeros([T * P], dtype, flat))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.wait(full.index(now), (units // STAGES) & 1)
    own = xs.index(now).reshape([T, T])
    other = dSs.index(now).reshape([T, N])
    to_dC = dys.index(1 - (now ^ J)).reshape([T, T]).permute((1, 0))
    to_dB = dys.index(now ^ J).reshape([T, T])
    dC_acc = warpgroup_mma(own.permute((1, 0)), Ss.index(now).reshape([T, N]), dC_acc, is_async=True)
    dC_acc = warpgroup_mma(to_dC, other, dC_acc, is_async=True)
    dB_acc = warpgroup_mma(own, Cs.reshape([T, N]), dB_acc, is_async=True)
    dB_acc = warpgroup_mma(to_dB, other, dB_acc, is_async=True)
    dC_acc, dB_acc = warpgroup_mma_wait(0, deps=(dC_acc, dB_acc))
    store_tiles(dC_acc, dB_acc, dC, dB, Ss.index(1 - now), dSs.index(1 - now), split * batch + b, token, g, t, SPLIT)


@gluon.jit
def store_tiles(dC_acc, dB_acc, dC, dB, buffer_C, buffer_B, b, token, g, t, SPLIT: gl.constexpr):
    """dC, dB of 64 tokens; in the free stage's states first if they go by TMA, else (float32) straight out."""
    T: gl.constexpr = dC_acc.shape[0]
    N: gl.constexpr = dC_acc.shape[1]
    if SPLIT == 1:
        buffer_C.reshape([T, N]).store(dC_acc.to(buffer_C.dtype))
        buffer_B.reshape([T, N]).store(dB_acc.to(buffer_B.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dC, [b, token, g * N], buffer_C)
        tma.async_copy_shared_to_global(dB, [b, token, g * N], buffer_B)
        tma.store_wait(0)
    else:
        G = gl.num_programs(1) // SPLIT
        q = token + gl.arange(0, T, gl.SliceLayout(1, dC_acc.type.layout))
        n = gl.arange(0, N, gl.SliceLayout(0, dC_acc.type.layout))
        at = b.to(gl.int64) * t * (G * N) + g * N
        at += gl.expand_dims(q, 1) * (G * N) + gl.expand_dims(n, 0)
        mask = gl.expand_dims(q, 1) < t
        gl.store(dC + at, dC_acc, mask=mask)
        gl.store(dB + at, dB_acc, mask=mask)
