"""The small ops of the 840M Transformer's layers. mamba_ssm has none of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text

EPS = 1e-5


def cases() -> list[Case]:
    """Four sequences of 4096 tokens."""
    return [build(backward=backward, **sizes) for build, sizes in (
        (layer_norm_case, dict(rows=16384, d=1024)), (rope_case, dict(b=4, t=4096, h=16, p=64, rope_dim=32)),
        (relu2_case, dict(rows=16384, d=4096)), (swiglu_case, dict(rows=16384, d=4096))) for backward in (False, True)]


def layer_norm_case(*, rows: int, d: int, backward: bool) -> Case:
    """y, or from its gradient those of x, weight and bias."""
    return Case("layer_norm.backward" if backward else "layer_norm.forward", shape_text(rows=rows, d=d),
                partial(_norm_inputs, rows=rows, d=d), partial(ops.layer_norm_1p, eps=EPS),
                moved=(3 if backward else 2) * 2 * rows * d, unit="TB/s",
                wanted=("x", "weight", "bias") if backward else ())


def rope_case(*, b: int, t: int, h: int, p: int, rope_dim: int, backward: bool) -> Case:
    """y, or from its gradient that of x; the tables of the angles are made in the forward."""
    return Case("rope.backward" if backward else "rope.forward", shape_text(b=b, t=t, h=h, p=p, rope_dim=rope_dim),
                partial(_rope_inputs, shape=(b, t, h, p)), partial(_rope, rope_dim=rope_dim),
                moved=2 * 2 * b * t * h * p, unit="TB/s", wanted=("x",) if backward else ())


def relu2_case(*, rows: int, d: int, backward: bool) -> Case:
    """y, or from its gradient that of x."""
    return Case("relu2.backward" if backward else "relu2.forward", shape_text(rows=rows, d=d),
                partial(_activation_inputs, names=("x",), rows=rows, d=d), ops.relu2,
                moved=(3 if backward else 2) * 2 * rows * d, unit="TB/s", wanted=("x",) if backward else ())


def swiglu_case(*, rows: int, d: int, backward: bool) -> Case:
    """y, or from its gradient those of gate and up."""
    return Case("swiglu.backward" if backward else "swiglu.forward", shape_text(rows=rows, d=d),
                partial(_activation_inputs, names=("gate", "up"), rows=rows, d=d), ops.swiglu,
                moved=(5 if backward else 3) * 2 * rows * d, unit="TB/s", wanted=("gate", "up") if backward else ())


def _norm_inputs(draw: Draw, *, rows: int, d: int) -> Inputs:
    return {"x": draw.normal(rows, d), **{name: draw.normal(d, dtype=torch.float32) for name in ("weight", "bias")}}


def _rope_inputs(draw: Draw, *, shape: tuple[int, ...]) -> Inputs:
    return {"x": draw.normal(*shape), "position": torch.arange(shape[1], device=draw.device)}


def _rope(x: Tensor, position: Tensor, *, rope_dim: int) -> Tensor:
    return ops.rope(x, position, base=10000.0, rope_dim=rope_dim)


def _activation_inputs(draw: Draw, *, names: tuple[str, ...], rows: int, d: int) -> Inputs:
    return {name: draw.normal(rows, d) for name in names}
