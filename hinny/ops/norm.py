"""Normalisations, computed in float32 whatever comes in and returned in the input's dtype.

    rms_norm         x / rms(x) * weight                                   (arXiv 1910.07467)
    layer_norm_1p    (x - mean) / std * (weight + 1) + bias: the stored gain is around zero, as in Megatron's
                     LayerNorm-1p, which the paper's Transformer uses
    gated_rms_norm   rms_norm of x * silu(z) within groups of channels: the gate comes before the norm
                     (arXiv 2405.21060 section 7.2; groups of d_inner / n_groups in the paper's models)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hinny.ops.inputs import cast, check_shapes, wide, without_autocast


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (... d) scaled to a root mean square of 1, times weight (d,)."""
    check_shapes("rms_norm", weight=(weight, (x.shape[-1],)))
    with without_autocast(x):
        values, weight = cast(wide(x.dtype), x, weight)
        return F.rms_norm(values, weight.shape, weight, eps).to(x.dtype)


def layer_norm_1p(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (... d) to mean 0 and variance 1, times weight (d,) + 1, plus bias (d,)."""
    check_shapes("layer_norm_1p", weight=(weight, (x.shape[-1],)), bias=(bias, (x.shape[-1],)))
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
    with without_autocast(x):
        values, gate, weight = cast(wide(x.dtype), x, z, weight)
        gated = (values * F.silu(gate)).unflatten(-1, (-1, group_size))
        return (F.rms_norm(gated, (group_size,), eps=eps).flatten(-2) * weight).to(x.dtype)
