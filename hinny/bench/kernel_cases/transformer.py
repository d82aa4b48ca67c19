"""The small ops of the 840M Transformer's layers, and attention of packed rows. mamba_ssm has none of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text

EPS = 1e-5


def cases() -> list[Case]:
    """Four sequences of 4096 tokens; packed documents of the 30M models' training."""
    packed = [attention_case(b=32, t=1024, h=8, g=g, p=64, document=document, backward=backward)
              for g, document in ((8, 256), (8, 1024), (2, 256)) for backward in (False, True)]
    return packed + [build(backward=backward, **sizes) for build, sizes in (
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


def attention_case(*, b: int, t: int, h: int, g: int, p: int, document: int, backward: bool) -> Case:
    """y, or from its gradient those of q, k and v; documents have `document` tokens, a row's last one may have less."""
    # a score is a product and its weight is one more; the backward makes both again, and three gradients
    pairs = b * h * (t // document * triangle(document) + triangle(t % document))
    rows = 2 * b * t * p
    # q, k and v in, y out; q, k, v, y and dy in, three gradients out
    moved = rows * (4 * h + 4 * g if backward else 2 * h + 2 * g)
    return Case("packed_attention.backward" if backward else "packed_attention.forward",
                shape_text(b=b, t=t, h=h, g=g, p=p, document=document),
                partial(_attention_inputs, b=b, t=t, h=h, g=g, p=p, document=document), ops.attention, moved=moved,
                flops=2 * p * pairs * (5 if backward else 2), wanted=("q", "k", "v") if backward else (), roundings=2)


def triangle(t: int) -> int:
    """How many pairs of a query and a key that it sees t tokens have."""
    return t * (t + 1) // 2


def _attention_inputs(draw: Draw, *, b: int, t: int, h: int, g: int, p: int, document: int) -> Inputs:
    segments = (torch.arange(t, device=draw.device) // document).expand(b, t).contiguous()
    return {"q": draw.normal(b, t, h, p), "k": draw.normal(b, t, g, p), "v": draw.normal(b, t, g, p),
            "segments": segments}


def _norm_inputs(draw: Draw, *, rows: int, d: int) -> Inputs:
    return {"x": draw.normal(rows, d), **{name: draw.normal(d, dtype=torch.float32) for name in ("weight", "bias")}}


def _rope_inputs(draw: Draw, *, shape: tuple[int, ...]) -> Inputs:
    return {"x": draw.normal(*shape), "position": torch.arange(shape[1], device=draw.device)}


def _rope(x: Tensor, position: Tensor, *, rope_dim: int) -> Tensor:
    return ops.rope(x, position, base=10000.0, rope_dim=rope_dim)


def _activation_inputs(draw: Draw, *, names: tuple[str, ...], rows: int, d: int) -> Inputs:
    return {name: draw.normal(rows, d) for name in names}
