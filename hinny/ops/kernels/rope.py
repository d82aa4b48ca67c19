"""Rotary positions: a program reads ROWS heads once, turns their pairs, and writes them beside what is not turned.

The backward is the rotation by minus the angle. The angles' cosines and sines are small tables, made by PyTorch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import differentiable

LARGEST = 1024
"""The dimensions of the largest head that is compiled ahead of time."""


@triton.jit(do_not_specialize=["rows", "t", "heads", "table_b"])
def rope_turn(
    x, cos, sin, y, rows, t, heads, x_b, x_t, x_h, table_b, HALF: tl.constexpr, P: tl.constexpr, BACK: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):
    """x (b t h P) by the strides of b, t and h; cos, sin (t HALF), rows of batches table_b apart → y (b t h P).

    The pair (i, i + HALF) turns by its angle, with BACK by minus its angle; the rest passes.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    batch, time = (token // t).to(tl.int64), token % t
    start = (batch * x_b + time.to(tl.int64) * x_t + (row % heads).to(tl.int64) * x_h)[:, None]
    end = row.to(tl.int64)[:, None] * P
    real = (row < rows)[:, None]
    i = tl.arange(0, PAIRS)[None, :]
    inside = real & (i < HALF)
    angle = ((batch * table_b + time) * HALF)[:, None] + i
    across = tl.load(cos + angle, mask=inside, other=0)  # (ROWS, PAIRS)
    up = tl.load(sin + angle, mask=inside, other=0)
    if BACK:
        up = -up
    first = tl.load(x + start + i, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + start + HALF + i, mask=inside, other=0).to(tl.float32)
    tl.store(y + end + i, (first * across - second * up).to(y.dtype.element_ty), mask=inside)
    tl.store(y + end + HALF + i, (second * across + first * up).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        tl.store(y + end + j, tl.load(x + start + j, mask=real & (j < P), other=0), mask=real & (j < P))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    y = x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (b, t, heads, p), half = x.shape, cos.shape[-1]
    use = launch("rope_turn", x.device, p=p)
    rows = b * t * heads
    rope_turn[(triton.cdiv(rows, use["ROWS"]),)](
        x, cos.contiguous(), sin.contiguous(), y, rows, t, heads, *x.stride()[:3], t if cos.dim() == 3 else 0,
        **_sizes(p, half, back), **use)
    return y


def _sizes(p: int, half: int, back: bool) -> dict[str, Any]:
    """The constants of a head of p dimensions, 2 * half of which turn."""
    rest = triton.next_power_of_2(p - 2 * half) if p > 2 * half else 0
    return {"HALF": half, "P": p, "BACK": back, "PAIRS": triton.next_power_of_2(half), "REST": rest}


def _forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(x, cos, sin, back=False)


def _backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(dy, cos, sin, back=True)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(run: Any, ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return None if dy is None else run(dy, *ctx.saved_tensors), None, None


_rope = differentiable("rope", _forward, _backward, fake=_fake, fake_backward=_fake, save=_save, gradients=_gradients)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b t h p), its first dimensions turned in pairs; cos, sin ([b] t rope_dim/2) float32, rope_dim above 0.

    x may have any strides between its heads, and between its tokens.
    """
    found: Tensor = _rope(x, cos, sin)
    return found


def compilations(table: str) -> list[Compilation]:
    """`rope_turn` with every configuration of a shipped table: half a head turned forward, a whole one back."""
    cases = []
    for number, rule in enumerate(rules(table)["rope_turn"]):
        p, use = rule["when"].get("p", [1, LARGEST])[1], rule["use"]
        for dtype, half, back in (("bf16", p // 4, False), ("fp32", p // 2, True)):
            constants = _sizes(p, half, back) | {"ROWS": use["ROWS"]}
            pointers = {"x": f"*{dtype}", "cos": "*fp32", "sin": "*fp32", "y": f"*{dtype}"}
            signature = {name: pointers.get(name, "i32") for name in rope_turn.arg_names if name not in constants}
            cases.append(Compilation(f"rope_turn-{number}-{p}-{dtype}", rope_turn, signature, constants,
                                     use["num_warps"], use["num_stages"], (*pointers, "x_b", "x_t", "x_h")))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU, for heads of 64 and 128 dimensions."""
    sizes = ((16, 4), (32, 4), (64, 4), (128, 4), (32, 2), (64, 8), (128, 8), (16, 1))
    return {"rope_turn": [{"ROWS": rows, "num_warps": warps, "num_stages": 1} for rows, warps in sizes]}
