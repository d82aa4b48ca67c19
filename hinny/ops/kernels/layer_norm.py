"""Layer norm with a gain stored around zero: a program takes `span` whole rows, TILE at a time.

    layer_norm_forward    reads a row once; mean, variance and scaling are of what lies in registers
    layer_norm_backward   reads x and dy once, some rows ahead of their use, and makes mean and variance again; the
                          gradients of gain and bias stay in registers, every program leaves its own, `sum_parts` adds
                          them up

The variance is of the values less their mean, so that a large mean costs no digits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.norm import add_pairs, as_rows
from hinny.ops.kernels.operators import differentiable
from hinny.ops.kernels.sums import sum_into

LARGEST = 32768
"""The longest row that is compiled ahead of time; longer ones spill more and more registers."""

UNSPILLED = 8192
"""The longest row that fits the registers both ways."""


@triton.jit(do_not_specialize=["rows", "span"])
def layer_norm_forward(
    x, weight, bias, y, rows, span, d, x_stride, eps, TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """x (rows d) by its row stride, weight, bias (d,) → y (rows d) = (x - mean) / std * (weight + 1) + bias."""
    first = tl.program_id(0) * span
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < d
    gain = tl.load(weight + column, mask=inside, other=0).to(tl.float32) + 1
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    for start in tl.range(first, tl.minimum(first + span, rows), TILE, num_stages=STAGES):
        row = (start + tl.arange(0, TILE)).to(tl.int64)[:, None]
        real = inside & (row < rows)
        value = tl.load(x + row * x_stride + column, mask=real, other=0).to(tl.float32)  # (TILE, BLOCK)
        value = tl.where(inside, value - tl.sum(value, 1)[:, None] / d, 0)
        scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None]
        tl.store(y + row * d + column, (value * scale * gain + shift).to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "span"])
def layer_norm_backward(
    x, weight, dy, dx, parts_of, rows, span, d, x_stride, dy_stride, eps,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """The forward's inputs, dy (rows d) by its row stride → dx (rows d), parts_of (programs 2 d) float32: those of the
    gain's and of the bias's gradient.

    With u = (x - mean) r, r = 1 / std, and g = dy (weight + 1): dx = r (g - mean(g) - u mean(g u)).
    """
    part = tl.program_id(0)
    first = part * span
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < d
    gain = tl.load(weight + column, mask=inside, other=0).to(tl.float32) + 1
    dgain = tl.zeros((TILE, BLOCK), tl.float32)
    dshift = tl.zeros((TILE, BLOCK), tl.float32)
    for start in tl.range(first, tl.minimum(first + span, rows), TILE, num_stages=STAGES):
        row = (start + tl.arange(0, TILE)).to(tl.int64)[:, None]
        real = inside & (row < rows)
        value = tl.load(x + row * x_stride + column, mask=real, other=0).to(tl.float32)  # (TILE, BLOCK)
        gradient = tl.load(dy + row * dy_stride + column, mask=real, other=0).to(tl.float32)
        dshift += gradient
        # two sums at once, twice: the warps of a program wait for each other
        total, level = tl.reduce((value, gradient * gain), 1, add_pairs)
        value = tl.where(inside, value - total[:, None] / d, 0)
        squares, along = tl.reduce((value * value, gradient * gain * value), 1, add_pairs)
        # rows behind the last are zero, and their scale may be infinite
        scale = tl.where(row < rows, tl.rsqrt(squares / d + eps)[:, None], 0)
        dgain += gradient * (value * scale)
        gradient = gradient * gain - level[:, None] / d - value * (scale * scale * along[:, None] / d)
        tl.store(dx + row * d + column, (gradient * scale).to(dx.dtype.element_ty), mask=real)
    mine = parts_of + part.to(tl.int64) * 2 * d + tl.arange(0, BLOCK)
    tl.store(mine, tl.sum(dgain, 0), mask=tl.arange(0, BLOCK) < d)
    tl.store(mine + d, tl.sum(dshift, 0), mask=tl.arange(0, BLOCK) < d)


def _launched(kernel: str, x: Tensor) -> tuple[int, dict[str, int]]:
    """Parts of the rows, and the constants and sizes of the launch for x (rows d)."""
    rows, d = x.shape
    block = triton.next_power_of_2(d)
    use = launch(kernel, x.device, block=block, rows=rows)
    return triton.cdiv(rows, use["span"]), use | {"BLOCK": block}


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = _fake(x, weight, bias, eps)
    x = as_rows(x)
    parts, use = _launched("layer_norm_forward", x)
    layer_norm_forward[(parts,)](x, weight.contiguous(), bias.contiguous(), y, x.shape[0], use.pop("span"), x.shape[1],
                                 x.stride(0), eps, **use)
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = results = _fake_backward(x, weight, bias, dy, eps)
    x, dy = as_rows(x), as_rows(dy)
    parts, use = _launched("layer_norm_backward", x)
    parts_of = x.new_empty((parts, 2, x.shape[1]), dtype=torch.float32)
    layer_norm_backward[(parts,)](x, weight.contiguous(), dy, dx, parts_of, x.shape[0], use.pop("span"), x.shape[1],
                                  x.stride(0), dy.stride(0), eps, **use)
    sum_into(parts_of, dweight, dbias)
    return results


def _fake_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(run: Any, ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*(run(*ctx.saved_tensors, dy, ctx.eps) if dy is not None else (None,) * 3), None)


_normalize = differentiable("layer_norm_1p", _forward, _backward, fake=_fake, fake_backward=_fake_backward, save=_save,
                            gradients=_gradients)


def layer_norm_1p(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`hinny.ops.layer_norm_1p` on a GPU; x may be a slice of wider rows."""
    found: Tensor = _normalize(x, weight, bias, eps)
    return found


def compilations(table: str) -> list[Compilation]:
    """Both kernels with every configuration of a shipped table, in bfloat16 and float32."""
    cases: dict[tuple, Compilation] = {}
    for kernel in (layer_norm_forward, layer_norm_backward):
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            block = rule["when"].get("block", [1, LARGEST])[1]
            use = {name: value for name, value in rule["use"].items() if name != "span"}
            for dtype in ("bf16", "fp32"):
                name = f"{kernel.fn.__name__}-{number}-{block}-{dtype}"
                # rules that differ in what is no constant share their compilation
                cases.setdefault((kernel.fn.__name__, block, *use.values(), dtype),
                                 _compilation(name, kernel, use, block, dtype))
    return list(cases.values())


def _compilation(name: str, kernel: Any, use: dict[str, int], block: int, dtype: str) -> Compilation:
    kinds = {"weight": "*fp32", "bias": "*fp32", "parts_of": "*fp32", "eps": "fp32"}
    kinds |= dict.fromkeys(("x", "y", "dy", "dx"), f"*{dtype}")
    constants = {"TILE": use["TILE"], "BLOCK": block, "STAGES": use["STAGES"]}
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    aligned = tuple(argument for argument in signature if argument not in ("rows", "span", "eps"))
    spill = "a row of this length does not fit the registers of one program" if block > UNSPILLED else ""
    return Compilation(name, kernel, signature, constants, use["num_warps"], use["num_stages"], aligned, spill)


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU, for rows of about a thousand channels."""
    forward = ((8, 1, 1, 2), (8, 1, 1, 1), (16, 1, 1, 2), (4, 1, 1, 2), (16, 1, 1, 4), (16, 2, 1, 4), (16, 1, 3, 2),
               (1, 1, 1, 2))
    backward = ((32, 1, 3, 4), (32, 1, 2, 4), (32, 2, 3, 4), (32, 1, 1, 4), (64, 1, 3, 4), (16, 1, 3, 4),
                (32, 1, 3, 2), (64, 1, 2, 8), (32, 2, 2, 8))
    return {name: [{"span": span, "TILE": tile, "STAGES": stages, "num_warps": warps, "num_stages": 1}
                   for span, tile, stages, warps in sizes]
            for name, sizes in (("layer_norm_forward", forward), ("layer_norm_backward", backward))}
