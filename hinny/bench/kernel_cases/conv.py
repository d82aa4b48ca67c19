"""The causal convolution with SiLU over the channels of a layer. mamba_ssm has none without its CUDA extension."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text

WINDOW = 4


def cases() -> list[Case]:
    """The 8B layer's x, B and C together, four sequences and one long one."""
    return [conv_case(b=b, t=t, ch=8192 + 2 * 8 * 128, backward=backward)
            for b, t in ((4, 4096), (1, 32768)) for backward in (False, True)]


def conv_case(*, b: int, t: int, ch: int, backward: bool) -> Case:
    """y: forward, or from its gradient those of x, weight and bias."""
    # x in, y out; x and dy in, dx out
    return Case("conv.backward" if backward else "conv.forward", shape_text(b=b, t=t, ch=ch, w=WINDOW),
                partial(_inputs, b=b, t=t, ch=ch), _conv, moved=(3 if backward else 2) * 2 * b * t * ch, unit="TB/s",
                wanted=("x", "weight", "bias") if backward else ())


def _inputs(draw: Draw, *, b: int, t: int, ch: int) -> Inputs:
    return {"x": draw.normal(b, t, ch), "weight": draw.uniform(-0.5, 0.5, ch, WINDOW),
            "bias": draw.uniform(-0.5, 0.5, ch)}


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.causal_conv(x, weight, bias, activation="silu")
