"""Dividing a long walk among the programs that a GPU runs at once."""

from __future__ import annotations

from functools import cache

import torch
import triton


def whole_waves(t: int, rows: int, columns: int, slots: int, unroll: int) -> int:
    """At most about `rows` tokens a program, so that `columns` programs a part, `slots` at a time, end together.

    A last round of a few programs, each walking its hundreds of tokens, would leave most of the memory's speed unused.
    Not under half of `rows`; `rows` itself where the slots are not known (0).
    """
    if not slots:
        return rows
    rounds = triton.cdiv(columns * triton.cdiv(t, rows), slots)
    parts = max(rounds * slots // columns, 1)
    fitting = triton.cdiv(triton.cdiv(t, parts), unroll) * unroll
    return min(max(fitting, rows // 2), rows)


@cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 0 for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
