"""Launches of the Gluon kernels for Hopper GPUs, behind `ssd.py`: bfloat16, heads of 64s, state 64 or 128."""

from __future__ import annotations

import logging
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hinny.ops.backend import interpreting
from hinny.ops.kernels.hopper_boundaries import hopper_boundaries
from hinny.ops.kernels.hopper_forward import hopper_forward
from hinny.ops.kernels.hopper_keys import hopper_keys
from hinny.ops.kernels.hopper_within import hopper_within
from hinny.ops.kernels.launches import architecture
from hinny.ops.kernels.ssd_call import Call

COLUMNS = 64
"""Columns of a head that one program takes."""


WRITTEN_FOR = "3.6."
"""Triton's version: Gluon is experimental, and 3.9 no longer compiles these kernels."""


def takes(x: Tensor, B: Tensor) -> bool:
    """Whether the Hopper kernels compute this; `ssd_forward.py` and `ssd_backward.py` compute all of it."""
    return (x.dtype is torch.bfloat16 and x.shape[3] % COLUMNS == 0 and B.shape[3] in (64, 128)
            and x.is_cuda and not interpreting() and _runs_on(x.device))


@cache
def _runs_on(device: torch.device) -> bool:
    if architecture(device) != "sm90":
        return False
    if triton.__version__.startswith(WRITTEN_FOR):
        return True
    logging.getLogger(__name__).info("the fastest SSD kernels are for Triton %sx, and this is %s: SSD runs on those "
                                     "for any GPU", WRITTEN_FOR, triton.__version__)
    return False


def forward(
    call: Call, x: Tensor, B: Tensor, C: Tensor, decays: Tensor, D: Tensor | None, initial: Tensor | None,
    local: Tensor | None, local_sums: Tensor | None, y: Tensor, final: Tensor, parts: int, part_chunks: int,
    use: dict[str, int],
) -> None:
    """Fills y (b t h p) and final (b h p n); tensors contiguous, decays as `Call.prepare` makes them."""
    blocks = call.p // COLUMNS
    hopper_forward[(call.h * blocks, parts, call.b)](
        rows(x, call.Q, COLUMNS), rows(B, call.Q, call.n), rows(C, call.Q, call.n), rows(y, call.Q, COLUMNS),
        numbers(decays, call.Q), D, None if initial is None else initial.float(), local, local_sums, decays[1], final,
        decays[1].numel(), call.chunks, parts, part_chunks, call.h, call.h // call.g, BLOCKS=blocks, N=call.n, **use)


def boundaries(
    call: Call, x: Tensor, B: Tensor, dy: Tensor, C: Tensor, decays: Tensor, initial: Tensor | None,
    dfinal: Tensor | None, dinitial: Tensor, states: Tensor,
) -> None:
    """Fills states (direction b c h p n): those entering the chunks and gradients of those leaving, and dinitial."""
    use, parts, part_chunks = call.walk("hopper_boundaries", 2 * call.b * call.h * (call.p // COLUMNS))
    local, local_sums = None, None
    if parts > 1:
        local, local_sums = walk_parts(call, x, B, dy, C, decays, parts, part_chunks)
    p, n = COLUMNS, call.n
    hopper_boundaries[(call.h * (call.p // COLUMNS), parts, 2 * call.b)](
        *(rows(v, call.Q, columns) for v, columns in ((x, p), (B, n), (dy, p), (C, n))), blocks(states, p, n), decays,
        None if initial is None else initial.float(), dfinal, local, local_sums, dinitial, decays[0].numel(),
        call.chunks, parts, part_chunks, call.h, call.h // call.g, call.b, BLOCKS=call.p // COLUMNS, LOCAL=False, **use)


def walk_parts(
    call: Call, x: Tensor, B: Tensor, dy: Tensor | None, C: Tensor | None, decays: Tensor, parts: int, part_chunks: int
) -> tuple[Tensor, Tensor]:
    """As `ssd.walk_parts`: what each part that others follow adds by itself, and its sum of log2 decays."""
    directions = 1 if dy is None else 2
    use, _, _ = call.walk("hopper_boundaries", 1)
    local = x.new_empty(directions, call.b, call.h, parts, call.p, call.n, dtype=torch.float32)
    local_sums = x.new_empty(directions, call.b, call.h, parts, dtype=torch.float32)
    x_tiles, B_tiles = rows(x, call.Q, COLUMNS), rows(B, call.Q, call.n)
    dy_tiles = x_tiles if dy is None else rows(dy, call.Q, COLUMNS)
    C_tiles = B_tiles if C is None else rows(C, call.Q, call.n)
    hopper_boundaries[(call.h * (call.p // COLUMNS), parts - 1, directions * call.b)](
        x_tiles, B_tiles, dy_tiles, C_tiles, None, decays, None, None, local, local_sums, None, decays[0].numel(),
        call.chunks, parts, part_chunks, call.h, call.h // call.g, call.b, BLOCKS=call.p // COLUMNS, LOCAL=True, **use)
    return local, local_sums


def within(
    call: Call, x: Tensor, B: Tensor, dy: Tensor, C: Tensor, D: Tensor | None, decays: Tensor, edges: Tensor,
    dedges: Tensor, vectors: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dB, dC and passing (2 b c h), to be added; fills vectors as `ssd_finish` takes them. Heads of 64 columns."""
    use = call.launch("hopper_within")
    split = call.split(use.pop("PROGRAMS"))
    size, half, n = decays[0].numel(), call.Q // 2, call.n
    direct, enclosed, crossed, entering, leaving, skipped = vectors.unbind()
    pairs = x.new_empty(call.b, call.chunks, call.g, split, call.Q, call.Q)
    dx = torch.empty_like(x)
    grid = (2 * call.chunks, call.g * split, call.b)
    x_tiles, dy_tiles = (rows(v, half, COLUMNS) for v in (x, dy))
    B_tiles, C_tiles = (rows(v, half, n) for v in (B, C))
    edge_tiles, dedge_tiles = (blocks(v, COLUMNS, n) for v in (edges, dedges))
    hopper_within[grid](
        x_tiles, dy_tiles, rows(dy, call.Q, COLUMNS), B_tiles, C_tiles, dedge_tiles, rows(dx, half, COLUMNS),
        numbers(decays, call.Q), D, direct, leaving, skipped, enclosed, crossed, pairs, size, call.chunks, call.h,
        call.h // (call.g * split), split, call.g * split, N=n, **use)
    # two tensors, not two halves of one: results of an operator may not share memory
    dB, dC = (B.new_empty(split * call.b, *B.shape[1:], dtype=B.dtype if split == 1 else torch.float32) for _ in "BC")
    passing = decays.new_empty(2, call.b, call.chunks, call.h)
    hopper_keys[grid](
        x_tiles, dy_tiles, B_tiles, C_tiles, edge_tiles, dedge_tiles, squares(pairs, half),
        *((rows(dB, half, n), rows(dC, half, n)) if split == 1 else (dB, dC)), decays, entering, passing, size,
        call.chunks, call.h, call.h // (call.g * split), call.t, SPLIT=split, **call.launch("hopper_keys"))
    if split > 1:
        dB, dC = (v.view(split, *B.shape).sum(0).to(B.dtype) for v in (dB, dC))
    return dx, dB, dC, passing


def rows(v: Tensor, tokens: int, columns: int) -> TensorDescriptor:
    """Tiles of `tokens` by `columns` of v (b t heads*k), from v (b t heads k); zero outside."""
    b, t, heads, k = v.shape
    return _tiles(v, (b, t, heads * k), (1, tokens, columns))


def blocks(v: Tensor, p: int, n: int) -> TensorDescriptor:
    """Tiles of p rows of one state, from v (... p n)."""
    return _tiles(v, (v.numel() // (p * n), p, n), (1, p, n))


def squares(v: Tensor, half: int) -> TensorDescriptor:
    """Square tiles of `half`, of the squares in v (... q q)."""
    q = v.shape[-1]
    return _tiles(v, (v.numel() // (q * q), q, q), (1, half, half))


def numbers(v: Tensor, count: int) -> TensorDescriptor:
    """`count` numbers in a row of v, wherever they begin."""
    return TensorDescriptor(v.view(-1), [v.numel()], [1], [count], gl.NVMMASharedLayout(0, 32, 1))


def _tiles(v: Tensor, shape: tuple[int, int, int], tile: tuple[int, int, int]) -> TensorDescriptor:
    return TensorDescriptor(v, list(shape), [shape[1] * shape[2], shape[2], 1], list(tile), _layout(tile))


@cache
def _layout(tile: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory; made once, since it takes 12 us."""
    return gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
