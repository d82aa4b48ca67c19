"""What GPUs of one host exchange in a decoding step, through memory that each of them can write to, one launch each.

    sum_norm_kernel   the sum of what they made, the residual and the norm behind it
    gather_kernel     the columns of all of them beside each other

A program of the sum has one row. It writes its GPU's part to the others, two numbers in the lower half of a word of 64
bits and the number of the launch in the upper half; and it reads what the others wrote to it until all words say this
launch's number. A word is written at once, so nothing else must be told or waited for: a sum takes one way between two
GPUs. All parts are added up in the order of ranks: all find equal bits.

A rank that hears of a sum from another knows that this one has read all it needed for the sum before: so neighbouring
sums need places of their own, no more. Gathering moves too much for words of half use: its programs tell each other by
flags when there is room and when all is there. A flag is raised by who tells and lowered by who waited, so that
launches can be recorded and repeated.
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
def address(table, rank, kind: tl.constexpr):
    """The pointer that a table (ranks,) int64 has for a rank, to elements of this kind."""
    return tl.multiple_of(tl.load(table + rank).to(tl.pointer_type(kind)), 16)


@triton.jit
def first_of(pair):
    """The first of two bfloat16 numbers that lie in an int32, as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def second_of(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(v):
    """v float32 → float32 with the digits that bfloat16 has."""
    return v.to(tl.bfloat16).to(tl.float32)


@triton.jit
def pair_of(first, second):
    """Two float32, as bfloat16, in an int32."""
    low = first.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (second.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def sum_norm_kernel(
    x, delta, weight, bias, total, y, parts, counts, place, half, eps, RANK: tl.constexpr, RANKS: tl.constexpr,
    EARLY: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    """x, delta (m half) pairs of bfloat16 → total = x + the ranks' delta, y = its norm (bias: a layer norm with gain
    weight + 1).

    parts (RANKS,) int64: where each rank's words (PLACES RANKS ROWS half) int64 begin; counts (ROWS,) int32: how often
    the row was summed before, equal on all ranks.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < half
    gain, next_gain = (tl.load(weight + 2 * column, mask=inside, other=0).to(tl.float32),
                       tl.load(weight + 2 * column + 1, mask=inside, other=0).to(tl.float32))
    if EARLY:
        tl.debug_barrier()
        gdc_wait()
    count = tl.load(counts + row) + 1
    mine = tl.load(delta + row * half + column, mask=inside, other=0)
    word = (count.to(tl.int64) << 32) | (mine.to(tl.int64) & 4294967295)
    for other in tl.static_range(RANKS):
        if other != RANK:
            there = ((place * RANKS + RANK) * ROWS + row).to(tl.int64) * half + column
            tl.store(address(parts, other, tl.int64) + there, word, mask=inside)
    old = tl.load(x + row * half + column, mask=inside, other=0)
    added, next_added = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for other in tl.static_range(RANKS):
        pair = mine
        if other != RANK:
            here = ((place * RANKS + other) * ROWS + row).to(tl.int64) * half + column
            at = address(parts, RANK, tl.int64) + here
            word = tl.load(at, mask=inside, other=0, volatile=True)
            while tl.max(tl.where(inside & ((word >> 32).to(tl.int32) != count), 1, 0), 0) > 0:
                word = tl.load(at, mask=inside, other=0, volatile=True)
            pair = word.to(tl.int32)
        added += first_of(pair)
        next_added += second_of(pair)
    first, second = rounded(first_of(old) + rounded(added)), rounded(second_of(old) + rounded(next_added))
    tl.store(total + row * half + column, pair_of(first, second), mask=inside)
    if bias is not None:
        mean = (tl.sum(first, 0) + tl.sum(second, 0)) / (2 * half)
        first, second = tl.where(inside, first - mean, 0), tl.where(inside, second - mean, 0)
        gain, next_gain = gain + 1, next_gain + 1
    scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * half) + eps)
    first, second = first * scale * gain, second * scale * next_gain
    if bias is not None:
        first += tl.load(bias + 2 * column, mask=inside, other=0).to(tl.float32)
        second += tl.load(bias + 2 * column + 1, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * half + column, pair_of(first, second), mask=inside)
    # all threads have read the count
    tl.debug_barrier()
    tl.store(counts + row, count)


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
    x, parts, flags, m, c, RANK: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """x (m c) → its columns in every rank's (m RANKS*c), which holds those of all ranks at the end.

    parts, flags (RANKS,) int64: where each rank's result and its flags (2 RANKS PROGRAMS) int32 begin: [0] what the
    result held before was read, [1] the columns are there. All programs run at once: there are few enough.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    blocks = tl.cdiv(c, BLOCK)
    for other in tl.static_range(RANKS):
        if other != RANK:
            raise_flag(flags, other, RANK * PROGRAMS + program)
    for other in tl.static_range(RANKS):
        if other != RANK:
            await_flag(flags, RANK, other * PROGRAMS + program)
    tl.debug_barrier()
    for i in range(program, m * blocks, PROGRAMS):
        row, column = (i // blocks).to(tl.int64), i % blocks * BLOCK + tl.arange(0, BLOCK)
        mine = tl.load(x + row * c + column, mask=column < c, other=0)
        for other in tl.static_range(RANKS):
            there = address(parts, other, x.dtype.element_ty) + (row * RANKS + RANK) * c + column
            tl.store(there, mine, mask=column < c)
    # all threads have written before one says so
    tl.debug_barrier()
    for other in tl.static_range(RANKS):
        if other != RANK:
            raise_flag(flags, other, (RANKS + RANK) * PROGRAMS + program)
    for other in tl.static_range(RANKS):
        if other != RANK:
            await_flag(flags, RANK, (RANKS + other) * PROGRAMS + program)


@on_its_device
def sum_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, parts: Tensor, counts: Tensor,
             place: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """`hinny.ops.peers.sum_norm`."""
    x, delta = x.contiguous(), delta.contiguous()
    half, total, y, early = x.shape[-1] // 2, torch.empty_like(x), torch.empty_like(x), overlaps(x.device)
    rows, block = x.numel() // (2 * half), triton.next_power_of_2(half)
    assert 0 < rows <= MOST_ROWS, f"{rows} rows"
    use = launch("sum_norm_kernel", x.device, block=block)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    pairs = [tensor.view(torch.int32) for tensor in (x, delta, total, y)]
    sum_norm_kernel[(rows,)](pairs[0], pairs[1], weight, bias, pairs[2], pairs[3], parts, counts, place, half, eps,
                             rank, ranks, early, block, MOST_ROWS, **use, **options)
    return total, y


@on_its_device
def gather(x: Tensor, parts: Tensor, flags: Tensor, rank: int, ranks: int) -> None:
    """`hinny.ops.peers.gather`."""
    x, (m, c), early = x.contiguous(), x.shape, overlaps(x.device)
    assert 0 < m <= MOST_ROWS, f"{m} rows"
    use = launch("gather_kernel", x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    gather_kernel[(PROGRAMS,)](x, parts, flags, m, c, rank, ranks, early, PROGRAMS=PROGRAMS, **use, **options)


def compilations(table: str) -> list[Compilation]:
    """The kernels for two ranks with every configuration of a shipped table."""
    cases, early = [], table == "sm90"
    kinds = dict.fromkeys(("x", "delta", "total", "y", "counts"), "*i32") | dict.fromkeys(("weight", "bias"), "*fp32")
    kinds |= {"parts": "*i64", "eps": "fp32"}
    for number, rule in enumerate(rules(table)["sum_norm_kernel"]):
        constants = {"RANK": 1, "RANKS": 2, "EARLY": early, "BLOCK": rule["when"].get("block", [0, 8192])[1],
                     "ROWS": MOST_ROWS}
        signature = {v: kinds.get(v, "i32") for v in sum_norm_kernel.arg_names if v not in constants}
        cases.append(Compilation(f"sum_norm_kernel-{number}", sum_norm_kernel, signature, constants,
                                 rule["use"]["num_warps"], rule["use"]["num_stages"],
                                 tuple(v for v in signature if v not in ("place", "eps"))))
    for number, rule in enumerate(rules(table)["gather_kernel"]):
        constants = {"RANK": 1, "RANKS": 2, "EARLY": early, "BLOCK": rule["use"]["BLOCK"], "PROGRAMS": PROGRAMS}
        signature = {"x": "*fp32", "parts": "*i64", "flags": "*i64", "m": "i32", "c": "i32"}
        cases.append(Compilation(f"gather_kernel-{number}", gather_kernel, signature, constants,
                                 rule["use"]["num_warps"], rule["use"]["num_stages"],
                                 tuple(v for v in signature if v != "m")))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {"sum_norm_kernel": [{"num_warps": warps, "num_stages": 1} for warps in (4, 8, 16)],
            "gather_kernel": [{"BLOCK": block, "num_warps": 8, "num_stages": 1} for block in (1024, 2048, 4096)]}
