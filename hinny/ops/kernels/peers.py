"""What GPUs of one host exchange in a decoding step, through memory that each of them can read, one launch each.

    sum_norm_kernel   the sum of what they made, the residual and the norm behind it
    gather_kernel     the columns of all of them beside each other

A program of the sum has one row. It puts its GPU's part where the others can read it, tells the same program of every
other one, waits for theirs, and adds all parts up in the order of ranks: all find equal bits. A flag is raised by who
wrote and lowered by who waited, so that launches can be recorded and repeated.

What a rank put at a place may be overwritten when all have read it. A rank that hears of the next sum from another
knows that this one has read all it needed for the sum before: so neighbouring sums need places of their own, no more.
Gathering has one place, and says when it has read it; so the next one, whenever that is, waits for the word.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import launch, overlaps, rules
from hinny.ops.kernels.operators import on_its_device
from hinny.ops.peers import MOST_ROWS, PROGRAMS


@triton.jit
def address(table, rank, like):
    """The pointer that a table (ranks,) int64 has for a rank, to elements like those of `like`."""
    return tl.load(table + rank).to(like.dtype)


@triton.jit
def sum_norm_kernel(
    x, delta, weight, bias, total, y, parts, flags, place, d, eps, RANK: tl.constexpr, RANKS: tl.constexpr,
    EARLY: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    """x, delta (m d) → total = x + the ranks' delta, y = its norm (bias: a layer norm with gain weight + 1).

    parts, flags (RANKS,) int64: where each rank's parts (PLACES ROWS d) and flags (PLACES RANKS ROWS) int32 begin.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < d
    gain = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    here = (place * ROWS + row).to(tl.int64) * d + column
    if EARLY:
        tl.debug_barrier()
        gdc_wait()
    mine = tl.load(delta + row * d + column, mask=inside, other=0)
    tl.store(address(parts, RANK, delta) + here, mine, mask=inside)
    # all threads have written before one says so
    tl.debug_barrier()
    for other in tl.static_range(RANKS):
        if other != RANK:
            raise_flag(flags, other, (place * RANKS + RANK) * ROWS + row)
    for other in tl.static_range(RANKS):
        if other != RANK:
            await_flag(flags, RANK, (place * RANKS + other) * ROWS + row)
    tl.debug_barrier()
    added = tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(RANKS):
        if other == RANK:
            added += mine.to(tl.float32)
        else:
            added += tl.load(address(parts, other, delta) + here, mask=inside, other=0, volatile=True).to(tl.float32)
    value = tl.load(x + row * d + column, mask=inside, other=0)
    value = (value.to(tl.float32) + added.to(value.dtype).to(tl.float32)).to(value.dtype)
    tl.store(total + row * d + column, value, mask=inside)
    value = value.to(tl.float32)
    if bias is not None:
        value = tl.where(inside, value - tl.sum(value, 0) / d, 0)
        gain += 1
    value = value * tl.rsqrt(tl.sum(value * value, 0) / d + eps) * gain
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * d + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def raise_flag(table, other, number):
    """Sets the flag `number` of the rank `other`, once it is lowered."""
    flag = tl.load(table + other).to(tl.pointer_type(tl.int32)) + number
    while tl.atomic_cas(flag, 0, 1, sem="release", scope="sys") != 0:
        pass


@triton.jit
def await_flag(table, rank, number):
    """Waits until the flag `number` of this rank is set, and lowers it."""
    flag = tl.load(table + rank).to(tl.pointer_type(tl.int32)) + number
    while tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys") != 1:
        pass


@triton.jit
def gather_kernel(
    x, y, parts, flags, m, c, RANK: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """x (m c) → y (m RANKS*c), the columns of all ranks in their order.

    parts, flags (RANKS,) int64: where each rank's parts (m c) and flags (2 RANKS PROGRAMS) int32 begin: [0] there is
    something to read, [1] it was read, which is how it begins. All programs run at once: there are few enough.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    blocks = tl.cdiv(c, BLOCK)
    for other in tl.static_range(RANKS):
        if other != RANK:
            await_flag(flags, RANK, (RANKS + other) * PROGRAMS + program)
    tl.debug_barrier()
    for i in range(program, m * blocks, PROGRAMS):
        row, column = (i // blocks).to(tl.int64), i % blocks * BLOCK + tl.arange(0, BLOCK)
        mine = tl.load(x + row * c + column, mask=column < c, other=0)
        tl.store(address(parts, RANK, x) + row * c + column, mine, mask=column < c)
        tl.store(y + (row * RANKS + RANK) * c + column, mine, mask=column < c)
    # all threads have written before one says so
    tl.debug_barrier()
    for other in tl.static_range(RANKS):
        if other != RANK:
            raise_flag(flags, other, RANK * PROGRAMS + program)
    for other in tl.static_range(RANKS):
        if other != RANK:
            await_flag(flags, RANK, other * PROGRAMS + program)
            tl.debug_barrier()
            theirs = address(parts, other, x)
            for i in range(program, m * blocks, PROGRAMS):
                row, column = (i // blocks).to(tl.int64), i % blocks * BLOCK + tl.arange(0, BLOCK)
                found = tl.load(theirs + row * c + column, mask=column < c, other=0, volatile=True)
                tl.store(y + (row * RANKS + other) * c + column, found, mask=column < c)
            # all threads have read
            tl.debug_barrier()
            raise_flag(flags, other, (RANKS + RANK) * PROGRAMS + program)


@on_its_device
def sum_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, parts: Tensor, flags: Tensor,
             place: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """x, delta (... d) of at most MOST_ROWS rows → the sum and its norm; the rest as for the kernel."""
    x, delta = x.contiguous(), delta.contiguous()
    d, total, y, early = x.shape[-1], torch.empty_like(x), torch.empty_like(x), overlaps(x.device)
    rows, block = x.numel() // d, triton.next_power_of_2(d)
    assert 0 < rows <= MOST_ROWS, f"{rows} rows"
    use = launch("sum_norm_kernel", x.device, block=block)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    sum_norm_kernel[(rows,)](x, delta, weight, bias, total, y, parts, flags, place, d, eps, rank, ranks, early, block,
                             MOST_ROWS, **use, **options)
    return total, y


@on_its_device
def gather(x: Tensor, parts: Tensor, flags: Tensor, rank: int, ranks: int) -> Tensor:
    """x (m c) of at most MOST_ROWS rows → (m ranks*c)."""
    x, (m, c), early = x.contiguous(), x.shape, overlaps(x.device)
    assert 0 < m <= MOST_ROWS, f"{m} rows"
    y, use = x.new_empty(m, ranks * c), launch("gather_kernel", x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    gather_kernel[(PROGRAMS,)](x, y, parts, flags, m, c, rank, ranks, early, PROGRAMS=PROGRAMS, **use, **options)
    return y


def compilations(table: str) -> list[Compilation]:
    """The kernel for two ranks with every configuration of a shipped table."""
    cases, early = [], table == "sm90"
    kinds = dict.fromkeys(("x", "delta", "total", "y"), "*bf16") | dict.fromkeys(("weight", "bias"), "*fp32")
    kinds |= {"parts": "*i64", "flags": "*i64", "eps": "fp32"}
    for number, rule in enumerate(rules(table)["sum_norm_kernel"]):
        constants = {"RANK": 1, "RANKS": 2, "EARLY": early, "BLOCK": rule["when"].get("block", [0, 16384])[1],
                     "ROWS": MOST_ROWS}
        signature = {v: kinds.get(v, "i32") for v in sum_norm_kernel.arg_names if v not in constants}
        cases.append(Compilation(f"sum_norm_kernel-{number}", sum_norm_kernel, signature, constants,
                                 rule["use"]["num_warps"], rule["use"]["num_stages"],
                                 tuple(v for v in signature if v not in ("place", "eps"))))
    for number, rule in enumerate(rules(table)["gather_kernel"]):
        constants = {"RANK": 1, "RANKS": 2, "EARLY": early, "BLOCK": rule["use"]["BLOCK"], "PROGRAMS": PROGRAMS}
        signature = {"x": "*fp32", "y": "*fp32", "parts": "*i64", "flags": "*i64", "m": "i32", "c": "i32"}
        cases.append(Compilation(f"gather_kernel-{number}", gather_kernel, signature, constants,
                                 rule["use"]["num_warps"], rule["use"]["num_stages"],
                                 tuple(v for v in signature if v != "m")))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {"sum_norm_kernel": [{"num_warps": warps, "num_stages": 1} for warps in (4, 8, 16)],
            "gather_kernel": [{"BLOCK": block, "num_warps": 8, "num_stages": 1} for block in (1024, 2048, 4096)]}
