"""Batches with more sequences than one launch has programs along an axis, for ops of (x, dt, A, B, C, options)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BY_SEQUENCE = ("z", "initial_state", "segments")
"""Options with a row for each sequence; others are shared by all."""


def by_batches(
    op: Callable[..., tuple[Tensor, Tensor]], largest: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """op's outputs and final states, at most `largest` sequences a call."""
    results = []
    for i in range(0, len(x), largest):
        part = slice(i, i + largest)
        given = {name: v[part] if name in BY_SEQUENCE and v is not None else v for name, v in options.items()}
        results.append(op(x[part], dt[part], A, B[part], C[part], **given))
    ys, states = zip(*results, strict=True)
    return torch.cat(ys), torch.cat(states)
