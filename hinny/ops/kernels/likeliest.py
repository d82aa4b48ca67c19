"""The largest number of each row and where it is, in one launch: PARTS programs look through a row.

A number and its place become one integer, whose order is that of the numbers and, among equal ones, that of the places
from the last to the first: so the largest integer is the answer, of a lane, of a program and of all. The program of a
row that arrives last, by a count that it sets back to zero, takes the largest of all parts'.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import on_its_device

MOST_ROWS = 65536
"""Rows of a launch."""


@triton.jit
def ordered(value, place):
    """value float32, place int32 → int64: NaN above all numbers, -0 as 0, of equal ones the first place above."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    # negative numbers have their bits the other way round
    key = tl.where(value != value, 2147483647, bits ^ ((bits >> 31) & 2147483647))
    return (key.to(tl.int64) << 32) | (2147483647 - place).to(tl.int64)


@triton.jit
def likeliest_kernel(logits, best, token, partial, arrived, v, stride, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """logits (n v) by the stride of a row; best, token (n,); partial (n PARTS) int64; arrived (n,) int32, zeros."""
    row = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    width = tl.cdiv(tl.cdiv(v, PARTS), BLOCK) * BLOCK
    start = part * width
    logits += row.to(tl.int64) * stride
    found = tl.full((BLOCK,), -9223372036854775808, tl.int64)
    for first in range(start, tl.minimum(start + width, v), BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(logits + place, mask=place < v, other=0)
        found = tl.maximum(found, tl.where(place < v, ordered(value, place), -9223372036854775808))
    tl.store(partial + row * PARTS + part, tl.max(found, 0))
    # a thread has written before the count says so
    tl.debug_barrier()
    before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
    if before == PARTS - 1:
        tl.store(arrived + row, 0)
        most = tl.max(tl.load(partial + row * PARTS + tl.arange(0, PARTS), cache_modifier=".cg"), 0)
        key = (most >> 32).to(tl.int32)
        tl.store(best + row, (key ^ ((key >> 31) & 2147483647)).to(tl.float32, bitcast=True))
        tl.store(token + row, 2147483647 - (most & 2147483647))


@on_its_device
def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`hinny.ops.likeliest` of float32 logits (n v), n of 1 or more."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    n, v = logits.shape
    assert n <= MOST_ROWS, f"{n} rows"
    use = launch("likeliest_kernel", logits.device, m=n)
    best, token = logits.new_empty(n), logits.new_empty(n, dtype=torch.int64)
    partial = token.new_empty(n, use["PARTS"])
    likeliest_kernel[(n * use["PARTS"],)](logits, best, token, partial, _counters(logits.device), v, logits.stride(0),
                                          **use)
    return best, token


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros; launches that share them run one after the other."""
    return torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)


def compilations(table: str) -> list[Compilation]:
    """The kernel with every configuration of a shipped table."""
    signature = {"logits": "*fp32", "best": "*fp32", "token": "*i64", "partial": "*i64", "arrived": "*i32", "v": "i32",
                 "stride": "i32"}
    return [Compilation(f"likeliest_kernel-{number}", likeliest_kernel, signature,
                        {name: rule["use"][name] for name in ("PARTS", "BLOCK")}, rule["use"]["num_warps"],
                        rule["use"]["num_stages"], tuple(signature))
            for number, rule in enumerate(rules(table)["likeliest_kernel"])]


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    uses: list[dict[str, Any]] = [{"PARTS": parts, "BLOCK": block, "num_warps": 4, "num_stages": 2}
                                  for parts in (8, 16, 32, 64) for block in (1024, 2048)]
    return {"likeliest_kernel": uses}
