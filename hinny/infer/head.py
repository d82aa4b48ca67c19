"""The head's product: logits are sums in float32 at least, whatever type the weights have."""

from __future__ import annotations

import torch
from torch import Tensor

from hinny import ops

LOT = 1024
"""Words among which a likeliest one is found at a time: a GPU has few rows, and many parts of one to look through."""


def logits(hidden: Tensor, words: Tensor) -> Tensor:
    """hidden (n d), words (v d), the head's rows → (n v), in float32 or, for a float64 model, in float64.

    A logit of 20 in bfloat16 is known to 0.06 alone: log-probabilities would be as coarse, and among words that are
    nearly as likely the first would win. So shorter numbers are multiplied as they are, and their sums not shortened.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        # under autocast the words are still in float32
        return ops.thin_linear(hidden, words.to(hidden.dtype), wide=True)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n v) → the largest of each row (n,), and which it is (n,): of equal ones the first."""
    n, v = logits.shape
    if not logits.is_cuda or v % LOT:
        best, tokens = logits.max(-1)
        return best, tokens
    lots, places = logits.view(n, -1, LOT).max(-1)
    best, lot = lots.max(-1)
    return best, lot * LOT + places.gather(1, lot[:, None]).squeeze(1)
