"""SSD forward on a Hopper GPU, in Gluon: the walk of `ssd_forward` with its loads, products and stores overlapped.

A producer warp fetches chunks into a ring of shared memory (TMA, mbarriers); a warpgroup walks 64 columns of one head,
or, where rounds of whole walks would leave much of the GPU idle, its share of a line of all walks (`piece`).
Products are asynchronous, in this order, each with what is computed beside it:

    scores = C B^T                decays; then M: scores times decays, masked, in bf16
    out = C S^T                   leave x
    S = keep S + (leave x)^T B    entry out
    out = entry out + M x         S in bf16, into shared memory

Outputs begin when scores and decays have become M, which takes a quarter of their registers. `hopper_convolved` needs
that: its walk is this one too, and has 184 registers a thread, not 232. Both products of C at once, with scores, decays
and outputs all held, would save 0.6 % of the time on an H100.

Rows of the accumulators are tokens, so the masked scores go from there straight into the A operand of M x: nothing on
the way from scores to y passes through shared memory before y itself. The state does, in bf16, while M x runs.
bfloat16; head_dim a multiple of 64, state 64 or 128, no gate: `ssd.py` takes `ssd_forward` for others.
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

SIZES = ["size", "chunks", "parts", "length", "H", "per_group"]  # one compilation for all lengths and heads


@gluon.jit
def piece(begin, stop, chunks):
    """The last walk with chunks in [begin, stop) of the line of all walks: its number, the first of them and their end.

    A program takes the pieces of its share in this order, from the end: first it begins a walk that the next program
    ends, and last it ends one that the program before has begun. That one did so first of all, with no more chunks
    than this program has walked by then: it hardly ever waits. Programs wait for those before them alone.
    """
    walk = (stop - 1) // chunks
    return walk, max(begin - walk * chunks, 0), stop - walk * chunks


@gluon.jit
def load_chunk(
    x_desc, B_desc, C_desc, decays_desc, full, xs, Bs, Cs, steps, sums, b, c, g, column, at, size,
):
    """Starts the loads of chunk c; its steps begin at `at`, its sums `size` numbers later."""
    P: gl.constexpr = x_desc.block_type.shape[2]
    Q: gl.constexpr = x_desc.block_type.shape[1]
    N: gl.constexpr = B_desc.block_type.shape[2]
    mbarrier.expect(full, 4 * Q * N + 2 * Q * P + 8 * Q)
    tma.async_copy_global_to_shared(C_desc, [b, c * Q, g * N], full, Cs)
    tma.async_copy_global_to_shared(B_desc, [b, c * Q, g * N], full, Bs)
    tma.async_copy_global_to_shared(x_desc, [b, c * Q, column], full, xs)
    tma.async_copy_global_to_shared(decays_desc, [at], full, steps)
    tma.async_copy_global_to_shared(decays_desc, [at + size], full, sums)


@gluon.jit
def entering(
    initial, local, local_sums, final, flags, part, parts, first, walk, tile, BLOCKS: gl.constexpr, N: gl.constexpr,
    layout: gl.constexpr,
):
    """The state (p n) before a piece: the initial one taken through the parts before it, or in the midst of a walk the
    one that the program which began it left in `final` before it raised the walk's flag."""
    P: gl.constexpr = 64
    here = walk.to(gl.int64) * (P * N) + tile
    if initial is not None:
        state = gl.load(initial + here)
    else:
        state = gl.zeros([P, N], gl.float32, layout)
    if local is not None:
        head = (walk // BLOCKS).to(gl.int64) * parts
        for i in range(part):
            keep = gl.exp2(gl.load(local_sums + head + i))
            state = state * keep + gl.load(local + ((head + i) * BLOCKS + walk % BLOCKS) * (P * N) + tile)
    if flags is not None:
        if first > 0:
            # one thread asks; then the barrier that gives all the answer, then their loads
            while gl.atomic_add(flags + walk, 0, sem="acquire", scope="gpu") == 0:
                pass
            state = gl.load(final + here, cache_modifier=".cg")
    return state


@gluon.jit
def widened(x):
    """bf16 -> float32 in one instruction each, not two."""
    return gl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
                                     dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def chunk(state, d, end, full, phase, xs, Bs, Cs, steps, sums, Ss, Sr, ys, seen, HAS_D: gl.constexpr):
    """One chunk: leaves y in `ys`, the new state in `Ss` and in registers; tiles may be overwritten after a barrier."""
    Q: gl.constexpr = Cs.shape[0]
    N: gl.constexpr = Cs.shape[1]
    P: gl.constexpr = xs.shape[1]
    dtype: gl.constexpr = xs.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, square, 2)
    left_wide: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    rows: gl.constexpr = gl.SliceLayout(1, square)
    columns: gl.constexpr = gl.SliceLayout(0, square)

    state = state * gl.exp2(end)  # before any product starts: ptxas waits for all of them where it sees this later
    mbarrier.wait(full, phase)
    zero = gl.zeros([Q, P], gl.float32, square)
    scores = warpgroup_mma(Cs, Bs.permute((1, 0)), zero, use_acc=False, is_async=True)
    ai = sums.load(rows)
    aj = sums.load(columns)
    step = steps.load(columns)
    decay = gl.exp2(gl.expand_dims(ai, 1) - gl.expand_dims(aj, 0)) * gl.expand_dims(step, 0)
    decay = gl.where(seen, decay, 0.0)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    masked = gl.convert_layout((scores * decay).to(dtype), left)

    out = warpgroup_mma(Cs, Sr.permute((1, 0)), zero, use_acc=False, is_async=True)
    leave = gl.convert_layout(gl.exp2(end - aj) * step, gl.SliceLayout(0, left_wide))
    xt = xs.permute((1, 0)).load(left_wide)  # (p q)
    added = (widened(xt) * gl.expand_dims(leave, 0)).to(dtype)
    state = warpgroup_mma(added, Bs, state, is_async=True)
    entry = gl.exp2(ai)
    out = warpgroup_mma_wait(1, deps=(out,))
    out = out * gl.expand_dims(entry, 1)
    out = warpgroup_mma(masked, xs, out, is_async=True)

    state = warpgroup_mma_wait(1, deps=(state,))
    tma.store_wait(0)
    Ss.store(state.to(dtype))
    if HAS_D:
        x = widened(xs.load(square))
        out = warpgroup_mma_wait(0, deps=(out,))
        out = out + d * x
    else:
        out = warpgroup_mma_wait(0, deps=(out,))
    ys.store(out.to(dtype))
    fence_async_shared()
    return state


@gluon.jit
def produce(
    x_desc, B_desc, C_desc, decays_desc, ring, begin, stop, chunks, size, H, per_group, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp: fills the stages in turn, each when the warpgroup has left it."""
    P: gl.constexpr = x_desc.block_type.shape[2]
    Q: gl.constexpr = x_desc.block_type.shape[1]
    fulls, empties, xs, Bs, Cs, steps, sums = ring
    before = 0
    while begin < stop:
        walk, first, last = piece(begin, stop, chunks)
        b, unit = walk // (H * BLOCKS), walk % (H * BLOCKS)
        at = (walk // BLOCKS) * (chunks * Q)
        for c in range(first, last):
            turn = before + c - first
            now = turn % STAGES
            mbarrier.wait(empties.index(now), ((turn // STAGES) & 1) ^ 1)
            load_chunk(x_desc, B_desc, C_desc, decays_desc, fulls.index(now), xs.index(now), Bs.index(now),
                       Cs.index(now), steps.index(now), sums.index(now), b, c, unit // (per_group * BLOCKS), unit * P,
                       at + c * Q, size)
        before += last - first
        stop = max(begin, walk * chunks)


@gluon.jit
def consume(
    y_desc, ring, Ss, ys, D, initial, local, local_sums, all_sums, final, flags, begin, stop, chunks, part, parts, H,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):
    """The warpgroup: walks the pieces in [begin, stop), each of 64 columns of a head."""
    fulls, empties, xs, Bs, Cs, steps, sums = ring
    P: gl.constexpr = xs.shape[3]
    Q: gl.constexpr = xs.shape[2]
    N: gl.constexpr = Bs.shape[3]
    dtype: gl.constexpr = xs.dtype
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    p = gl.arange(0, P, gl.SliceLayout(1, wide))
    n = gl.arange(0, N, gl.SliceLayout(0, wide))
    tile = gl.expand_dims(p, 1) * N + gl.expand_dims(n, 0)
    i = gl.arange(0, Q, gl.SliceLayout(1, square))
    j = gl.arange(0, Q, gl.SliceLayout(0, square))
    seen = gl.expand_dims(i, 1) >= gl.expand_dims(j, 0)
    before = 0
    while begin < stop:
        walk, first, last = piece(begin, stop, chunks)
        head = walk // BLOCKS
        b, h = head // H, head % H
        column = (h * BLOCKS + walk % BLOCKS) * P
        state = entering(initial, local, local_sums, final, flags, part, parts, first, walk, tile, BLOCKS, N, wide)
        Ss.index(0).store(state.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        d = 0.0
        if D is not None:
            d = gl.load(D + h).to(gl.float32)
        ends = all_sums + head * chunks * Q + (Q - 1)
        end = gl.load(ends + first * Q)
        for c in range(first, last):
            turn = before + c - first
            now = turn % STAGES
            following = gl.load(ends + gl.minimum(c + 1, last - 1) * Q)
            # c >> 30 is a zero that the compiler cannot see: else descriptors stay in registers over the loop and spill
            state = chunk(state, d, end, fulls.index(now), (turn // STAGES) & 1, xs.index(now).reshape([Q, P]),
                          Bs.index(now).reshape([Q, N]), Cs.index(now).reshape([Q, N]), steps.index(now),
                          sums.index(now), Ss.index(0), Ss.index(c >> 30), ys.reshape([Q, P]), seen, D is not None)
            end = following
            tma.async_copy_shared_to_global(y_desc, [b, c * Q, column], ys)
            # after the barrier that y's store needs: all warps are done with the stage
            mbarrier.arrive(empties.index(now), count=1)
        if flags is not None or last == chunks:
            # last >> 30 is a zero like that: else `tile` stays in registers over the loop
            here = gl.expand_dims(p + (last >> 30), 1) * N + gl.expand_dims(n, 0)
            gl.store(final + walk.to(gl.int64) * (P * N) + here, state)
        if flags is not None:
            if last < chunks:
                gl.thread_barrier()  # all have stored what the one thread that raises the flag then releases
                gl.atomic_xchg(flags + walk, 1, sem="release", scope="gpu")
        before += last - first
        stop = begin if flags is None else max(begin, walk * chunks)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def hopper_forward(
    x_desc, B_desc, C_desc, y_desc, decays_desc, D, initial, local, local_sums, sums, final, flags,
    size, chunks, parts, length, H, per_group, BLOCKS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):
    """Program (64 columns of a head, part, b); with flags, zeros for the walks (b h p/64), (share of the line of them).

    Parts and shares have `length` chunks, the last fewer; shares no less than a walk has. Descriptors of x, y (b t h*p)
    and B, C (b t g*n), and of decays (2 b h c*q): `size` steps, then their sums. Others as in `ssd_forward`; H heads,
    `per_group` of them in a group.
    """
    P: gl.constexpr = x_desc.block_type.shape[2]
    Q: gl.constexpr = x_desc.block_type.shape[1]
    dtype: gl.constexpr = x_desc.dtype
    part = gl.program_id(1)
    if flags is None:
        walk = gl.program_id(2) * (H * BLOCKS) + gl.program_id(0)
        begin = walk * chunks + part * length
        stop = min(begin + length, (walk + 1) * chunks)
    else:
        begin = gl.program_id(0) * length
        stop = min(begin + length, size // Q * BLOCKS)
    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, P], x_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], C_desc.layout)
    steps_s = gl.allocate_shared_memory(gl.float32, [STAGES, Q], decays_desc.layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [STAGES, Q], decays_desc.layout)
    Ss = gl.allocate_shared_memory(dtype, [1, P, N], gl.NVMMASharedLayout.get_default_for([P, N], dtype))
    ys = gl.allocate_shared_memory(dtype, [1, Q, P], y_desc.layout)
    fulls = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empties = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(fulls.index(s), count=1)
        mbarrier.init(empties.index(s), count=1)
    fence_async_shared()
    ring = (fulls, empties, xs, Bs, Cs, steps_s, sums_s)
    gl.warp_specialize([
        (consume, (y_desc, ring, Ss, ys, D, initial, local, local_sums, sums, final, flags, begin, stop, chunks, part,
                   parts, H, BLOCKS, STAGES)),
        (produce, (x_desc, B_desc, C_desc, decays_desc, ring, begin, stop, chunks, size, H, per_group, BLOCKS, STAGES)),
    ], [1], [24])
