"""Cross-entropy of a linear layer on a GPU: cuBLAS does the products, one kernel all that lies between them.

    loss_targets    the smallest and largest target that counts, and how many count
    loss_softmax    a program has a row of a block of logits: it reads it once for the log-sum-exp, and again, from
                    the end that L2 still holds, to put the gradient in its place; with a z-loss, that one's too.
                    What is read for the last time, and what is written, makes room for the other rows first.
                    A row that one tile holds is read once: its exponentials stay in registers

A block of logits, in the products' type, is the one large thing beside the gradients: LOGIT_BYTES at most, or 128
rows. More rows are fewer blocks, and the weight's gradient (v d, float32) is read and written once a block: for as long
as the three products of 290 rows take on an H100, by its bandwidth and its rate.
Nothing waits for the GPU but the check of the targets, and that only until they are read: by then the whole op is
launched, so the GPU does not wait. Rows that a mask leaves out cost their products.
Letters: i rows, v vocabulary, d model.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.gates import LOG2_E
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import differentiable
from hinny.ops.loss import Reduction, target_check

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)
"""Under any logit that counts; finite, so that differences from it are no NaN."""
TARGETS = {"R": 2048, "num_warps": 8}
"""The launch of loss_targets, which takes a few microseconds."""
MIN_ROWS = 128
ROW_UNIT = 64
"""Logits of a row begin at a multiple of this: 128 bytes, whatever the vocabulary."""


@triton.jit(do_not_specialize=["rows"])
def loss_targets(targets, mask, found, counted, rows, R: tl.constexpr):
    """targets (i), mask (i) bool → found (2): least and greatest, the other way round if none counts; counted, >= 1."""
    least = tl.full((R,), 2 ** 62, tl.int64)
    greatest = tl.full((R,), -(2 ** 62), tl.int64)
    count = tl.zeros((R,), tl.int64)
    for first in range(0, rows, R):
        at = first + tl.arange(0, R)
        counts = at < rows
        target = tl.load(targets + at, mask=counts, other=0).to(tl.int64)
        if mask is not None:
            counts &= tl.load(mask + at, mask=counts, other=0) != 0
        least = tl.where(counts, tl.minimum(least, target), least)
        greatest = tl.where(counts, tl.maximum(greatest, target), greatest)
        count += counts.to(tl.int64)
    tl.store(found, tl.min(least, 0))
    tl.store(found + 1, tl.max(greatest, 0))
    tl.store(counted, tl.maximum(tl.sum(count, 0), 1))


@triton.jit
def _put_gradient(logits, share, at, target, counts, stride):
    """A tile's share of the softmax minus one at the target, if the row counts, in the place of its logits."""
    share = (share - tl.where(at == target, 1.0, 0.0)) * counts
    tl.store(logits + at, share.to(logits.dtype.element_ty), mask=at < stride, cache_modifier=".cs")


@triton.jit(do_not_specialize=["v"])
def loss_softmax(
    logits, targets, mask, losses, squares, z_loss, v, stride, UNROLL: tl.constexpr, THREADS: tl.constexpr,
    WIDTH: tl.constexpr, ONE: tl.constexpr, GRADIENT: tl.constexpr,
):
    """logits (i v) by rows of `stride` → losses (i); with GRADIENT, in their place softmax minus one at the target.

    squares (i), if given: z_loss times the square of the log-sum-exp, kept apart from losses, but in the gradient.
    A thread takes WIDTH logits that lie together, UNROLL times in a tile. It keeps a maximum and a sum of its own.
    ONE: a tile holds a row.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    counts = 1.0
    if mask is not None:
        counts = tl.load(mask + row).to(tl.float32)
    target = tl.load(targets + row)
    # a target outside the vocabulary is refused by the caller, and until then is no address
    target = tl.where((target >= 0) & (target < v), target, 0).to(tl.int32)
    TILE: tl.constexpr = UNROLL * THREADS * WIDTH
    place = (tl.arange(0, THREADS)[:, None, None] * WIDTH + tl.arange(0, UNROLL)[None, :, None] * (THREADS * WIDTH)
             + tl.arange(0, WIDTH)[None, None, :])
    # rows end in the middle of a tile, and a little memory lies behind them
    if ONE:
        tile = tl.load(logits + place, mask=place < stride, other=0, eviction_policy="evict_first").to(tl.float32)
        tile = tl.where(place < v, tile * LOG2_E, LOWEST)
        top = tl.max(tl.max(tile, 2), 1)
        powers = tl.exp2(tile - top[:, None, None])
        sums = tl.sum(tl.sum(powers, 2), 1)
    else:
        top = tl.full((THREADS,), LOWEST, tl.float32)
        sums = tl.zeros((THREADS,), tl.float32)
        for first in range(0, v, TILE):
            at = first + place
            tile = tl.load(logits + at, mask=at < stride, other=0, eviction_policy="evict_last").to(tl.float32)
            tile = tl.where(at < v, tile * LOG2_E, LOWEST)
            higher = tl.maximum(top, tl.max(tl.max(tile, 2), 1))
            sums = sums * tl.exp2(top - higher) + tl.sum(tl.sum(tl.exp2(tile - higher[:, None, None]), 2), 1)
            top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log2(tl.sum(sums * tl.exp2(top - highest), 0))
    loss = (log_sum - tl.load(logits + target).to(tl.float32) * LOG2_E) * LN_2
    tl.store(losses + row, loss * counts)
    excess = 1.0
    if squares is not None:
        natural = log_sum * LN_2
        tl.store(squares + row, z_loss * natural * natural * counts)
        excess = 1.0 + 2.0 * z_loss * natural
    if GRADIENT:
        # all have read the target's logit before one writes
        tl.debug_barrier()
        if ONE:
            share = powers * (tl.exp2(top - log_sum) * excess)[:, None, None]
            _put_gradient(logits, share, place, target, counts, stride)
        else:
            tiles = tl.cdiv(v, TILE)
            for k in range(tiles):
                at = (tiles - 1 - k) * TILE + place
                tile = tl.load(logits + at, mask=at < stride, other=0, eviction_policy="evict_first").to(tl.float32)
                _put_gradient(logits, tl.exp2(tile * LOG2_E - log_sum) * excess, at, target, counts, stride)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, *, reduction: Reduction,
    product_dtype: torch.dtype, z_loss: float,
) -> tuple[Tensor, Tensor]:
    """`hinny.ops.linear_cross_entropy_z` on kernels: checked arguments, and the type of its products.

    z_loss 0.0: no z-loss, and what is returned in its place is empty.
    """
    wanted = (v.requires_grad and torch.is_grad_enabled() for v in (x, weight))
    rows, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous()
    mask = None if mask is None else mask.reshape(-1).contiguous()
    total, z, count, _, _ = _operator(rows, weight, targets, mask, product_dtype, z_loss, *wanted)
    return (total / count, z / count if z_loss else z) if reduction == "mean" else (total, z)


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, product_dtype: torch.dtype, z_loss: float,
    want_dx: bool, want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (i d) → the sum of losses with the z-loss, the z-loss in it or empty, the number of rows that count, at least
    1, and the sum's gradients to x and weight, float32, or empty."""
    (rows, _), v = x.shape, len(weight)
    total, z, count, dx, dweight = _results(x, weight, targets, mask, product_dtype, z_loss, want_dx, want_dweight)
    found = targets.new_empty(2, dtype=torch.int64)
    loss_targets[(1,)](targets, mask, found, count, rows, **TARGETS)
    check = target_check(found, v)
    w = weight.to(product_dtype)
    stride = triton.cdiv(v, ROW_UNIT) * ROW_UNIT
    use = launch("loss_softmax", x.device, bits=8 * product_dtype.itemsize, v=v)
    one = v <= use["UNROLL"] * use["THREADS"] * use["WIDTH"]
    block_bytes = use.pop("LOGIT_BYTES")
    size = max(block_bytes // (stride * product_dtype.itemsize) // MIN_ROWS, 1) * MIN_ROWS
    buffer = x.new_empty(min(size, rows), stride, dtype=product_dtype)
    losses = x.new_empty(rows, dtype=torch.float32)
    squares = torch.empty_like(losses) if z_loss else None
    if rows == 0:
        dweight.zero_()
    for start in range(0, rows, size):
        some = slice(start, start + size)
        block = x[some] if mask is None else x[some].masked_fill(~mask[some, None], 0)
        block = block.to(product_dtype)
        logits = buffer[:len(block), :v]
        torch.mm(block, w.t(), out=logits)
        loss_softmax[(len(block),)](logits, targets[some], None if mask is None else mask[some], losses[some],
                                    None if squares is None else squares[some], z_loss or None, v, stride,
                                    ONE=one, GRADIENT=want_dx or want_dweight, **use)
        if want_dx:
            _product(logits, w, dx[some])
        if want_dweight:
            _product(logits.t(), block, dweight, add=start > 0)
    torch.sum(losses, 0, out=total)
    if squares is not None:
        torch.sum(squares, 0, out=z)
        total += z
    check()
    return total, z, count, dx, dweight


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's type without rounding to theirs."""
    # cuBLAS writes the wider type; PyTorch takes its name on a GPU alone, and on none where it is the operands' own
    widened: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **widened, out=out)
    else:
        torch.mm(a, b, **widened, out=out)


def _results(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, product_dtype: torch.dtype, z_loss: float,
    want_dx: bool, want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, count = x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.int64)
    z = x.new_empty(() if z_loss else 0, dtype=torch.float32)
    dx, dweight = (v.new_empty(v.shape if wanted else 0, dtype=torch.float32)
                   for v, wanted in ((x, want_dx), (weight, want_dweight)))
    return total, z, count, dx, dweight


def _backward(
    dtotal: Tensor, dx: Tensor, dweight: Tensor, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients times dtotal, in their inputs' types."""
    return (torch.mul(dx, dtotal, out=torch.empty_like(dx, dtype=x_dtype)),
            torch.mul(dweight, dtotal, out=torch.empty_like(dweight, dtype=weight_dtype)))


def _fake_backward(
    dtotal: Tensor, dx: Tensor, dweight: Tensor, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx, dtype=x_dtype), torch.empty_like(dweight, dtype=weight_dtype)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, *_, ctx.want_dx, ctx.want_dweight = inputs
    ctx.dtypes = x.dtype, weight.dtype
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(run: Any, ctx: Any, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 8
    dx, dweight = run(dtotal, *ctx.saved_tensors, *ctx.dtypes)
    return dx if ctx.want_dx else None, dweight if ctx.want_dweight else None, *(None,) * 6


_operator = differentiable("linear_cross_entropy", _forward, _backward, fake=_results, fake_backward=_fake_backward,
                           save=_save, gradients=_gradients)


def compilations(table: str) -> list[Compilation]:
    """Both kernels with every configuration of a shipped table, with a mask and gradients, without and with z-loss."""
    signature = {"targets": "*i64", "mask": "*i1", "found": "*i64", "counted": "*i64", "rows": "i32"}
    found = [Compilation("loss_targets-0", loss_targets, signature, {"R": TARGETS["R"]}, TARGETS["num_warps"], 1)]
    for number, rule in enumerate(rules(table)["loss_softmax"]):
        use = {name: value for name, value in rule["use"].items() if name != "LOGIT_BYTES"}
        warps, stages = use.pop("num_warps"), use.pop("num_stages")
        logits = "*fp32" if rule["when"].get("bits") == 32 else "*bf16"
        signature = {"logits": logits, "targets": "*i64", "mask": "*i1", "losses": "*fp32", "v": "i32",
                     "stride": "i32"}
        aligned = ("logits", "targets", "mask", "losses", "stride")
        use["GRADIENT"] = True
        # a tile may hold a row of the smallest vocabulary that the rule is for, and none of the largest
        least, most = rule["when"].get("v", (1, 2 ** 31 - 1))
        tile = use["UNROLL"] * use["THREADS"] * use["WIDTH"]
        for one in sorted({least <= tile, most <= tile}):
            name = f"loss_softmax-{number}{'-one' if one else ''}"
            constants = use | {"ONE": one}
            found.append(Compilation(name, loss_softmax, signature, constants | {"squares": None, "z_loss": None},
                                     warps, stages, aligned))
            found.append(Compilation(f"{name}-z", loss_softmax, signature | {"squares": "*fp32", "z_loss": "fp32"},
                                     constants, warps, stages, (*aligned, "squares")))
    return found


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {"loss_softmax": [
        {"UNROLL": unroll, "THREADS": 32 * warps, "WIDTH": 8, "LOGIT_BYTES": 2 ** power, "num_warps": warps,
         "num_stages": 1}
        for unroll, warps, power in ((4, 16, 29), (4, 16, 30), (4, 16, 31), (2, 32, 30), (4, 32, 30), (4, 8, 30),
                                     (2, 8, 30), (2, 16, 30), (4, 4, 30))]}
