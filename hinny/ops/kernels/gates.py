"""Sigmoid and softplus, which gates, activations and time steps are made of, as Triton functions for kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of a float32 tile, to 2^-21 relative; 0 where exp(-x) overflows."""
    # a squared reciprocal root is two instructions, a division six: of the 20 an element may cost, that shows
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in float32, to its last places also where exp(x) is small; x above 20."""
    e = tl.exp2(tl.minimum(x, 20.0) * LOG2_E)
    u = 1 + e
    # log(u) is that of the rounded u: the quotient puts back what the rounding took
    small = u == 1
    return tl.where(x > 20, x, tl.where(small, e, tl.log(u) * (e / tl.where(small, 1.0, u - 1))))


@triton.jit
def silu_slope(x):
    """The derivative of x sigmoid(x)."""
    gate = sigmoid(x)
    return gate + x * gate * (1 - gate)
