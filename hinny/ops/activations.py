"""The activations of feed-forward layers, keeping for the backward no more than what they are given.

    relu2    max(x, 0)^2                                        (arXiv 2109.08668)
    swiglu   silu(gate) * up, where silu(z) = z sigmoid(z)      (arXiv 2002.05202)

They return their input's dtype, also under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops import backend
from hinny.ops.inputs import check_shapes, wide


def relu2(x: Tensor) -> Tensor:
    """x (any shape) → max(x, 0)^2."""
    if backend.chosen(x) == "triton":
        from hinny.ops.kernels import activations as kernels  # here alone: Triton is imported where it runs

        return kernels.relu2(x)
    found: Tensor = _ReLU2.apply(x)
    return found


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (any shape, the same) → silu(gate) * up in gate's dtype, computed in float32 at least.

    Raises ValueError if the shapes differ.
    """
    check_shapes("swiglu", up=(up, tuple(gate.shape)))
    if backend.chosen(gate) == "triton":
        from hinny.ops.kernels import activations as kernels

        return kernels.swiglu(gate, up)
    found: Tensor = _SwiGLU.apply(gate, up)
    return found


class _ReLU2(torch.autograd.Function):
    """Of products, which autocast leaves alone; a power it would make in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        positive = F.relu(x)
        return positive.mul_(positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(dy).mul_(2)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate.to(wide(gate.dtype))).mul_(up).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        values, gradient = gate.to(wide(gate.dtype)), dy.to(wide(dy.dtype))
        dup = F.silu(values).mul_(gradient).to(up.dtype)
        return torch.ops.aten.silu_backward(gradient * up, values).to(gate.dtype), dup
