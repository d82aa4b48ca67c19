"""Cross-entropy of a linear output layer, a block of rows at a time: no (rows, vocabulary) tensor is ever whole.

    loss_i = log sum_v exp(x_i . w_v) - x_i . w_target(i)
    gradients: (softmax_i - onehot_i) w  to x_i,  sum over i of (softmax_i - onehot_i) x_i  to w
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops import backend
from hinny.ops.inputs import check_shapes, wide, without_autocast

# logits per block: 512 rows of a vocabulary of 4096 (4096 rows, d 128, one thread of an AVX-512 EPYC, forward and
# backward: 64 rows 333 ms, 128 262, 256 244, 512 230, 1024 236, all 289;
# F.cross_entropy on whole logits, run in turn with this: 319 against 239)
BLOCK = 2 ** 21
MIN_ROWS = 128

Reduction = Literal["mean", "sum"]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """Mean or sum of the loss of predicting targets from x @ weight.T: nats, float32 (float64 for float64 inputs).

    x (... d); weight (v d); targets (...) int64 in [0, v); mask (...) bool: rows that count; the others add nothing
    (on kernels they still cost their products).
    Where no row counts the loss is 0 and so are its gradients, for either reduction.
    The products run in autocast's dtype where autocast is on; sums and gradients are float32 at least.
    Raises ValueError for shapes that do not fit or a target outside the vocabulary; the latter not where a CUDA graph
    is captured or replayed.
    """
    chosen = backend.chosen(x)
    if chosen == "reference":
        return linear_cross_entropy_reference(x, weight, targets, mask, reduction=reduction)
    _check(x, weight, targets, mask, reduction)
    device = x.device.type
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if chosen == "triton":
        from hinny.ops.kernels import loss as kernels  # here alone: Triton is imported where it runs

        with without_autocast(x):
            return kernels.linear_cross_entropy(x, weight, targets, mask, reduction=reduction,
                                                product_dtype=product_dtype)
    rows, targets = _selected(x, weight, targets, mask)
    with without_autocast(x):
        total = _LinearCrossEntropy.apply(rows, weight, targets, product_dtype)
        return total / max(len(targets), 1) if reduction == "mean" else total


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """The definition of `linear_cross_entropy`, with all logits, in float32 at least; the same arguments."""
    _check(x, weight, targets, mask, reduction)
    rows, targets = _selected(x, weight, targets, mask)
    with without_autocast(x):
        dtype = wide(x.dtype)
        logits = rows.to(dtype) @ weight.to(dtype).t()
        total = F.cross_entropy(logits, targets, reduction="sum")
        return total / max(len(targets), 1) if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    """rows (i d), weight (v d), targets (i) -> summed loss; the gradients are made in the forward, block by block."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, product_dtype: torch.dtype) -> Tensor:
        dtype = wide(rows.dtype)
        needs = ctx.needs_input_grad[:2]
        w = weight.to(product_dtype)
        total = torch.zeros((), dtype=dtype, device=rows.device)
        drows = torch.empty_like(rows, dtype=dtype) if needs[0] else None
        dweight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        size = max(MIN_ROWS, BLOCK // len(weight))
        for start in range(0, len(rows), size):
            block, target = rows[start:start + size].to(product_dtype), targets[start:start + size, None]
            logits = torch.mm(block, w.t()).to(dtype)
            chosen, top = logits.gather(1, target), logits.amax(1, keepdim=True)
            sums = logits.sub_(top).exp_().sum(1, keepdim=True)
            total += (sums.log() + top - chosen).sum()
            if not any(needs):
                continue
            # the logits' gradient, in their place: softmax minus one at the target
            dlogits = logits.mul_(sums.reciprocal_())
            dlogits.scatter_add_(1, target, dlogits.new_full((1, 1), -1).expand_as(target))
            dlogits = dlogits.to(product_dtype)
            if drows is not None:
                drows[start:start + size] = torch.mm(dlogits, w)
            if dweight is not None and product_dtype == dtype:
                dweight.addmm_(dlogits.t(), block)
            elif dweight is not None:
                dweight += torch.mm(dlogits.t(), block)
        ctx.save_for_backward(drows, dweight)
        ctx.dtypes = rows.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        drows, dweight = ctx.saved_tensors
        return (None if drows is None else (drows * dtotal).to(ctx.dtypes[0]),
                None if dweight is None else (dweight * dtotal).to(ctx.dtypes[1]), None, None)


def _selected(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that count (i d) and their targets (i), all in the vocabulary."""
    rows, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if mask is not None:
        index = mask.reshape(-1).nonzero().squeeze(1)
        rows, targets = rows.index_select(0, index), targets.index_select(0, index)
    if len(targets):
        refuse_targets([int(targets.min()), int(targets.max())], len(weight))
    return rows, targets


def refuse_targets(found: list[int], v: int) -> None:
    """Raises ValueError unless targets, from the least to the greatest of two found, are of a vocabulary of v."""
    least, greatest = found
    if least <= greatest and not 0 <= least <= greatest < v:
        raise ValueError(f"linear_cross_entropy: targets run from {least} to {greatest}; they must lie in [0, {v}), "
                         "the vocabulary of weight.")


def _check(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, reduction: Reduction) -> None:
    check_shapes("linear_cross_entropy", weight=(weight, (*weight.shape[:1], x.shape[-1])),
                 targets=(targets, tuple(x.shape[:-1])), mask=(mask, tuple(x.shape[:-1])))
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}; it must be 'mean' or 'sum'.")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"linear_cross_entropy: mask has dtype {mask.dtype}; it must be torch.bool.")
