"""The loss on held-out text during training: the same first windows each time."""

from __future__ import annotations

import torch

from hinny.config import Recipe
from hinny.data.mix import heldout_batches
from hinny.train.step import Stepper

WINDOWS = 32
"""Windows of seq_len tokens that are scored: enough to see the trend; `hinny eval` scores the whole held-out set."""


class HeldOut:
    """Scores the first WINDOWS windows of the recipe's held-out documents, or all if there are fewer."""

    def __init__(self, recipe: Recipe) -> None:
        self.batches = list(heldout_batches(recipe.data, seq_len=recipe.train.seq_len, windows=WINDOWS,
                                            batch_size=recipe.train.micro_batch_size,
                                            vocab_size=recipe.model.vocab_size))

    @torch.no_grad()
    def __call__(self, stepper: Stepper) -> float:
        """Mean loss in nats a counted token, with the precision of training."""
        total = sum(stepper.loss_sum(batch, slice(None)).item() for batch in self.batches)
        return total / sum(int(batch.mask.sum()) for batch in self.batches)
