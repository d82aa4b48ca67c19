"""Normalisations, computed in float32 whatever comes in and returned in the input's dtype.

    rms_norm         x / rms(x) * weight                                   (arXiv 1910.07467)
    layer_norm_1p    (x - mean) / std * (weight + 1) + bias: the stored gain is around zero, as in Megatron's
                     LayerNorm-1p, which the paper's Transformer uses
    gated_rms_norm   rms_norm of x * silu(z) within groups of channels: the gate comes before the norm
                     (arXiv 2405.21060 section 7.2; groups of d_inner / n_groups in the paper's models)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops import backend
from hinny.ops.inputs import cast, check_shapes, wide, without_autocast


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (... d) scaled to a root mean square of 1, times weight (d,)."""
    check_shapes("rms_norm", weight=(weight, (x.shape[-1],)))
    if backend.chosen(x) == "triton":
        return _on_kernels(x, None, weight, eps, x.shape[-1])
    with without_autocast(x):
        values, weight = cast(wide(x.dtype), x, weight)
        return _RMSNorm.apply(values, None, weight, eps, weight.shape[0]).to(x.dtype)


def layer_norm_1p(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (... d) to mean 0 and variance 1, times weight (d,) + 1, plus bias (d,)."""
    check_shapes("layer_norm_1p", weight=(weight, (x.shape[-1],)), bias=(bias, (x.shape[-1],)))
    if backend.chosen(x) == "triton":
        from hinny.ops.kernels import layer_norm as kernels

        return kernels.layer_norm_1p(x, weight, bias, eps)
    with without_autocast(x):
        values, weight, bias = cast(wide(x.dtype), x, weight, bias)
        return F.layer_norm(values, weight.shape, weight + 1, bias, eps).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """x * silu(z) (... d), scaled to a root mean square of 1 in each group of group_size channels, times weight (d,).

    Raises ValueError if group_size does not divide d.
    """
    check_shapes("gated_rms_norm", z=(z, tuple(x.shape)), weight=(weight, (x.shape[-1],)))
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"gated_rms_norm: group_size is {group_size}; it must divide the {x.shape[-1]} channels of x.")
    if backend.chosen(x) == "triton":
        if x.is_cuda and not (torch.is_grad_enabled() and any(v.requires_grad for v in (x, z, weight))):
            from hinny.ops.kernels import thin

            if thin.takes_norm(x):
                return thin.gated_norm(x, z, weight, eps, group_size)
        return _on_kernels(x, z, weight, eps, group_size)
    with without_autocast(x):
        values, gate, weight = cast(wide(x.dtype), x, z, weight)
        return _RMSNorm.apply(values, gate, weight, eps, group_size).to(x.dtype)


def _on_kernels(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    from hinny.ops.kernels import norm as kernels  # here alone: Triton is imported where it runs

    return kernels.gated_rms_norm(x, z, weight, eps, group_size)


class _RMSNorm(torch.autograd.Function):
    """x (... d), z (... d) | None, weight (d,) -> x silu(z) / rms in its group * weight.

    Written out because PyTorch composes the norm of a dozen operations on a CPU: see docs/log.md.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
        gated = x if z is None else F.silu(z).mul_(x)
        groups = gated.unflatten(-1, (-1, group_size))
        scale = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_().div_(group_size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, z, gated, weight, scale)
        return (groups * scale).flatten(-2).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, gated, weight, scale = ctx.saved_tensors
        shape = (*scale.shape[:-1], -1)
        unit = (gated.view(shape) * scale).view_as(gated)
        product = unit * dy
        dweight = product.reshape(-1, product.shape[-1]).sum(0)
        # d(gated) = scale (dy weight - unit mean(dy weight unit)), the mean over the group
        along = product.mul_(weight).view(shape).mean(-1, keepdim=True)
        dgated = torch.mul(dy, weight, out=product).view(shape).sub_(unit.view(shape).mul_(along)).mul_(scale)
        dgated = dgated.view_as(gated)
        if z is None:
            return dgated, None, dweight, None, None
        dz = torch.ops.aten.silu_backward(torch.mul(dgated, x, out=unit), z)
        return dgated.mul_(F.silu(z)), dz, dweight, None, None
