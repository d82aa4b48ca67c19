"""Products with weights whose gradients cost less memory traffic under autocast.

    linear         y = x W^T
    split_linear   the same x with several weights

PyTorch's own under autocast makes the gradient of a float32 weight in the products' type, and then casts it. Here the
product writes the weight's type itself, without that rounding. The gradient of an input that several products share is
summed by the products, each adding to what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hinny.ops.inputs import without_autocast


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (... d_in), weight (d_out d_in) → x weight^T (... d_out), in autocast's type where autocast is on.

    Gradients are in the types of x and weight, rounded once; they cannot be differentiated again under autocast.
    """
    if not _is_ours(x, weight) or _autocast_dtype(x, weight) is None:
        return F.linear(x, weight)
    return split_linear(x, (weight,))[0]


def split_linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x (... d_in), weights (d_out d_in) of any d_out → `linear` of x and each, x being kept once for the backward.

    Gradients as in `linear`; they cannot be differentiated again, whether autocast is on or not.
    """
    if not _is_ours(x, *weights):
        return tuple(F.linear(x, weight) for weight in weights)
    found: tuple[Tensor, ...] = _Products.apply(x, _autocast_dtype(x, *weights), *weights)
    return found


def _is_ours(*tensors: Tensor) -> bool:
    """Whether gradients are wanted, of tensors as they are: the compiler and subclasses have rules of their own."""
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors))


def _autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """What autocast makes of these operands; None where it leaves them alone, as it does with float64."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    if any(tensor.dtype == torch.float64 or not tensor.is_floating_point() for tensor in tensors):
        return None
    return torch.get_autocast_dtype(device)


class _Products(torch.autograd.Function):
    """x (... d_in), the products' type, weights (d_out d_in) → x weight^T of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype | None, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, *(weight.dtype for weight in weights)
        if dtype is not None:
            x, weights = x.to(dtype), tuple(weight.to(dtype) for weight in weights)
        wants_x, _, *wants_weights = ctx.needs_input_grad
        ctx.save_for_backward(x if any(wants_weights) else None, *(weights if wants_x else (None,) * len(weights)))
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_dtype, *dtypes = ctx.dtypes
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        lead: tuple[int, ...] = ()
        dx: Tensor | None = None
        dweights: list[Tensor | None] = []
        for dy, weight, dtype, wanted in zip(grads, weights, dtypes, ctx.needs_input_grad[2:], strict=True):
            dweight = None
            if dy is not None:
                lead, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])
                with without_autocast(dy):
                    dweight = _product(dy.t(), rows, dtype) if wanted and rows is not None else None
                    if weight is not None:
                        dx = _product(dy, weight, x_dtype) if dx is None else _add_product(dx, dy, weight)
            dweights.append(dweight)
        return None if dx is None else dx.view(*lead, dx.shape[-1]), None, *dweights


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; where that is float32, sums of narrower operands are not rounded to their type."""
    if a.dtype == dtype or dtype != torch.float32:
        return torch.mm(a, b).to(dtype)
    # PyTorch can write the wider type on a GPU alone
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a.to(dtype), b.to(dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total`, changed in place to total + a @ b."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.is_cuda and total.dtype == torch.float32:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(_product(a, b, total.dtype))
