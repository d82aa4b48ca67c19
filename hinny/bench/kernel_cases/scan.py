"""The selective scan of Mamba-1. mamba_ssm has it in CUDA alone, so there is no peer.

Bytes bound it only for small states: with n states a channel it also needs n exponentials a token and channel, which
the bound leaves out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text


def cases() -> list[Case]:
    """A Mamba of 2.8B (16 states) and the paper's 8B (128 states)."""
    return [scan_case(b=b, t=t, d=d, n=n, backward=backward)
            for b, t, d, n in ((8, 2048, 5120, 16), (2, 2048, 8192, 128)) for backward in (False, True)]


def scan_case(*, b: int, t: int, d: int, n: int, backward: bool) -> Case:
    """Gated y: forward, or from its gradient those of everything that a layer trains."""
    sequence, keys = 2 * b * t * d, 2 * b * t * n
    # x, dt, z, B, C in, y out; the same and dy in, five gradients out
    moved = 7 * sequence + 4 * keys if backward else 4 * sequence + 2 * keys
    return Case("scan.backward" if backward else "scan.forward", shape_text(b=b, t=t, d=d, n=n),
                partial(_inputs, b=b, t=t, d=d, n=n), _scan, moved=moved,
                wanted=("x", "dt", "A", "B", "C", "D", "z", "dt_bias") if backward else ())


def _inputs(draw: Draw, *, b: int, t: int, d: int, n: int) -> Inputs:
    decays = -torch.arange(1, n + 1, device=draw.device, dtype=torch.float32).expand(d, n).contiguous()
    sequence = {name: draw.normal(b, t, d) for name in ("x", "dt", "z")}
    return {**sequence, "B": draw.normal(b, t, n), "C": draw.normal(b, t, n), **draw.state_space(d), "A": decays}


def _scan(x: Tensor, dt: Tensor, z: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
          dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
