"""The head's product: logits are sums in float32 at least, whatever type the weights have."""

from __future__ import annotations

import torch
from torch import Tensor

from hinny import ops


def logits(hidden: Tensor, words: Tensor) -> Tensor:
    """hidden (n d), words (v d), the head's rows → (n v), in float32 or, for a float64 model, in float64.

    A logit of 20 in bfloat16 is known to 0.06 alone: log-probabilities would be as coarse, and among words that are
    nearly as likely the first would win. So shorter numbers are multiplied as they are, and their sums not shortened.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        # under autocast the words are still in float32
        return ops.thin_linear(hidden, words.to(hidden.dtype), wide=True)
