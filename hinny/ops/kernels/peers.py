"""The sum of what GPUs of one host made, the residual and the norm behind it, in one launch on each of them.

A program has one row. It puts its GPU's part where the others can read it, tells the same program of every other one,
waits for theirs, and adds all parts up in the order of ranks: all find equal bits. A flag is raised by who wrote and
lowered by who waited, so that launches can be recorded and repeated.

What a rank put at a place may be overwritten when all have read it. A rank that hears of the next sum from another
knows that this one has read all it needed for the sum before: so neighbouring sums need places of their own, no more.
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

MOST_ROWS = 64
PLACES = 3
"""For an odd number of sums in a step that is repeated, of which the last and the first are neighbours too."""


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
            flag = tl.load(flags + other).to(tl.pointer_type(tl.int32)) + (place * RANKS + RANK) * ROWS + row
            while tl.atomic_cas(flag, 0, 1, sem="release", scope="sys") != 0:
                pass
    for other in tl.static_range(RANKS):
        if other != RANK:
            flag = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + (place * RANKS + other) * ROWS + row
            while tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys") != 1:
                pass
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


def compilations(table: str) -> list[Compilation]:
    """The kernel for two ranks with every configuration of a shipped table."""
    cases = []
    kinds = dict.fromkeys(("x", "delta", "total", "y"), "*bf16") | dict.fromkeys(("weight", "bias"), "*fp32")
    kinds |= {"parts": "*i64", "flags": "*i64", "eps": "fp32"}
    for number, rule in enumerate(rules(table)["sum_norm_kernel"]):
        constants = {"RANK": 1, "RANKS": 2, "EARLY": table == "sm90", "BLOCK": rule["when"].get("block", [0, 16384])[1],
                     "ROWS": MOST_ROWS}
        signature = {v: kinds.get(v, "i32") for v in sum_norm_kernel.arg_names if v not in constants}
        cases.append(Compilation(f"sum_norm_kernel-{number}", sum_norm_kernel, signature, constants,
                                 rule["use"]["num_warps"], rule["use"]["num_stages"],
                                 tuple(v for v in signature if v not in ("place", "eps"))))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {"sum_norm_kernel": [{"num_warps": warps, "num_stages": 1} for warps in (4, 8, 16)]}
