"""Root mean square norms, gated or not: a program takes one group of channels of `span` rows, TILE rows at a time.

    norm_forward    reads a row's group once, keeps it in registers between the sum of squares and the scaling
    norm_backward   reads x, z and dy once, some rows ahead of their use, and finds both sums of a group together; the
                    gain's gradient stays in registers, every program leaves its own, `sum_parts` adds them up

Programs of neighbouring groups run side by side, so that whole rows are read at a time; the group's gain is read once.
Letters: d channels of a row, in groups of `size`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.gates import sigmoid
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import differentiable
from hinny.ops.kernels.sums import sum_into

LARGEST = 32768
"""The largest group that is compiled ahead of time; larger ones spill more and more registers."""

UNSPILLED = 4096
"""The largest group whose backward fits the registers."""


@triton.jit(do_not_specialize=["rows", "span", "groups"])
def norm_forward(
    x, z, weight, y, rows, span, groups, size, x_stride, z_stride, eps,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """x, z (rows d) by their row strides, weight (d,) → y (rows d) = x silu(z) / rms of its group * weight."""
    group = tl.program_id(0) % groups
    first = tl.program_id(0) // groups * span
    column = tl.arange(0, BLOCK)
    inside = (column < size)[None, :]
    c = (group * size + column)[None, :]
    gain = tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    for start in tl.range(first, tl.minimum(first + span, rows), TILE, num_stages=STAGES):
        row = (start + tl.arange(0, TILE)).to(tl.int64)[:, None]
        real = inside & (row < rows)
        value = tl.load(x + row * x_stride + c, mask=real, other=0).to(tl.float32)  # (TILE, BLOCK)
        if z is not None:
            gate = tl.load(z + row * z_stride + c, mask=real, other=0).to(tl.float32)
            value *= gate * sigmoid(gate)
        scale = tl.rsqrt(tl.sum(value * value, 1) / size + eps)[:, None]
        tl.store(y + row * groups * size + c, (value * scale * gain).to(y.dtype.element_ty), mask=real)


@triton.jit
def add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit(do_not_specialize=["rows", "span", "groups"])
def norm_backward(
    x, z, weight, dy, dx, dz, parts_of, rows, span, groups, size, x_stride, z_stride, dy_stride, eps,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """The forward's inputs, dy (rows d) by its row stride → dx, dz (rows d), parts_of (parts of the rows, d) float32.

    With v = x silu(z) and r = 1 / rms: dv = r (dy weight - v r r mean(dy weight v)), the mean over the group.
    """
    group = tl.program_id(0) % groups
    part = tl.program_id(0) // groups
    first = part * span
    column = tl.arange(0, BLOCK)
    inside = (column < size)[None, :]
    c = (group * size + column)[None, :]
    gain = tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    dgain = tl.zeros((TILE, BLOCK), tl.float32)
    for start in tl.range(first, tl.minimum(first + span, rows), TILE, num_stages=STAGES):
        row = (start + tl.arange(0, TILE)).to(tl.int64)[:, None]
        real = inside & (row < rows)
        value = tl.load(x + row * x_stride + c, mask=real, other=0).to(tl.float32)  # (TILE, BLOCK)
        gradient = tl.load(dy + row * dy_stride + c, mask=real, other=0).to(tl.float32)
        gated = value
        if z is not None:
            gate = tl.load(z + row * z_stride + c, mask=real, other=0).to(tl.float32)
            open = sigmoid(gate)
            gated = value * (gate * open)
        # both sums at once: the warps of a program wait for each other once a row
        squares, along = tl.reduce((gated * gated, gradient * gain * gated), 1, add_pairs)
        # rows behind the last are zero, and their scale may be infinite
        scale = tl.where(row < rows, tl.rsqrt(squares / size + eps)[:, None], 0)
        dgain += gradient * (gated * scale)
        gradient = (gradient * gain - gated * (scale * scale * along[:, None] / size)) * scale
        out = row * groups * size + c
        if z is not None:
            slope = open + gate * open * (1 - open)
            tl.store(dz + out, (gradient * value * slope).to(dz.dtype.element_ty), mask=real)
            gradient *= gate * open
        tl.store(dx + out, gradient.to(dx.dtype.element_ty), mask=real)
    mine = parts_of + part.to(tl.int64) * groups * size + group * size + column
    tl.store(mine, tl.sum(dgain, 0), mask=column < size)


def as_rows(x: Tensor) -> Tensor:
    """x (... d) as (rows d), its channels side by side; a slice of wider rows stays where it is."""
    x = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


def _launched(kernel: str, x: Tensor, z: Tensor | None, size: int) -> tuple[int, int, dict[str, int]]:
    """Groups, parts of the rows, and the constants and sizes of the launch for x (rows d)."""
    rows, d = x.shape
    block = triton.next_power_of_2(size)
    use = launch(kernel, x.device, block=block, rows=rows, gated=int(z is not None))
    return d // size, triton.cdiv(rows, use["span"]), use | {"BLOCK": block}


def _forward(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, size: int) -> Tensor:
    y = _fake(x, z, weight, eps, size)
    x, z = as_rows(x), None if z is None else as_rows(z)
    groups, parts, use = _launched("norm_forward", x, z, size)
    norm_forward[groups * parts,](x, z, weight.contiguous(), y, x.shape[0], use.pop("span"), groups, size, x.stride(0),
                                  0 if z is None else z.stride(0), eps, **use)
    return y


def _fake(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, size: int) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    x: Tensor, z: Tensor | None, weight: Tensor, dy: Tensor, eps: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dz, dweight = results = _fake_backward(x, z, weight, dy, eps, size)
    x, z, dy = as_rows(x), None if z is None else as_rows(z), as_rows(dy)
    groups, parts, use = _launched("norm_backward", x, z, size)
    parts_of = x.new_empty((parts, 1, x.shape[1]), dtype=torch.float32)
    norm_backward[groups * parts,](x, z, weight.contiguous(), dy, dx, None if z is None else dz, parts_of, x.shape[0],
                                   use.pop("span"), groups, size, x.stride(0), 0 if z is None else z.stride(0),
                                   dy.stride(0), eps, **use)
    sum_into(parts_of, dweight)
    return results


def _fake_backward(
    x: Tensor, z: Tensor | None, weight: Tensor, dy: Tensor, eps: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if z is None else z.new_empty(z.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def _gradients(run: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight = ctx.saved_tensors
    dx, dz, dweight = run(x, z, weight, dy, ctx.eps, ctx.size)
    return dx, None if z is None else dz, dweight, None, None


_normalize = differentiable("rms_norm", _forward, _backward, fake=_fake, fake_backward=_fake_backward, save=_save,
                            gradients=_gradients)


def gated_rms_norm(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """`hinny.ops.gated_rms_norm` on a GPU, or without z `rms_norm` in groups; x and z may be slices of wider rows."""
    return _normalize(x, z, weight, eps, group_size)


def compilations(table: str) -> list[Compilation]:
    """Both kernels with every configuration of a shipped table: gated in bfloat16, plain in float32."""
    cases: dict[tuple, Compilation] = {}
    for kernel in (norm_forward, norm_backward):
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            block = rule["when"].get("block", [1, LARGEST])[1]
            use = {name: value for name, value in rule["use"].items() if name != "span"}
            for dtype, gated in (("bf16", True), ("fp32", False)):
                if rule["when"].get("gated", gated) == gated:
                    name = f"{kernel.fn.__name__}-{number}-{block}-{dtype}{'-gated' if gated else ''}"
                    # rules that differ in what is no constant share their compilation
                    cases.setdefault((kernel.fn.__name__, block, *use.values(), dtype),
                                     _compilation(name, kernel, use, block, dtype, gated))
    return list(cases.values())


def _compilation(name: str, kernel: Any, use: dict[str, int], block: int, dtype: str, gated: bool) -> Compilation:
    kinds = {"weight": "*fp32", "parts_of": "*fp32", "eps": "fp32"}
    kinds |= dict.fromkeys(("x", "z", "y", "dy", "dx", "dz"), f"*{dtype}")
    constants: dict[str, Any] = {"TILE": use["TILE"], "BLOCK": block, "STAGES": use["STAGES"]}
    constants |= {} if gated else {tensor: None for tensor in ("z", "dz") if tensor in kernel.arg_names}
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    aligned = tuple(argument for argument in signature if argument not in ("rows", "span", "groups", "eps"))
    spill = "a group of this size does not fit the registers of one program" if block > UNSPILLED else ""
    return Compilation(name, kernel, signature, constants, use["num_warps"], use["num_stages"], aligned, spill)


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU, for groups of about a thousand channels."""
    forward = ((8, 1, 1, 1), (16, 1, 1, 1), (4, 1, 1, 1), (16, 2, 1, 1), (16, 1, 2, 1), (16, 1, 3, 2), (16, 1, 1, 4),
               (64, 1, 3, 2), (1, 1, 1, 1))
    backward = ((64, 1, 3, 4), (64, 1, 2, 4), (64, 1, 4, 4), (64, 1, 1, 4), (64, 1, 2, 8), (64, 2, 2, 8),
                (128, 1, 3, 4), (32, 1, 3, 4), (64, 1, 2, 2), (8, 1, 2, 4), (32, 2, 3, 4), (64, 2, 3, 4))
    return {name: [{"span": span, "TILE": tile, "STAGES": stages, "num_warps": warps, "num_stages": 1}
                   for span, tile, stages, warps in sizes]
            for name, sizes in (("norm_forward", forward), ("norm_backward", backward))}
