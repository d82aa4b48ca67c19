"""Adding up what the programs of a backward kernel left of a weight's gradient: the same order, so the same bits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import launch, rules


@triton.jit(do_not_specialize=["parts"])
def sum_parts(parts_of, dweight, dbias, parts, ch, W: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """parts_of (parts taps ch) float32 → its sums: dweight (ch W) from the first W taps, the last first; dbias (ch)."""
    tap = tl.program_id(1)
    taps = tl.num_programs(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < ch
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        at = (part.to(tl.int64) * taps + tap) * ch
        total += tl.load(parts_of + at[:, None] + c[None, :], mask=(part < parts)[:, None] & inside[None, :], other=0)
    value = tl.sum(total, 0)
    if tap < W:
        tl.store(dweight + c.to(tl.int64) * W + (W - 1 - tap), value.to(dweight.dtype.element_ty), mask=inside)
    elif dbias is not None:
        tl.store(dbias + c, value.to(dbias.dtype.element_ty), mask=inside)


def sum_into(parts_of: Tensor, dweight: Tensor, dbias: Tensor | None = None) -> None:
    """Fills dweight (ch w) and dbias (ch,) with the sums over programs of parts_of (parts w ch), or (parts w+1 ch).

    Tap k of a part belongs to column w-1-k of dweight, the tap behind them to dbias.
    """
    parts, taps, ch = parts_of.shape
    use = launch("sum_parts", parts_of.device, parts=parts, ch=ch)
    grid = (triton.cdiv(ch, use["CHANNELS"]), taps)
    sum_parts[grid](parts_of, dweight, dbias, parts, ch, W=taps - (dbias is not None), **use)


def compilations(table: str) -> list[Compilation]:
    """`sum_parts` with every configuration of a shipped table, for the weights of a norm and of a convolution."""
    signature = {"parts_of": "*fp32", "dweight": "*fp32", "dbias": "*fp32", "parts": "i32", "ch": "i32"}
    cases = []
    for number, rule in enumerate(rules(table)["sum_parts"]):
        use: dict[str, Any] = dict(rule["use"])
        warps, stages = use.pop("num_warps"), use.pop("num_stages")
        for w, bias in ((1, False), (4, True)):
            given = signature if bias else {name: kind for name, kind in signature.items() if name != "dbias"}
            constants = {"W": w} | use | ({} if bias else {"dbias": None})
            aligned = tuple(name for name in given if name != "parts")
            cases.append(Compilation(f"sum_parts-{number}-w{w}", sum_parts, given, constants, warps, stages, aligned))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches of `sum_parts` worth measuring on a new GPU."""
    sizes = ((32, 32, 4), (8, 128, 4), (32, 64, 4), (64, 32, 4), (64, 64, 8))
    return {"sum_parts": [{"ROWS": rows, "CHANNELS": channels, "num_warps": warps, "num_stages": 1}
                          for rows, channels, warps in sizes]}
