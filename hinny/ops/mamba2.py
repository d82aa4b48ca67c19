"""What lies between a Mamba-2 layer's input projection and its gated norm (arXiv 2405.21060, section 7):

    x, B, C = silu(conv(x)), silu(conv(B)), silu(conv(C))        each with weights of its own
    y       = ssd(x, dt, A, B, C)

`mamba2_update` (decode.py) is the same for the next tokens of many sequences, in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hinny.ops import backend
from hinny.ops.conv import Activation, causal_conv
from hinny.ops.inputs import check_rank, check_shapes, without_autocast
from hinny.ops.ssd import check_ssd, ssd

Three = tuple[Tensor, Tensor, Tensor]


def mamba2(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weights: Three, biases: Three | None = None, *,
    activation: Activation = "silu", D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = False, initial_state: Tensor | None = None, conv_state: Tensor | None = None,
    segments: Tensor | None = None, chunk_len: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd` of what `causal_conv` makes of x, B and C: a sequence through a layer's convolutions and its states.

    x (b t h p), B, C (b t g n): before the convolution; weights, biases: those of x, B, C in this order, (channels w)
    and (channels,); conv_state (b channels w-1): the inputs of x, B and C before position 0, in this order. The rest
    as for `ssd`. On a Hopper GPU the convolution of x is made where SSD loads it: x is read once.
    Returns y (b t h p) in x's dtype, the final state (b h p n) and the convolutions' final state (b channels w-1), both
    in float32 (float64 if x is). Gradients to all. Raises ValueError for shapes that do not fit.
    """
    check_rank("mamba2", "x", x, "b t h p")
    for name, part in (("B", B), ("C", C)):
        check_rank("mamba2", name, part, "b t g n")
    parts = (x, B, C)
    sizes = [part.shape[2] * part.shape[3] for part in parts]
    check_rank("mamba2", "weight", weights[0], "ch w")
    width = weights[0].shape[1]
    for size, weight, bias in zip(sizes, weights, biases or (None,) * 3, strict=True):
        check_shapes("mamba2", weight=(weight, (size, width)), bias=(bias, (size,)))
    check_shapes("mamba2", conv_state=(conv_state, (len(x), sum(sizes), width - 1)))
    befores = (None,) * 3 if conv_state is None else conv_state.split(sizes, 1)
    given = list(zip(parts, weights, biases or (None,) * 3, befores, strict=True))
    options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "initial_state": initial_state}

    def convolved(part: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
        y, after = causal_conv(part.flatten(2), weight, bias, activation=activation, initial_state=before,
                               segments=segments)
        return y.view(part.shape), after

    keys, queries = convolved(*given[1]), convolved(*given[2])
    if backend.chosen(x) == "triton" and activation == "silu" and z is None and segments is None:
        from hinny.ops.kernels import mamba2 as kernels

        if kernels.takes(x, keys[0], queries[0], weights[0]):
            check_ssd(x, dt, A, keys[0], queries[0], D, None, dt_bias, initial_state, None, chunk_len)
            with without_autocast(x):
                y, state, after = kernels.convolved_ssd(x, dt, A, keys[0], queries[0], *given[0][1:], **options)
            return y, state, torch.cat((after, keys[1], queries[1]), 1)
    values = convolved(*given[0])
    y, state = ssd(values[0], dt, A, keys[0], queries[0], z=z, segments=segments, chunk_len=chunk_len, **options)
    return y, state, torch.cat((values[1], keys[1], queries[1]), 1)
