"""Rows of a pool that a batch uses: slots (b,) int64, None for the first b rows in order, negative for padding."""

from __future__ import annotations

import torch
from torch import Tensor


def check_slots(op: str, slots: Tensor | None, b: int, pool: Tensor) -> None:
    """Raises ValueError unless `slots` are b int64 in a row, or None and the pool has b rows."""
    if slots is None:
        if len(pool) < b:
            raise ValueError(f"{op}: the pool has {len(pool)} rows for a batch of {b}; without slots it must have {b}.")
    elif slots.dtype != torch.int64 or slots.shape != (b,):
        raise ValueError(f"{op}: slots are {slots.dtype} {tuple(slots.shape)}; they must be torch.int64 {(b,)}.")
    elif not slots.is_contiguous():
        raise ValueError(f"{op}: slots are a strided view; pass slots.contiguous().")


def picked(pool: Tensor, slots: Tensor | None, b: int) -> tuple[Tensor, Tensor]:
    """The rows (b,) of `pool` to read, 0 for padding, and which of them live (b,) bool."""
    if slots is None:
        rows = torch.arange(b, device=pool.device)
        return rows, torch.ones_like(rows, dtype=torch.bool)
    return slots.clamp(min=0), slots >= 0


def put_back(pool: Tensor, rows: Tensor, live: Tensor, values: Tensor) -> None:
    """Writes values (b ...) into `pool` at `rows`, in place, where live; live rows differ from each other."""
    # padding repeats what the first live row writes (or leaves row 0 as it is): nothing waits for the device, and
    # the order of the writes does not matter
    values = torch.where(live.view(-1, *[1] * (values.dim() - 1)), values, pool.index_select(0, rows))
    source = torch.where(live, torch.arange(len(rows), device=rows.device), live.int().argmax())
    pool.index_copy_(0, rows[source], values[source])
