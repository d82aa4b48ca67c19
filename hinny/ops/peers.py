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


def sum_flags(ranks: int) -> int:
    """Flags (int32) of each rank for `sum_norm`, which begin as zeros."""
    return PLACES * ranks * MOST_ROWS


def gather_flags(ranks: int) -> int:
    """Flags (int32) of each rank for `gather`: the first half begins as zeros, the second as ones."""
    return 2 * ranks * PROGRAMS


def sum_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float, parts: Tensor, flags: Tensor,
             place: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """x (... d) + the sum of the ranks' delta (... d), rounded as x is, and its norm as `hinny.ops.add_norm` gives it.

    parts, flags (ranks,) int64: addresses, as this rank sees them, of each rank's PLACES x MOST_ROWS x d numbers and of
    its flags. place < PLACES: another one than that of the sums before and behind. At most MOST_ROWS rows.
    """
    from hinny.ops.kernels import peers  # here alone: Triton is imported where it runs

    return peers.sum_norm(x, delta, weight, bias, eps, parts, flags, place, rank, ranks)


def gather(x: Tensor, parts: Tensor, flags: Tensor, rank: int, ranks: int) -> Tensor:
    """x (m c), at most MOST_ROWS rows → (m ranks*c), the columns of all ranks in their order.

    parts, flags (ranks,) int64: addresses of each rank's MOST_ROWS x c numbers and of its flags.
    """
    from hinny.ops.kernels import peers

    return peers.gather(x, parts, flags, rank, ranks)
