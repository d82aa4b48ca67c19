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
from hinny.ops.kernels.hopper_gradients import hopper_gradients
from hinny.ops.kernels.launches import architecture
from hinny.ops.kernels.ssd_call import Call
from hinny.ops.kernels.waves import processors

COLUMNS = 64
"""Columns of a head that one program takes."""


WRITTEN_FOR = "3.6."
"""Triton's version: Gluon is experimental, and 3.9 no longer compiles these kernels."""


def takes(x: Tensor, B: Tensor) -> bool:
    """Whether the Hopper kernels compute this; `ssd_forward.py` and `ssd_backward.py` compute all of it."""
    return (x.dtype is torch.bfloat16 and x.shape[3] % COLUMNS == 0 and B.shape[3] in (64, 128)
            and x.is_cuda and runs_on(x.device))


def runs_on(device: torch.device) -> bool:
    """Whether Gluon kernels for Hopper GPUs run on a device."""
    if interpreting() or architecture(device) != "sm90":
        return False
    if triton.__version__.startswith(WRITTEN_FOR):
        return True
    _say_version()
    return False


# what torch.compiler.assume_constant_result sets, as in `hinny.ops.backend`
runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _say_version() -> None:
    logging.getLogger(__name__).info("the fastest kernels of SSD and the selective scan are for Triton %sx, and this "
                                     "is %s: both run on those for any GPU", WRITTEN_FOR, triton.__version__)


def forward(
    call: Call, x: Tensor, B: Tensor, C: Tensor, decays: Tensor, D: Tensor | None, initial: Tensor | None,
    local: Tensor | None, local_sums: Tensor | None, flags: Tensor | None, y: Tensor, final: Tensor, parts: int,
    length: int, use: dict[str, int],
) -> None:
    """Fills y (b t h p) and final (b h p n); tensors contiguous, decays and flags as `Call.prepare` makes them.

    `length`: chunks of a part or, with flags, of a program's share of all walks (`Call.share`).
    """
    blocks = call.p // COLUMNS
    shares = triton.cdiv(call.b * call.h * blocks * call.chunks, length)
    hopper_forward[(call.h * blocks, parts, call.b) if flags is None else (shares, 1, 1)](
        rows(x, call.Q, COLUMNS), rows(B, call.Q, call.n), rows(C, call.Q, call.n), rows(y, call.Q, COLUMNS),
        numbers(decays, call.Q), D, None if initial is None else initial.float(), local, local_sums, decays[1], final,
        None if flags is None else flags.view(torch.int32), decays[1].numel(), call.chunks, parts, length, call.h,
        call.h // call.g, BLOCKS=blocks, N=call.n, **use)


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


def gradients(
    call: Call, x: Tensor, B: Tensor, dy: Tensor, C: Tensor, D: Tensor | None, decays: Tensor, edges: Tensor,
    dedges: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """dx, dB, dC, passing (b 2*c h), and the vectors that `ssd_finish` takes, of chunks of half the length.

    Heads of 64 columns.
    """
    use = call.launch("hopper_gradients")
    split = call.split(use.pop("PROGRAMS"))
    half, n, parts = call.Q // 2, call.n, call.g * split
    tiles = 2 * call.b * call.chunks * parts
    dx = torch.empty_like(x)
    # two tensors, not two halves of one: results of an operator may not share memory
    dB, dC = (B.new_empty(split * call.b, *B.shape[1:], dtype=B.dtype if split == 1 else torch.float32) for _ in "BC")
    passing = decays.new_empty(call.b, 2 * call.chunks, call.h)
    vectors = decays.new_empty(5, *decays.shape[1:])
    hopper_gradients[(min(tiles, processors(x.device)),)](
        *(rows(v, half, COLUMNS) for v in (x, dy)), *(rows(v, half, n) for v in (B, C)),
        *(blocks(v, COLUMNS, n) for v in (edges, dedges)), rows(dx, half, COLUMNS), numbers(decays, call.Q), D, dB, dC,
        vectors, passing, decays[0].numel(), call.chunks, call.h, call.h // parts, split, parts, tiles, call.t, **use)
    if split > 1:
        dB, dC = (v.view(split, *B.shape).sum(0).to(B.dtype) for v in (dB, dC))
    direct, enclosed, entering, leaving, skipped = vectors.unbind()
    return dx, dB, dC, passing, (direct, enclosed, None, entering, leaving, skipped)


def rows(v: Tensor, tokens: int, columns: int) -> TensorDescriptor:
    """Tiles of `tokens` by `columns` of v (b t heads*k), from v (b t heads k); zero outside."""
    b, t, heads, k = v.shape
    return _tiles(v, (b, t, heads * k), (1, tokens, columns))


def blocks(v: Tensor, p: int, n: int) -> TensorDescriptor:
    """Tiles of p rows of one state, from v (... p n)."""
    return _tiles(v, (v.numel() // (p * n), p, n), (1, p, n))


def numbers(v: Tensor, count: int) -> TensorDescriptor:
    """`count` numbers in a row of v, wherever they begin."""
    return TensorDescriptor(v.view(-1), [v.numel()], [1], [count], gl.NVMMASharedLayout(0, 32, 1))


def _tiles(v: Tensor, shape: tuple[int, int, int], tile: tuple[int, int, int]) -> TensorDescriptor:
    return TensorDescriptor(v, list(shape), [shape[1] * shape[2], shape[2], 1], list(tile), _layout(tile))


@cache
def _layout(tile: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory; made once, since it takes 12 us."""
    return gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
