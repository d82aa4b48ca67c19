"""The gated RMS norm in groups, and the plain one in front of a layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text
from hinny.bench.kernel_peers import MambaSSM

EPS = 1e-5


def cases() -> list[Case]:
    """The 8B layer's norms over 16384 tokens."""
    gated = [gated_case(rows=16384, d=8192, group_size=1024, backward=backward) for backward in (False, True)]
    return [*gated, *(plain_case(rows=16384, d=4096, backward=backward) for backward in (False, True))]


def gated_case(*, rows: int, d: int, group_size: int, backward: bool) -> Case:
    """y, or from its gradient those of x, z and weight."""
    # x and z in, y out; x, z and dy in, dx and dz out
    return Case("gated_norm.backward" if backward else "gated_norm.forward",
                shape_text(rows=rows, d=d, group_size=group_size), partial(_inputs, rows=rows, d=d, gated=True),
                partial(_gated, group_size=group_size), partial(_peer_gated, group_size=group_size),
                moved=(5 if backward else 3) * 2 * rows * d, unit="TB/s",
                wanted=("x", "z", "weight") if backward else ())


def plain_case(*, rows: int, d: int, backward: bool) -> Case:
    """y, or from its gradient those of x and weight."""
    return Case("norm.backward" if backward else "norm.forward", shape_text(rows=rows, d=d),
                partial(_inputs, rows=rows, d=d, gated=False), _plain, moved=(3 if backward else 2) * 2 * rows * d,
                unit="TB/s", wanted=("x", "weight") if backward else ())


def _inputs(draw: Draw, *, rows: int, d: int, gated: bool) -> Inputs:
    gate = {"z": draw.normal(rows, d)} if gated else {}
    return {"x": draw.normal(rows, d), **gate, "weight": draw.normal(d, dtype=torch.float32)}


def _gated(x: Tensor, z: Tensor, weight: Tensor, *, group_size: int) -> Tensor:
    return ops.gated_rms_norm(x, z, weight, EPS, group_size)


def _peer_gated(peer: MambaSSM, x: Tensor, z: Tensor, weight: Tensor, *, group_size: int) -> Tensor:
    return peer.gated_rms_norm(x, z, weight, EPS, group_size)


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, EPS)
