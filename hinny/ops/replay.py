"""Replayed decoding: SSD states that are written once in L tokens, and the inputs in between kept beside them.

    y_t = C_t . (exp(A s) checkpoint  +  sum over buffered j of exp(A s_j) dt_j x_j B_j^T)

s is the sum of the buffered steps, token t's among them, s_j that of the steps after j. Reading the state is half of a
decoding step's traffic and writing it the other half; the buffers of 16 tokens are a sixteenth of a float32 state. The
idea is that of ReplaySSM (dao-lab.ai, 2026). `ssd_update` takes a Replay; this file makes one, empties it, and defines
what it stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hinny.ops.inputs import check_length, check_shapes, wide
from hinny.ops.rounding import as_seed, round_stochastically
from hinny.ops.slots import check_slots, picked, put_back


class Replay(NamedTuple):
    """Tokens that the states of a pool of s slots have not seen yet; `ssd_update` changes it in place."""

    x: Tensor
    """(s h L p)."""
    dt: Tensor
    """(s h L), step sizes after bias and softplus, float32 (float64 beside float64 inputs)."""
    B: Tensor
    """(s g L n)."""
    cursor: Tensor
    """(s 2) int32: how many tokens were buffered before the last call's were added, and how many are now. Both zero
    begin another sequence; lowering the second one takes tokens of the last call back, up to all of them."""

    @property
    def length(self) -> int:
        """L: a call that has no room for its tokens beside those held runs these into the state first."""
        return self.x.shape[2]


def make_replay(state: Tensor, groups: int, dtype: torch.dtype, length: int = 16) -> Replay:
    """Empty buffers for the slots of a pool of states (s h p n), for x and B of `dtype` and `groups` groups."""
    check_length("make_replay", "length", length)
    s, h, p, n = state.shape
    return Replay(
        x=state.new_zeros(s, h, length, p, dtype=dtype), dt=state.new_zeros(s, h, length, dtype=wide(dtype)),
        B=state.new_zeros(s, groups, length, n, dtype=dtype), cursor=state.new_zeros(s, 2, dtype=torch.int32))


def flush_replay(state: Tensor, A: Tensor, replay: Replay, *, slots: Tensor | None = None,
                 seed: int | Tensor | None = None) -> None:
    """Brings the states of `slots` up to date and empties their buffers, in place in `state` and `replay`.

    For a state that is to be saved, copied or read by anything but `ssd_update` with the same `replay`. state
    (s h p n); A (h,); slots (b,) int64, None for all; seed as for `ssd_update`. Plain torch on every backend: it is
    called once a sequence.
    """
    check_replay("flush_replay", state, replay, replay.B.shape[1], replay.x.dtype, replay.B.dtype, 1)
    b = len(state) if slots is None else len(slots)
    check_slots("flush_replay", slots, b, state)
    rows, live = picked(state, slots, b)
    current = folded(state.index_select(0, rows), A, gathered(replay, rows))
    put_back(state, rows, live, as_stored(current, state.dtype, as_seed("flush_replay", seed, state), rows))
    put_back(replay.cursor, rows, live, torch.zeros_like(replay.cursor.index_select(0, rows)))


def check_replay(op: str, state: Tensor, replay: Replay, groups: int, x: torch.dtype, B: torch.dtype, t: int) -> None:
    """Raises ValueError for buffers that do not fit the states, or the inputs' dtypes and t tokens."""
    (s, h, p, n), length = state.shape, replay.length
    check_shapes(op, **{"replay.x": (replay.x, (s, h, length, p)), "replay.dt": (replay.dt, (s, h, length)),
                        "replay.B": (replay.B, (s, groups, length, n)), "replay.cursor": (replay.cursor, (s, 2))})
    kept = (replay.x.dtype, replay.B.dtype, replay.dt.dtype, replay.cursor.dtype)
    if kept != (x, B, wide(x), torch.int32):
        raise ValueError(f"{op}: replay keeps x, B, dt and cursor as {kept}; beside these inputs they must be "
                         f"{(x, B, wide(x), torch.int32)}.")
    if t > length:
        raise ValueError(f"{op}: {t} tokens at once; a replay of length {length} takes at most {length}.")
    if not all(buffer.is_contiguous() for buffer in replay):
        raise ValueError(f"{op}: the buffers of replay must be contiguous.")


def gathered(replay: Replay, rows: Tensor) -> Replay:
    """Copies of the buffers of some slots."""
    return Replay(*(buffer.index_select(0, rows) for buffer in replay))


def folded(state: Tensor, A: Tensor, held: Replay) -> Tensor:
    """The states (b h p n) after their buffered tokens, in float32 (float64 if the steps are)."""
    dtype, (h, g) = held.dt.dtype, (state.shape[1], held.B.shape[1])
    index = torch.arange(held.length, device=state.device)
    buffered = (index < held.cursor[:, 1:])[:, None]  # (b 1 L)
    steps = held.dt.masked_fill(~buffered, 0)
    decays = steps * A.to(dtype)[:, None]
    # each sum of later steps by itself: a difference of two sums loses the small steps beside a large one
    after = decays[:, :, None].masked_fill(index <= index[:, None], 0).sum(-1)
    x = held.x.to(dtype).masked_fill(~buffered[..., None], 0)
    B = held.B.to(dtype).repeat_interleave(h // g, 1).masked_fill(~buffered[..., None], 0)
    added = (x * (steps * after.exp())[..., None]).transpose(2, 3) @ B
    return state.to(dtype) * decays.sum(-1).exp()[..., None, None] + added


def with_room(stored: Tensor, A: Tensor, held: Replay, t: int, seed: Tensor | None,
              rows: Tensor) -> tuple[Tensor, Replay]:
    """The stored states (b h p n) and buffers of the slots `rows`: folded and empty where t tokens have no room."""
    full = held.cursor[:, 1] + t > held.length
    current = as_stored(folded(stored, A, held), stored.dtype, seed, rows)
    count = held.cursor[:, 1].masked_fill(full, 0)
    return torch.where(full[:, None, None, None], current, stored), held._replace(cursor=torch.stack([count, count], 1))


def appended(held: Replay, x: Tensor, dt: Tensor, B: Tensor) -> Replay:
    """The buffers with t tokens behind the ones held: x (b t h p), dt (b t h), B (b t g n)."""
    index, t = torch.arange(held.length, device=x.device), x.shape[1]
    for i in range(t):
        here = (index == held.cursor[:, 1:] + i)[:, None]  # (b 1 L)
        held = held._replace(x=torch.where(here[..., None], x[:, i, :, None], held.x),
                             dt=torch.where(here, dt[:, i, :, None], held.dt),
                             B=torch.where(here[..., None], B[:, i, :, None], held.B))
    return held._replace(cursor=held.cursor + torch.tensor([0, t], dtype=torch.int32, device=x.device))


def as_stored(state: Tensor, dtype: torch.dtype, seed: Tensor | None, rows: Tensor) -> Tensor:
    """States (b h p n) of the slots `rows` as the pool keeps them: rounded to nearest, or at random with a seed."""
    return state.to(dtype) if seed is None else round_stochastically(state, dtype, seed, rows)
