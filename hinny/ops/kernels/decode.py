"""SSD states advanced in place: each tile of a state is read once and written once, and that is the whole cost.

    ssd_update_kernel   a program has P rows (of p) of one head of one sequence: state (P N) in registers, n along the
                        lanes of a warp so that a row is one or two 16-byte loads a lane; the tokens' x, B, C, dt come
                        from L2. Nothing is shared between programs.
    ssd_replay_kernel   the same tile, read alone: outputs from the state and from the tokens buffered since it was
                        written, with the new ones a tile of R rows; the new ones are appended. Of B, which the heads of
                        a group share, by the group's first program, behind the rows that the others read.
    ssd_fold_kernel     is launched before it: where the buffers have no room left it runs them into the state. It is a
                        kernel of its own because the loop over tokens would double the other's registers, and so
                        halve what it has in flight; most of its programs have nothing to do, so each has many heads.

A state streams: all states together are far larger than L2, so each is marked to leave the cache first (STREAM).
Letters: b batch, t time, h heads, p head_dim, g groups, n state, s slots, L buffered tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.gates import LOG2_E, sigmoid, softplus
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import on_its_device
from hinny.ops.kernels.rounding import SHARED, noise, round_up_or_down
from hinny.ops.replay import Replay


@triton.jit
def step_sizes(at, mask, bias, SOFTPLUS: tl.constexpr):
    """Time steps read at `at`, zero where masked."""
    step = tl.load(at, mask=mask, other=0).to(tl.float32) + bias
    if SOFTPLUS:
        step = softplus(step)
    return tl.where(mask, step, 0)


@triton.jit
def head_scalars(A, D, dt_bias, head):
    """A in units of log 2, D and the bias of the steps of one head; zero where not given."""
    a = tl.load(A + head).to(tl.float32) * LOG2_E
    d = 0.0
    bias = 0.0
    if D is not None:
        d = tl.load(D + head).to(tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + head).to(tl.float32)
    return a, d, bias


@triton.jit
def read_state(at, mask, STREAM: tl.constexpr):
    return tl.load(at, mask=mask, other=0, eviction_policy="evict_first" if STREAM else "")


@triton.jit
def write_state(at, s, mask, seed, slot, rows, n: tl.constexpr, STREAM: tl.constexpr):
    """Rounds a float32 tile of rows (row numbers within the slot) once and writes it."""
    dtype: tl.constexpr = at.dtype.element_ty
    if seed is not None:
        blocks: tl.constexpr = (n + SHARED - 1) // SHARED
        stored = round_up_or_down(s, noise(tl.load(seed), slot.to(tl.int32), rows, blocks, s.shape[1]), dtype)
    else:
        stored = s.to(dtype)
    tl.store(at, stored, mask=mask, cache_modifier=".cs" if STREAM else "")


@triton.jit
def finish(y, out, x, d, z, at, mask, live):
    """Adds D x, gates by z, and writes the outputs of one token: zero for padding."""
    out += d * x
    if z is not None:
        gate = tl.load(z + at, mask=mask, other=0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + at, tl.where(live, out, 0).to(y.dtype.element_ty), mask=mask)


@triton.jit
def ssd_update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, slots, seed, y, t, state_stride, x_stride, dt_stride, bc_stride,
    SIZES: tl.constexpr, SOFTPLUS: tl.constexpr, EARLY: tl.constexpr, P: tl.constexpr, STREAM: tl.constexpr,
):
    """x (b t h p), dt (b t h), B, C (b t g n) by the stride of a token; SIZES: h, p, g, n, N, the power of 2 from n.

    EARLY: the launch before this one writes x, B and C and not the state, and need not be over when the state is read.
    The next one may begin when all programs of this one have.
    """
    if EARLY:
        gdc_launch_dependents()
    h: tl.constexpr = SIZES[0]
    p: tl.constexpr = SIZES[1]
    g: tl.constexpr = SIZES[2]
    n: tl.constexpr = SIZES[3]
    N: tl.constexpr = SIZES[4]
    blocks: tl.constexpr = (p + P - 1) // P
    b = tl.program_id(0) // (h * blocks)
    head = tl.program_id(0) // blocks % h
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b)
    live = slot >= 0
    rows = tl.program_id(0) % blocks * P + tl.arange(0, P)
    columns = tl.arange(0, N)
    state_at = state + slot * state_stride + head * p * n + rows[:, None] * n + columns[None, :]
    mask = live & (rows < p)[:, None] & (columns < n)[None, :]
    s = read_state(state_at, mask, STREAM).to(tl.float32)
    # the compiler would move the loads of the tokens, and the arithmetic of the steps, before those of the state
    tl.debug_barrier()
    a, d, bias = head_scalars(A, D, dt_bias, head)
    if EARLY:
        gdc_wait()
    for i in range(t):
        token = b.to(tl.int64) * t + i
        value = tl.load(x + token * x_stride + head * p + rows, mask=rows < p, other=0).to(tl.float32)
        bc = token * bc_stride + head // (h // g) * n + columns
        b_row = tl.load(B + bc, mask=columns < n, other=0).to(tl.float32)
        c_row = tl.load(C + bc, mask=columns < n, other=0).to(tl.float32)
        step = step_sizes(dt + token * dt_stride + head, live, bias, SOFTPLUS)
        s = s * tl.exp2(step * a) + (value * step)[:, None] * b_row[None, :]
        out = tl.sum(s * c_row[None, :], 1)
        finish(y, out, value, d, z, token * (h * p) + head * p + rows, rows < p, live)
    if P * N < 1024:
        # threads may hold copies of a small tile: no one writes before all have read
        tl.debug_barrier()
    write_state(state_at, s, mask, seed, slot, head * p + rows, n, STREAM)


@triton.jit
def ssd_fold_kernel(
    state, held_x, held_dt, held_b, cursor, A, slots, seed, t, state_stride,
    SIZES: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, STREAM: tl.constexpr,
):
    """Buffers held_x (s h L p), held_dt (s h L), held_b (s g L n) into the state where t tokens more have no room.

    cursor (s 2): reads the second number, tokens held by the call before, and writes the first, tokens that stay held.
    SIZES: h, p, g, n, N, L.
    """
    h: tl.constexpr = SIZES[0]
    p: tl.constexpr = SIZES[1]
    g: tl.constexpr = SIZES[2]
    n: tl.constexpr = SIZES[3]
    N: tl.constexpr = SIZES[4]
    L: tl.constexpr = SIZES[5]
    parts: tl.constexpr = (h + HEADS - 1) // HEADS
    blocks: tl.constexpr = (p + P - 1) // P
    b = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b)
    live = slot >= 0
    held = tl.load(cursor + slot * 2 + 1, mask=live, other=0)
    full = live & (held + t > L)
    if full:
        columns = tl.arange(0, N)
        for tile in range(tl.minimum(HEADS, h - part * HEADS) * blocks):
            head = part * HEADS + tile // blocks
            rows = tile % blocks * P + tl.arange(0, P)
            state_at = state + slot * state_stride + head * p * n + rows[:, None] * n + columns[None, :]
            mask = (rows < p)[:, None] & (columns < n)[None, :]
            s = read_state(state_at, mask, STREAM).to(tl.float32)
            a = tl.load(A + head).to(tl.float32) * LOG2_E
            token = (slot * h + head) * L
            row = (slot * g + head // (h // g)) * L
            for i in range(held):
                step = tl.load(held_dt + token + i)
                value = tl.load(held_x + (token + i) * p + rows, mask=rows < p, other=0).to(tl.float32)
                b_row = tl.load(held_b + (row + i) * n + columns, mask=columns < n, other=0).to(tl.float32)
                s = s * tl.exp2(step * a) + (value * step)[:, None] * b_row[None, :]
            if P * N < 1024:
                tl.debug_barrier()
            write_state(state_at, s, mask, seed, slot, head * p + rows, n, STREAM)
    if part == 0:
        tl.store(cursor + slot * 2, tl.where(full, 0, held), mask=live)


@triton.jit
def ssd_replay_kernel(
    state, held_x, held_dt, held_b, cursor, x, dt, A, B, C, D, z, dt_bias, slots, y,
    t, state_stride, x_stride, dt_stride, bc_stride,
    SIZES: tl.constexpr, SOFTPLUS: tl.constexpr, EARLY: tl.constexpr, P: tl.constexpr, STREAM: tl.constexpr,
):
    """Outputs from the state and the buffers as `ssd_fold_kernel` left them; appends the tokens to the buffers.

    SIZES: h, p, g, n, N, L, R (the power of 2 from L).
    """
    h: tl.constexpr = SIZES[0]
    p: tl.constexpr = SIZES[1]
    g: tl.constexpr = SIZES[2]
    n: tl.constexpr = SIZES[3]
    N: tl.constexpr = SIZES[4]
    L: tl.constexpr = SIZES[5]
    R: tl.constexpr = SIZES[6]
    blocks: tl.constexpr = (p + P - 1) // P
    b = tl.program_id(0) // (h * blocks)
    head = tl.program_id(0) // blocks % h
    block = tl.program_id(0) % blocks
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b)
    live = slot >= 0
    rows = block * P + tl.arange(0, P)
    columns = tl.arange(0, N)
    inside = rows < p
    filled = columns < n
    state_at = state + slot * state_stride + head * p * n + rows[:, None] * n + columns[None, :]
    stored = read_state(state_at, live & inside[:, None] & filled[None, :], STREAM)
    held = tl.load(cursor + slot * 2, mask=live, other=0)
    # see ssd_update_kernel
    tl.debug_barrier()
    a, d, bias = head_scalars(A, D, dt_bias, head)
    group = head // (h // g)
    held_x += (slot * h + head) * L * p + rows
    held_dt += (slot * h + head) * L
    held_b += (slot * g + group) * L * n + columns
    first = b.to(tl.int64) * t
    x += first * x_stride + head * p + rows
    dt += first * dt_stride + head
    B += first * bc_stride + group * n + columns
    C += first * bc_stride + group * n + columns

    # the buffered tokens as a tile of R rows, which the new ones enter behind them; no step, no part in any sum
    j = tl.arange(0, R)
    old = live & (j < held)
    steps = tl.load(held_dt + j, mask=old, other=0)
    # the decay from a row to the next is the next row's
    next_steps = tl.load(held_dt + j + 1, mask=live & (j + 1 < held), other=0)
    b_rows = tl.load(held_b[None, :] + j[:, None] * n, mask=old[:, None] & filled[None, :], other=0).to(tl.float32)
    x_rows = tl.load(held_x[None, :] + j[:, None] * p, mask=old[:, None] & inside[None, :], other=0).to(tl.float32)
    if EARLY:
        gdc_wait()
    for i in range(t):
        value = tl.load(x + i * x_stride, mask=inside, other=0).to(tl.float32)
        b_row = tl.load(B + i * bc_stride, mask=filled, other=0).to(tl.float32)
        c_row = tl.load(C + i * bc_stride, mask=filled, other=0).to(tl.float32)
        step = step_sizes(dt + i * dt_stride, live, bias, SOFTPLUS)
        here = j == held + i
        steps = tl.where(here, step, steps)
        next_steps = tl.where(j + 1 == held + i, step, next_steps)
        b_rows = tl.where(here[:, None], b_row[None, :], b_rows)
        x_rows = tl.where(here[:, None], value[None, :], x_rows)
        # each sum of later steps by itself: a difference of two sums loses the small steps beside a large one
        after = tl.cumsum(next_steps, 0, reverse=True) * a
        weight = steps * tl.exp2(after) * tl.sum(b_rows * c_row[None, :], 1)
        out = tl.sum(stored.to(tl.float32) * c_row[None, :], 1) * tl.exp2(tl.sum(steps, 0) * a)
        out += tl.sum(weight[:, None] * x_rows, 0)
        finish(y, out, value, d, z, (first + i) * (h * p) + head * p + rows, inside, live)

    # no program reads what another writes here: rows from the cursor on, and the cursor's second number
    new = live & (j >= held) & (j < held + t)
    one_of_head = block == 0
    one_of_group = one_of_head & (head % (h // g) == 0)
    tl.store(held_dt + j, steps, mask=new & one_of_head)
    tl.store(held_x[None, :] + j[:, None] * p, x_rows.to(x.dtype.element_ty), mask=new[:, None] & inside[None, :])
    tl.store(held_b[None, :] + j[:, None] * n, b_rows.to(B.dtype.element_ty),
             mask=(new & one_of_group)[:, None] & filled[None, :])
    tl.store(cursor + slot * 2 + 1, held + t, mask=live & one_of_group & (head == 0))


def ssd_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None, seed: Tensor | None, replay: Replay | None,
) -> Tensor:
    """`hinny.ops.ssd_update` on checked arguments; changes `state` and `replay` in place."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots, seed, *(replay or (None,) * 4))


def launch_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None, seed: Tensor | None, held_x: Tensor | None,
    held_dt: Tensor | None, held_b: Tensor | None, cursor: Tensor | None, early: bool = False,
) -> Tensor:
    """One launch: `ssd_update_kernel`, or with buffers `ssd_replay_kernel`, after `launch_fold`.

    early: the launch before this one on the stream is as the kernel's EARLY says.
    """
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    y = x.new_empty(x.shape)
    (x, x_stride), (dt, dt_stride), (B, b_stride), (C, c_stride) = map(by_token, (x, dt, B, C))
    if b_stride != c_stride:
        (B, b_stride), (C, _) = by_token(B.contiguous()), by_token(C.contiguous())
    A, D, dt_bias, z = (v if v is None else v.contiguous() for v in (A, D, dt_bias, z))
    sizes = (h, p, g, n, max(triton.next_power_of_2(n), SHARED.value if seed is not None else 1))
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    given = (x, dt, A, B, C, D, z, dt_bias, slots)
    numbers = (y, t, state.stride(0), x_stride, dt_stride, b_stride)
    replayed = held_x is not None
    use = launch(f"ssd_{'replay' if replayed else 'update'}_kernel", state.device, work=b * h, p=p, n=n,
                 bytes=state.element_size())
    use["P"] = min(use["P"], triton.next_power_of_2(p))
    grid = (b * h * triton.cdiv(p, use["P"]),)
    if replayed:
        length = held_x.shape[2]
        sizes = (*sizes[:4], triton.next_power_of_2(n), length, triton.next_power_of_2(length))
        ssd_replay_kernel[grid](state, held_x, held_dt, held_b, cursor, *given, *numbers, sizes, dt_softplus, early,
                                **use, **options)
    else:
        ssd_update_kernel[grid](state, *given, seed, *numbers, sizes, dt_softplus, early, **use, **options)
    return y


def launch_fold(state: Tensor, A: Tensor, slots: Tensor | None, seed: Tensor | None, held_x: Tensor, held_dt: Tensor,
                held_b: Tensor, cursor: Tensor, b: int, t: int) -> None:
    """Makes room for t tokens in the buffers of b sequences."""
    (_, h, p, n), (_, g, length, _) = state.shape, held_b.shape
    use = launch("ssd_fold_kernel", state.device, work=b * h, p=p, n=n, bytes=state.element_size())
    use["P"] = min(use["P"], triton.next_power_of_2(p))
    sizes = (h, p, g, n, max(triton.next_power_of_2(n), SHARED.value if seed is not None else 1), length)
    ssd_fold_kernel[b * triton.cdiv(h, use["HEADS"]),](state, held_x, held_dt, held_b, cursor, A.contiguous(), slots,
                                                       seed, t, state.stride(0), sizes, **use)


def run_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None, seed: Tensor | None, held_x: Tensor | None,
    held_dt: Tensor | None, held_b: Tensor | None, cursor: Tensor | None,
) -> Tensor:
    if held_x is not None and held_dt is not None and held_b is not None and cursor is not None:
        launch_fold(state, A, slots, seed, held_x, held_dt, held_b, cursor, *x.shape[:2])
    return launch_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots, seed, held_x, held_dt, held_b,
                         cursor)


def by_token(v: Tensor) -> tuple[Tensor, int]:
    """v (b t ...) and the stride of a token, the same from sequence to sequence; copied if it has no such stride."""
    expected = 1
    for size, stride in zip(v.shape[:1:-1], v.stride()[:1:-1], strict=True):
        if size != 1 and stride != expected:
            return v.contiguous(), math.prod(v.shape[2:])
        expected *= size
    (b, t), (stride_b, stride_t) = v.shape[:2], v.stride()[:2]
    if t == 1:
        return v, expected if b == 1 else stride_b
    if b == 1 or stride_b == t * stride_t:
        return v, stride_t
    return v.contiguous(), expected


def in_place(name: str, run: Callable[..., Tensor], fake: Callable[..., Tensor],
             changes: Sequence[str]) -> Callable[..., Tensor]:
    """`run`, which changes the arguments `changes` and returns a new tensor; `fake` makes one without values.

    It is also registered as the operator hinny::NAME, which runs where a graph is traced: the dispatcher and the
    operator's checks would cost as much time as a decoding step's launches.
    """
    run = on_its_device(run)
    operator = torch.library.custom_op(f"hinny::{name}", run, mutates_args=changes)
    operator.register_fake(fake)

    def call(*given: Any) -> Tensor:
        traced = torch.compiler.is_compiling() or type(given[0]) is not Tensor
        return operator(*given) if traced else run(*given)

    return call


REPLAY_ARGUMENTS = ("held_x", "held_dt", "held_b", "cursor")
_update = in_place("ssd_update", run_update, lambda state, x, *rest, **options: x.new_empty(x.shape),
                   ("state", *REPLAY_ARGUMENTS))


def compilations(table: str) -> list[Compilation]:
    """The kernels with every configuration of a shipped table: one token plainly, several with every argument."""
    cases = []
    for kernel in (ssd_update_kernel, ssd_replay_kernel, ssd_fold_kernel):
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            n = rule["when"].get("n", [129, 256])[1]
            states = {4: ("fp32",), 2: ("bf16", "fp16")}.get(rule["when"].get("bytes", 0), ("fp32", "bf16"))
            cases += [_compilation(f"{kernel.fn.__name__}-{number}-{state}-{'full' if full else 'plain'}", kernel,
                                   rule["use"], n, state, full, early=table == "sm90" and not full)
                      for state, full in zip((states * 2)[:2], (False, True), strict=True)]
    return cases


def _compilation(name: str, kernel: Any, use: dict[str, int], n: int, state: str, full: bool,
                 early: bool) -> Compilation:
    use = dict(use)
    warps, stages = use.pop("num_warps"), use.pop("num_stages")
    h, p, g, length = 128, 64, 8, 16
    constants: dict[str, Any] = use | {"SIZES": (h, p, g, n, n)}
    if kernel is not ssd_fold_kernel:
        constants |= {"SOFTPLUS": True, "EARLY": early} | ({} if full else {"z": None})
    if kernel is not ssd_update_kernel:
        constants["SIZES"] += (length, length) if kernel is ssd_replay_kernel else (length,)
    if kernel is not ssd_replay_kernel and (state == "fp32" or not full):
        constants["seed"] = None
    if not full:
        constants["t"] = 1
    kinds = {"state": f"*{state}", "slots": "*i64", "seed": "*i64", "cursor": "*i32", "held_dt": "*fp32", "t": "i32"}
    kinds |= dict.fromkeys(("held_x", "held_b", "x", "dt", "B", "C", "z", "y"), "*bf16")
    kinds |= dict.fromkeys(("A", "D", "dt_bias"), "*fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    return Compilation(name, kernel, signature, constants, warps, stages, tuple(v for v in signature if v != "t"))


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {
        kernel: [{"P": rows, "STREAM": stream, "num_warps": warps, "num_stages": 1} for stream in (0, 1)
                 for rows, warps in ((8, 4), (8, 8), (16, 4), (16, 8), (32, 4), (32, 8), (64, 4), (64, 8), (64, 16))]
        for kernel in ("ssd_update_kernel", "ssd_replay_kernel")
    } | {
        "ssd_fold_kernel": [{"HEADS": heads, "P": rows, "STREAM": 1, "num_warps": warps, "num_stages": 1}
                            for heads in (4, 8, 16) for rows, warps in ((16, 4), (16, 8), (32, 8), (64, 8))],
    }
