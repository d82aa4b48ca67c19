"""SSD forward on a Hopper GPU with the causal convolution of x in front: the walk of `hopper_forward`, fed by 4 warps.

The feed starts the copies of a chunk's B, C and decays (TMA), and makes its x: raw inputs from global memory, W taps,
SiLU, rounded into the stage from which the products read. So the convolved x need not be in global memory at all; where
the backward wants it, it is copied out from there. A warp takes the 64 columns of 16 tokens in a row, a lane two of
them, and reads the W-1 tokens before them again. Products and their order are those of `conv_forward`: the same bits.
The feed needs about 72 registers a thread, which leaves 184 to the walk.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.hopper import COLUMNS, numbers, rows
from hinny.ops.kernels.hopper_forward import consume, piece
from hinny.ops.kernels.launches import find, rules
from hinny.ops.kernels.ssd_call import Call

SIZES = ["size", "t", "length", "H", "per_group", "sequence"]  # one compilation for all lengths and heads
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def silu(x):
    """x sigmoid(x), as `gates.sigmoid` computes it."""
    root = gl.rsqrt(1 + gl.exp2(x * -LOG2_E))
    return x * (root * root)


@gluon.jit
def read_taps(weight, bias, c, W: gl.constexpr):
    """The W taps of channels c, newest token first, and their bias: (1 c) each."""
    taps = ()
    for k in gl.static_range(W):
        taps += (gl.expand_dims(gl.load(weight + c * W + (W - 1 - k)).to(gl.float32), 0),)
    if bias is not None:
        offset = gl.expand_dims(gl.load(bias + c).to(gl.float32), 0)
    else:
        offset = gl.zeros_like(gl.expand_dims(c, 0).to(gl.float32))
    return taps, offset


@gluon.jit
def read_inputs(at, time, t, INSIDE: gl.constexpr, TOKENS: gl.constexpr, W: gl.constexpr, ROW: gl.constexpr):
    """Pairs of inputs from W-1 tokens before the warps' first, which is at `at`, to their last; zero outside."""
    values = ()
    for r in gl.static_range(1 - W, TOKENS):
        if INSIDE:
            values += (gl.load(at + r * (ROW // 2)),)
        else:
            values += (gl.load(at + r * (ROW // 2), mask=(time + r >= 0) & (time + r < t), other=0),)
    return values


@gluon.jit
def float_pairs(pairs, layout: gl.constexpr):
    """(tokens p/2) pairs of bfloat16 → (tokens p) float32."""
    even = (pairs << 16).to(gl.float32, bitcast=True)
    odd = (pairs & -65536).to(gl.float32, bitcast=True)
    wide = gl.join(even, odd).reshape((pairs.shape[0], 2 * pairs.shape[1]))
    return gl.convert_layout(wide, layout, assert_trivial=True)


@gluon.jit
def inputs_before(values, W: gl.constexpr, layout: gl.constexpr):
    """The W-1 inputs before the warps' first tokens, newest first."""
    window = ()
    for k in gl.static_range(1, W):
        window += (float_pairs(values[W - 1 - k], layout),)
    return window


@gluon.jit
def with_state(window, before, time, W: gl.constexpr):
    """The same, from `before`, which points behind the state's last column, for the warps at `time` 0."""
    found = ()
    for k in gl.static_range(1, W):
        found += (window[k - 1] + gl.load(before - k, mask=time == 0, other=0.0),)
    return found


@gluon.jit
def convolve(values, window, taps, offset, W: gl.constexpr, layout: gl.constexpr):
    """One tile (warps p), bfloat16, for each of the warps' tokens: taps times inputs, and SiLU."""
    tiles = ()
    for r in gl.static_range(W - 1, len(values)):
        inputs = (float_pairs(values[r], layout),)
        inputs += window
        total = offset
        for k in gl.static_range(W):
            total = total + inputs[k] * taps[k]
        tiles += (silu(total).to(gl.bfloat16),)
        window = inputs[:W - 1]
    return tiles


@gluon.jit
def stacked(tiles):
    """One tile (tokens p), a warp's tokens in a row, of tiles (warps p), up to 16 of them; moves no registers."""
    for _ in gl.static_range(4):
        if len(tiles) > 1:
            joined = ()
            for r in gl.static_range(len(tiles) // 2):
                pair = gl.join(tiles[r], tiles[r + len(tiles) // 2]).permute((0, 2, 1))
                joined += (pair.reshape((pair.shape[0] * 2, pair.shape[2])),)
            tiles = joined
    return tiles[0]


@gluon.jit
def feed(
    x, weight, bias, before, B_desc, C_desc, kept_desc, decays_desc, ring, begin, stop, t, chunks, size, sequence, H,
    per_group, BLOCKS: gl.constexpr, W: gl.constexpr, ROW: gl.constexpr, STAGES: gl.constexpr,
):
    """The four warps: fill the stages in turn, each when the warpgroup has left it."""
    fulls, empties, xs, Bs, Cs, steps, sums = ring
    P: gl.constexpr = xs.shape[3]
    Q: gl.constexpr = xs.shape[2]
    N: gl.constexpr = Bs.shape[3]
    TOKENS: gl.constexpr = Q // 4
    by_pairs: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    pair = gl.expand_dims(gl.arange(0, P // 2, gl.SliceLayout(0, by_pairs)), 0)
    pair_time = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, by_pairs)) * TOKENS, 1)
    columns = gl.arange(0, P, gl.SliceLayout(0, layout))
    time = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, layout)) * TOKENS, 1)
    x = x.to(gl.pointer_type(gl.int32))
    earlier = 0
    while begin < stop:
        walk, first, last = piece(begin, stop, chunks)
        b, unit = walk // (H * BLOCKS), walk % (H * BLOCKS)
        at = (walk // BLOCKS) * (chunks * Q)
        p = unit * P + columns
        taps, offset = read_taps(weight, bias, p, W)
        here = x + b.to(gl.int64) * sequence + (unit * (P // 2) + pair_time * (ROW // 2) + pair)
        key = unit // (per_group * BLOCKS) * N
        here += first.to(gl.int64) * (Q * ROW // 2)
        for c in range(first, last):
            turn = earlier + c - first
            now = turn % STAGES
            start = c * Q
            inside = (c > 0) & (start + Q <= t)
            if inside:
                values = read_inputs(here, pair_time, t, True, TOKENS, W, ROW)
            else:
                values = read_inputs(here, pair_time + start, t, False, TOKENS, W, ROW)
            here += Q * ROW // 2
            mbarrier.wait(empties.index(now), ((turn // STAGES) & 1) ^ 1)
            full = fulls.index(now)
            if t > 0:  # always: a branch, else ptxas starts the copies in the midst of the sums
                mbarrier.expect(full, 4 * Q * N + 8 * Q)
                tma.async_copy_global_to_shared(C_desc, [b, start, key], full, Cs.index(now))
                tma.async_copy_global_to_shared(B_desc, [b, start, key], full, Bs.index(now))
                tma.async_copy_global_to_shared(decays_desc, [at + start], full, steps.index(now))
                tma.async_copy_global_to_shared(decays_desc, [at + start + size], full, sums.index(now))
            window = inputs_before(values, W, layout)
            if before is not None:
                if c == 0:
                    # turn >> 30 is a zero that the compiler cannot see: else addresses stay in registers over the loop
                    channel = b.to(gl.int64) * (H * BLOCKS * P) + (p + (turn >> 30))
                    window = with_state(window, gl.expand_dims(before + (channel + 1) * (W - 1), 0), time, W)
            tile = stacked(convolve(values, window, taps, offset, W, layout))
            if start + Q > t:
                tokens = gl.expand_dims(gl.arange(0, Q, gl.SliceLayout(1, tile.type.layout)), 1)
                tile = gl.where(tokens < t - start, tile, 0.0)
            if kept_desc is not None:
                tma.store_wait(STAGES - 1)  # of the copy out of this stage
                gl.thread_barrier()
            xs.index(now).reshape([Q, P]).store(tile)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(full, count=1)
            if kept_desc is not None:
                tma.async_copy_shared_to_global(kept_desc, [b, start, unit * P], xs.index(now))
        earlier += last - first
        stop = max(begin, walk * chunks)
    if kept_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def hopper_convolved(
    x, weight, bias, before, B_desc, C_desc, y_desc, kept_desc, decays_desc, D, initial, sums, final, flags,
    size, t, length, H, per_group, sequence, BLOCKS: gl.constexpr, W: gl.constexpr, ROW: gl.constexpr,
    STAGES: gl.constexpr, FEED: gl.constexpr,
):
    """Programs as in `hopper_forward`: one a walk, `length` all its chunks; or with flags one a slot.

    x (b t h*p) before its convolution, tokens ROW and sequences 2 `sequence` numbers apart; weight (h*p W), bias (h*p),
    before (b h*p W-1) float32. kept_desc: the convolved x (b t h*p), if wanted. FEED: registers a thread of the feed.
    Others as in `hopper_forward`.
    """
    P: gl.constexpr = y_desc.block_type.shape[2]
    Q: gl.constexpr = y_desc.block_type.shape[1]
    N: gl.constexpr = B_desc.block_type.shape[2]
    dtype: gl.constexpr = y_desc.dtype
    chunks = (t + Q - 1) // Q
    begin = gl.program_id(0) * length
    if flags is None:
        begin += gl.program_id(2) * (H * BLOCKS) * length
    stop = min(begin + length, size // Q * BLOCKS)
    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, P], y_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], C_desc.layout)
    steps_s = gl.allocate_shared_memory(gl.float32, [STAGES, Q], decays_desc.layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [STAGES, Q], decays_desc.layout)
    Ss = gl.allocate_shared_memory(dtype, [1, P, N], gl.NVMMASharedLayout.get_default_for([P, N], dtype))
    ys = gl.allocate_shared_memory(dtype, [1, Q, P], y_desc.layout)
    fulls = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empties = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(fulls.index(s), count=2)  # the copies, and x
        mbarrier.init(empties.index(s), count=1)
    fence_async_shared()
    ring = (fulls, empties, xs, Bs, Cs, steps_s, sums_s)
    gl.warp_specialize([
        (consume, (y_desc, ring, Ss, ys, D, initial, None, None, sums, final, flags, begin, stop, chunks, 0, 1, H,
                   BLOCKS, STAGES)),
        (feed, (x, weight, bias, before, B_desc, C_desc, kept_desc, decays_desc, ring, begin, stop, t, chunks, size,
                sequence, H, per_group, BLOCKS, W, ROW, STAGES)),
    ], [4], [FEED])


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, B: Tensor, C: Tensor,
    decays: Tensor, D: Tensor | None, initial: Tensor | None, y: Tensor, final: Tensor, kept: Tensor | None = None,
    flags: Tensor | None = None, share: int = 0,
) -> None:
    """Fills y (b t h p), final (b h p n) and, if given, kept (b t h p), the convolved x, of whole walks.

    x (b t h*p) bfloat16 with its channels side by side, before its convolution: weight (h*p w) with w from 2 to 4, bias
    (h*p), before (b h*p w-1). All others contiguous, decays as `Call.prepare` makes them; so are flags, with which
    programs take `share` chunks each (`Call.share`). One compilation for each distance between x's tokens.
    """
    if any(number % 2 for number in (x.stride(0), x.stride(1), x.storage_offset())):
        x = x.contiguous()  # two channels are read at once
    blocks = call.p // COLUMNS
    use, parts, _ = call.walk("hopper_convolved", call.b * call.h)
    assert parts == 1 or flags is not None, "parts of a walk need the convolved x before it is walked"
    shares = triton.cdiv(call.b * call.h * blocks * call.chunks, share or call.chunks)
    grid = (call.h * blocks, 1, call.b) if flags is None else (shares, 1, 1)
    hopper_convolved[grid](
        x, weight, bias, None if before is None else before.float(), rows(B, call.Q, call.n), rows(C, call.Q, call.n),
        rows(y, call.Q, COLUMNS), None if kept is None else rows(kept, call.Q, COLUMNS), numbers(decays, call.Q), D,
        None if initial is None else initial.float(), decays[1], final, flags, decays[1].numel(), call.t,
        share or call.chunks, call.h, call.h // call.g, x.stride(0) // 2, BLOCKS=blocks, W=weight.shape[1],
        ROW=x.stride(1), **use)


CASES: tuple[tuple[int, int, int, tuple[str, ...]], ...] = (
    (128, 1, 4, ("before", "initial", "flags")), (128, 1, 4, ("before", "initial", "kept_desc", "flags")),
    (128, 1, 4, ()), (128, 1, 3, ("bias", "flags")), (128, 1, 2, ("D", "before", "kept_desc")), (128, 2, 4, ()),
    (64, 1, 4, ("before", "initial", "flags")), (64, 2, 4, ()))
"""What is compiled: state, blocks of 64 columns in a head, taps, arguments that are not given."""


def compilations(table: str) -> list[Compilation]:
    """The kernel for Hopper GPUs, with all that is optional and without."""
    return [_compilation(*case) for case in CASES] if "hopper_convolved" in rules(table) else []


def _compilation(n: int, blocks: int, w: int, absent: tuple[str, ...]) -> Compilation:
    use = find("sm90", "hopper_convolved", p=COLUMNS * blocks, n=n, bits=16)
    Q = use["Q"]
    tiles = {"B_desc": [1, Q, n], "C_desc": [1, Q, n], "y_desc": [1, Q, COLUMNS], "kept_desc": [1, Q, COLUMNS]}
    kinds = {name: f"tensordesc<bf16{tile},{gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)!r}>"
             for name, tile in tiles.items()}
    kinds |= {"decays_desc": f"tensordesc<fp32[{Q}],{gl.NVMMASharedLayout(0, 32, 1)!r}>", "x": "*bf16", "flags": "*i32"}
    kinds |= dict.fromkeys(SIZES, "i32")
    constants: dict[str, Any] = {"BLOCKS": blocks, "W": w, "ROW": 18560, "STAGES": use["STAGES"], "FEED": use["FEED"]}
    constants |= dict.fromkeys(absent)
    signature = {name: kinds.get(name, "*fp32") for name in hopper_convolved.arg_names if name not in constants}
    label = "-".join((f"hopper_convolved-n{n}-blocks{blocks}-w{w}", *absent))
    return Compilation(label, hopper_convolved, signature, constants, use["num_warps"], registers=use["maxnreg"])


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    plain = {"Q": 64, "STAGES": 2, "num_warps": 4, "maxnreg": 128, "PROGRAMS": 132, "SHORTEST": 4}
    return {"hopper_convolved": [plain | {"FEED": registers} for registers in (64, 72, 80)]}
