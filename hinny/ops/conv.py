"""Causal depthwise convolution in front of the state space layers (arXiv 2312.00752, section 3.4; window 4 there).

    y_t = bias + sum over k < w of weight[:, w-1-k] * x_{t-k},   then silu if asked; x before the start is zero
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops import backend
from hinny.ops.inputs import cast, check_rank, check_shapes, count_documents, wide, without_autocast

Activation = Literal["silu"] | None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None,
    initial_state: Tensor | None = None, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel's short weighted sum over the last w tokens of its own document.

    x (b t ch); weight (ch w), the last column for the current token; bias (ch,); initial_state (b ch w-1): the inputs
    before position 0, of position 0's document; segments (b t) int: inputs of another document count as zero.
    Returns y (b t ch) in x's dtype and the final state (b ch w-1): the last w-1 inputs, zero where another
    document's, in float32 (float64 if x is). Gradients to all. Raises ValueError for shapes that do not fit.
    """
    chosen = backend.chosen(x)
    if chosen == "reference":
        return causal_conv_reference(x, weight, bias, activation=activation, initial_state=initial_state,
                                     segments=segments)
    _check(x, weight, bias, activation, initial_state, segments)
    if chosen == "triton":
        return _on_kernels(x, weight, bias, activation, initial_state, segments)
    if x.shape[1] == 1:
        y, state = causal_conv_step(x[:, 0], weight, bias, activation=activation, initial_state=initial_state)
        return y.unsqueeze(1), state
    with without_autocast(x):
        inputs, documents = _with_history(x, weight, initial_state, segments)
        weight, bias = cast(inputs.dtype, weight, bias)
        y = _Taps.apply(inputs, weight, bias, documents, activation == "silu")
        return y.to(x.dtype), _final_state(inputs, documents, weight.shape[1])


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None,
    initial_state: Tensor | None = None, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `causal_conv`, token by token; the same arguments and results."""
    _check(x, weight, bias, activation, initial_state, segments)
    with without_autocast(x):
        inputs, documents = _with_history(x, weight, initial_state, segments)
        weight, bias = cast(inputs.dtype, weight, bias)
        width, outputs = weight.shape[1], []
        for i in range(x.shape[1]):
            window = inputs[:, i:i + width]  # (b w ch)
            if documents is not None:
                window = window * (documents[:, i:i + width] == documents[:, i + width - 1, None])[..., None]
            outputs.append((window * weight.t()).sum(1))
        y = torch.stack(outputs, 1)
        y = y if bias is None else y + bias
        y = F.silu(y) if activation == "silu" else y
        return y.to(x.dtype), _final_state(inputs, documents, width)


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`: x (b ch), state (b ch w-1) -> y (b ch), next state."""
    check_rank("causal_conv_step", "x", x, "b ch")
    _check(x.unsqueeze(1), weight, bias, activation, initial_state, None)
    if backend.chosen(x) == "triton":
        y, state = _on_kernels(x.unsqueeze(1), weight, bias, activation, initial_state, None)
        return y.squeeze(1), state
    with without_autocast(x):
        dtype = wide(x.dtype)
        values, weight, bias, state = cast(dtype, x.unsqueeze(-1), weight, bias, initial_state)
        if state is None:
            state = values.new_zeros(*x.shape, weight.shape[1] - 1)
        window = torch.cat([state, values], -1)  # (b ch w)
        y = (window * weight).sum(-1)
        y = y if bias is None else y + bias
        y = F.silu(y) if activation == "silu" else y
        return y.to(x.dtype), window[..., 1:].contiguous()


def _on_kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, initial_state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from hinny.ops.kernels import conv as kernels  # here alone: Triton is imported where it runs

    return kernels.causal_conv(x, weight, bias, activation=activation, initial_state=initial_state, segments=segments)


class _Taps(torch.autograd.Function):
    """inputs (b w-1+t ch), weight (ch w), bias (ch) | None, documents (b w-1+t) | None, silu -> y (b t ch).

    Shifted multiply-adds over whole tensors. Forward and backward of 16 x 256 x 256, one thread of an AVX-512 EPYC:
    9 ms; F.conv1d 18 ms, F.conv2d channels-last 14 ms, the same multiply-adds under autograd 18 ms.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, silu: bool
    ) -> Tensor:
        width = weight.shape[1]
        t = inputs.shape[1] - width + 1
        taps = weight.t().contiguous()  # a strided column would cost four times as much per multiply-add
        current = inputs[:, width - 1:]
        y = current * taps[-1] if bias is None else torch.addcmul(bias, current, taps[-1])
        scratch = None if documents is None else torch.empty_like(y)
        for k in range(width - 1):
            shifted = inputs[:, k:k + t]
            if documents is not None:
                shifted = torch.mul(shifted, _same(documents, k, width), out=scratch)
            y.addcmul_(shifted, taps[k])
        ctx.save_for_backward(inputs, taps, documents, y if silu else None)
        ctx.has_bias = bias is not None
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, taps, documents, before_silu = ctx.saved_tensors
        width, t = len(taps), dy.shape[1]
        dy = dy.contiguous() if before_silu is None else torch.ops.aten.silu_backward(dy, before_silu)
        dinputs, dtaps = torch.zeros_like(inputs), torch.empty_like(taps)
        scratch = torch.empty_like(dy)
        for k in range(width):
            reaching = dy if documents is None else dy * _same(documents, k, width)
            dinputs[:, k:k + t].addcmul_(reaching, taps[k])
            # the product is contiguous: a sum over a sliced tensor takes 30 times as long
            dtaps[k] = torch.mul(reaching, inputs[:, k:k + t], out=scratch).sum((0, 1))
        return dinputs, dtaps.t(), dy.sum((0, 1)) if ctx.has_bias else None, None, None


def _same(documents: Tensor, k: int, width: int) -> Tensor:
    """Where tap k (width-1 is the current token) reads a token of the same document: (b t 1)."""
    t = documents.shape[1] - width + 1
    return (documents[:, k:k + t] == documents[:, width - 1:]).unsqueeze(-1)


def _with_history(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The inputs with w-1 earlier ones in front (b w-1+t ch), and each one's document, 0 for the history."""
    before = weight.shape[1] - 1
    dtype = wide(x.dtype)
    if initial_state is None:
        inputs = F.pad(x.to(dtype), (0, 0, before, 0))
    else:
        inputs = torch.cat([initial_state.to(dtype).transpose(1, 2), x.to(dtype)], 1)
    return inputs, None if segments is None else F.pad(count_documents(segments), (before, 0))


def _final_state(inputs: Tensor, documents: Tensor | None, width: int) -> Tensor:
    start = inputs.shape[1] - width + 1
    state = inputs[:, start:]
    if documents is not None:
        state = state * (documents[:, start:] == documents[:, -1:]).unsqueeze(-1)
    return state.transpose(1, 2).contiguous()


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, initial_state: Tensor | None,
    segments: Tensor | None,
) -> None:
    check_rank("causal_conv", "x", x, "b t ch")
    check_rank("causal_conv", "weight", weight, "ch w")
    (b, t, ch), width = x.shape, weight.shape[1]
    check_shapes("causal_conv", weight=(weight, (ch, width)), bias=(bias, (ch,)),
                 initial_state=(initial_state, (b, ch, width - 1)), segments=(segments, (b, t)))
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv: activation is {activation!r}; it must be 'silu' or None.")
