"""What the ranks of a decoding step exchange through memory that they share, in one launch: no gradients, GPUs alone.

    sum_norm   the sum of what they made, the residual and the norm behind it
    gather     the columns of all of them

The memory is made by who calls (`hinny.infer.sums`), as are the promises that keep it right: all ranks call the same in
the same order, on one stream, and give neighbouring sums other places.
"""

from __future__ import annotations

from torch import Tensor

MOST_ROWS = 64
"""Rows that one launch takes."""
PLACES = 3
"""For an odd number of sums in a step that is repeated, of which the last and the first are neighbours too."""
PROGRAMS = 128
"""That gather: each has a processor of its own on every GPU that is fast enough to share a model."""


def sum_words(d: int, ranks: int) -> int:
    """Words (int64) of each rank for `sum_norm` of rows of d numbers; they begin as zeros."""
    return PLACES * ranks * MOST_ROWS * (d // 2)


def gather_flags(ranks: int) -> int:
    """Flags (int32) of each rank for `gather`; they begin as zeros."""
    return 2 * ranks * PROGRAMS


def sum_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, parts: Tensor, counts: Tensor,
             place: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """x (... d) + the sum of the ranks' delta (... d), rounded as x is, and its norm as `hinny.ops.add_norm` gives it.

    bfloat16, d even, at most MOST_ROWS rows. parts (ranks,) int64: addresses, as this rank sees them, of each rank's
    words; counts (MOST_ROWS,) int32: sums of each row so far, zeros at the beginning, which it counts on. place <
    PLACES: another one than that of the sums before and behind.
    """
    from hinny.ops.kernels import peers  # here alone: Triton is imported where it runs

    return peers.sum_norm(x, delta, weight, bias, eps, parts, counts, place, rank, ranks)


def gather(x: Tensor, parts: Tensor, flags: Tensor, rank: int, ranks: int) -> None:
    """x (m c), at most MOST_ROWS rows, goes into columns `rank` c … of every rank's result (m ranks*c), which holds
    those of all ranks then.

    parts, flags (ranks,) int64: addresses of each rank's result and of its flags.
    """
    from hinny.ops.kernels import peers

    peers.gather(x, parts, flags, rank, ranks)
