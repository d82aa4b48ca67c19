"""States at the edges of chunks on a Hopper GPU, in Gluon: `ssd_boundaries` with everything overlapped.

One program of 4 warps walks the chunks of one head, or of 64 of its columns, with the state in registers; two programs
share an SM. Half of them walk forward over x and B, half backwards over dy and C.

A chunk: the state goes to shared memory in bfloat16, decays, and takes (value weight)^T key from an asynchronous
product; a barrier; while it runs, the stored state leaves (TMA) and the weights of the next chunk are written; a
barrier; the stage is filled again. What it takes: see `hopper.takes`.
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
SIZES = ["size", "chunks", "parts", "part_chunks", "H", "per_group", "batch"]  # one compilation for all of them


@gluon.jit
def load_chunk(x_desc, B_desc, dy_desc, C_desc, full, values, keys, b, token, column, key_column, backwards):
    """Starts the loads of a chunk's values (q p) and keys (q n)."""
    Q: gl.constexpr = x_desc.block_type.shape[1]
    mbarrier.expect(full, 2 * Q * x_desc.block_type.shape[2] + 2 * Q * B_desc.block_type.shape[2])
    if backwards:
        tma.async_copy_global_to_shared(dy_desc, [b, token, column], full, values)
        tma.async_copy_global_to_shared(C_desc, [b, token, key_column], full, keys)
    else:
        tma.async_copy_global_to_shared(x_desc, [b, token, column], full, values)
        tma.async_copy_global_to_shared(B_desc, [b, token, key_column], full, keys)


@gluon.jit
def weigh(a, step, end, backwards):
    """A token's weight in the state: forward it reaches the chunk's end, backwards its start."""
    return gl.exp2(gl.where(backwards, a, end - a)) * gl.where(backwards, 1.0, step)


@gluon.jit
def entering(state, local, local_sums, side, part, parts, tiles, backwards, PN: gl.constexpr):
    """The state (p n) taken through the parts before `part` (after it, if backwards)."""
    for i in range(gl.where(backwards, parts - 1 - part, part)):
        j = side * parts + gl.where(backwards, parts - 1 - i, i)
        state = state * gl.exp2(gl.load(local_sums + j)) + gl.load(local + j * PN + tiles)
    return state


@gluon.jit(do_not_specialize=SIZES)
def hopper_boundaries(
    x_desc, B_desc, dy_desc, C_desc, states_desc, decays, initial, dfinal, local, local_sums, dinitial,
    size, chunks, parts, part_chunks, H, per_group, batch,
    BLOCKS: gl.constexpr, LOCAL: gl.constexpr,
):
    """Program (h and block of 64 columns, part, direction and b); decays (2 b h c*q): steps, then sums, `size` of each.

    states (direction b c h p n): what enters the chunks and, backwards, the gradients of what leaves them; dinitial
    (b h p n): the gradient of the initial state. LOCAL: every part but the last to be walked begins with zero and
    leaves its end to local (direction b h part p n), its log2 decay to local_sums, and nothing else.
    """
    Q: gl.constexpr = x_desc.block_type.shape[1]
    P: gl.constexpr = x_desc.block_type.shape[2]
    N: gl.constexpr = B_desc.block_type.shape[2]
    dtype: gl.constexpr = x_desc.dtype
    unit, part = gl.program_id(0), gl.program_id(1)
    backwards = gl.program_id(2) >= batch
    b = gl.program_id(2) % batch
    if LOCAL:
        part += gl.where(backwards, 1, 0)
    h = unit // BLOCKS
    column, key_column = unit * P, h // per_group * N
    first = part * part_chunks
    last = gl.minimum(first + part_chunks, chunks)
    count = last - first
    start = gl.where(backwards, last - 1, first)
    way = gl.where(backwards, -1, 1)  # the i-th chunk of the walk is start + i * way

    values = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, P], x_desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], B_desc.layout)
    weights = gl.allocate_shared_memory(gl.float32, [Q], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if not LOCAL:
        leaving = gl.allocate_shared_memory(dtype, [1, P, N], states_desc.layout)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    load_chunk(x_desc, B_desc, dy_desc, C_desc, full.index(0), values.index(0), keys.index(0), b, start * Q, column,
               key_column, backwards)
    if count > 1:
        load_chunk(x_desc, B_desc, dy_desc, C_desc, full.index(1), values.index(1), keys.index(1), b, (start + way) * Q,
                   column, key_column, backwards)

    thin: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    PN: gl.constexpr = BLOCKS * P * N
    q = gl.arange(0, Q, thin)
    p = gl.arange(0, P, gl.SliceLayout(1, wide))
    n = gl.arange(0, N, gl.SliceLayout(0, wide))
    tiles = gl.expand_dims(p, 1) * N + gl.expand_dims(n, 0) + (unit % BLOCKS) * (P * N)
    head = (b * H + h).to(gl.int64)
    side = gl.program_id(2).to(gl.int64) * H + h
    steps = decays + head * (chunks * Q)
    sums = steps + size
    state = gl.zeros([P, N], gl.float32, wide)
    if not LOCAL:
        if backwards:
            if dfinal is not None:
                state = gl.load(dfinal + head * PN + tiles)
        elif initial is not None:
            state = gl.load(initial + head * PN + tiles)
        if local is not None:
            state = entering(state, local, local_sums, side, part, parts, tiles, backwards, PN)
    end = gl.load(sums + start * Q + (Q - 1))
    weights.store(weigh(gl.load(sums + start * Q + q), gl.load(steps + start * Q + q), end, backwards))
    # a chunk's decays are small loads that nothing hides: fetched a chunk before they become weights
    at = (start + gl.minimum(1, count - 1) * way) * Q
    next_a, next_step, next_end = gl.load(sums + at + q), gl.load(steps + at + q), gl.load(sums + at + (Q - 1))
    total = 0.0
    states_at = (gl.program_id(2) * chunks + start) * (H * BLOCKS) + unit
    gl.thread_barrier()
    for i in range(count):
        now = i % STAGES
        if not LOCAL:
            leaving.reshape([P, N]).store(state.to(dtype))
            fence_async_shared()
        state = state * gl.exp2(end)
        total += end
        mbarrier.wait(full.index(now), (i // STAGES) & 1)
        weight = weights.load(gl.SliceLayout(0, left))
        value = widened(values.index(now).reshape([Q, P]).permute((1, 0)).load(left))  # (p q)
        added = (value * gl.expand_dims(weight, 0)).to(dtype)
        state = warpgroup_mma(added, keys.index(now).reshape([Q, N]), state, is_async=True)
        at = (start + gl.minimum(i + 2, count - 1) * way) * Q
        later_a, later_step, later_end = gl.load(sums + at + q), gl.load(steps + at + q), gl.load(sums + at + (Q - 1))
        gl.thread_barrier()  # the state is written, the weights are read
        if not LOCAL:
            tma.async_copy_shared_to_global(states_desc, [states_at + i * way * (H * BLOCKS), 0, 0], leaving)
        weights.store(weigh(next_a, next_step, next_end, backwards))
        state = warpgroup_mma_wait(0, deps=(state,))
        if not LOCAL:
            tma.store_wait(0)
        gl.thread_barrier()  # the stage is read, the stored state too, the weights are written
        if i + STAGES < count:
            load_chunk(x_desc, B_desc, dy_desc, C_desc, full.index(now), values.index(now), keys.index(now), b,
                       (start + (i + STAGES) * way) * Q, column, key_column, backwards)
        end = next_end
        next_a, next_step, next_end = later_a, later_step, later_end
    if LOCAL:
        gl.store(local + (side * parts + part) * PN + tiles, state)
        gl.store(local_sums + side * parts + part, total)
    elif dinitial is not None:
        if backwards & (part == 0):
            gl.store(dinitial + head * PN + tiles, state)
