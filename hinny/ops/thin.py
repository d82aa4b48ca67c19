"""Layers' parts for few rows, as decoding has them: a token of each of some sequences. No gradients.

    thin_linear   a product with a matrix, and the activation behind it
    add_norm      the residual stream goes on, and its norm for the next layer

On a GPU their kernels begin before the launch in front of them has ended (`hinny.ops.kernels.thin`), in which most of
the time between two large products would pass.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import backend
from hinny.ops.activations import relu2
from hinny.ops.inputs import check_shapes
from hinny.ops.inputs import wide as wide_type
from hinny.ops.norm import layer_norm_1p, rms_norm

ThinActivation = Literal["gelu", "relu2"]
WIDENED = 4096
"""Rows of a matrix that are widened at a time where no kernel gives float32 sums of shorter numbers."""
NARROW = (torch.int8, torch.float8_e4m3fn)
"""Types of weights that stand for other numbers, by a scale for each row."""
ACTIVATIONS = {None: None, "gelu": F.gelu, "relu2": relu2}


def thin_linear(x: Tensor, weight: Tensor, *, scale: Tensor | None = None, activation: ThinActivation | None = None,
                wide: bool = False) -> Tensor:
    """x (... k), weight (n k) → activation(x weight^T) (... n), in x's dtype; wide: in float32 at least, its sums not
    rounded.

    scale (n,) float32: of a weight of int8 or float8_e4m3fn, whose row i stands for scale_i weight_i. A kernel for up
    to 64 rows in bfloat16 or float16 on a GPU; PyTorch's product for all else, for which a narrow weight is widened.
    Raises ValueError for shapes and types that do not fit, RuntimeError where gradients would be recorded.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"thin_linear: activation is {activation!r}; it must be 'gelu', 'relu2' or None.")
    check_shapes("thin_linear", weight=(weight, (weight.shape[0], x.shape[-1])), scale=(scale, (weight.shape[0],)))
    if (scale is not None) != (weight.dtype in NARROW) or (scale is not None and scale.dtype != torch.float32):
        raise ValueError(f"thin_linear: weight is {weight.dtype} and scale {None if scale is None else scale.dtype}; "
                         f"weights of {', '.join(map(str, NARROW))} have a scale in float32, and no others have one.")
    _refuse_gradients("thin_linear", x, weight, scale)
    if x.is_cuda and backend.chosen(x) == "triton":
        from hinny.ops.kernels import thin as kernels  # here alone: Triton is imported where it runs

        if kernels.takes(x, weight, scale):
            return kernels.thin_linear(x, weight, activation, torch.float32 if wide else x.dtype, scale)
    if scale is not None:
        y = _scaled_product(x, weight, scale, wide)
    else:
        y = _wide_product(x, weight) if wide else F.linear(x, weight)
    act = ACTIVATIONS[activation]
    return y if act is None else act(y)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta (... d) → x + delta, rounded to x's dtype, and its norm: `layer_norm_1p` with a bias, else `rms_norm`.

    Without delta the first result is x itself. weight, bias (d,). Raises as `thin_linear`.
    """
    check_shapes("add_norm", delta=(delta, tuple(x.shape)), weight=(weight, (x.shape[-1],)),
                 bias=(bias, (x.shape[-1],)))
    _refuse_gradients("add_norm", x, delta, weight, bias)
    if x.is_cuda and backend.chosen(x) == "triton":
        from hinny.ops.kernels import thin as kernels

        if kernels.takes_norm(x):
            return kernels.add_norm(x, delta, weight, bias, eps)
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps) if bias is None else layer_norm_1p(total, weight, bias, eps)


def _scaled_product(x: Tensor, weight: Tensor, scale: Tensor, wide: bool) -> Tensor:
    """x (weight * scale)^T. Each short number is one of every longer type too; without its scale it is up to 448."""
    if wide or x.dtype == torch.float16:  # in which sums of such numbers could be infinite
        return (_wide_product(x, weight.to(x.dtype)) * scale).to(wide_type(x.dtype) if wide else x.dtype)
    return F.linear(x, weight.to(x.dtype)).mul_(scale)


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32 or, of float64, in float64."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x, weight)
    if x.is_cuda:
        return torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    # PyTorch gives the wider type on a GPU alone: some rows of the matrix at a time, lest it be held whole
    rows = x.float()
    found = rows.new_empty(*x.shape[:-1], len(weight))
    for columns, some in zip(found.split(WIDENED, -1), weight.split(WIDENED), strict=True):
        columns.copy_(rows @ some.float().T)
    return found


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        raise RuntimeError(f"{op} has no gradients; call it under torch.no_grad().")
