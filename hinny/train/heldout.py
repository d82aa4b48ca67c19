"""The loss on held-out text during training: the same first windows each time."""

from __future__ import annotations

import numpy as np
import torch

from hinny.config import Recipe
from hinny.data.mix import Batch, heldout_batches
from hinny.parallel.mesh import Mesh, single
from hinny.train.step import Stepper

WINDOWS = 32
"""Windows of seq_len tokens that are scored: enough to see the trend; `hinny eval` scores the whole held-out set."""


class HeldOut:
    """Scores the first WINDOWS windows of the held-out documents, or all if there are fewer, of each folder; ranks that
    see different sequences share them.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh | None = None) -> None:
        self._weights = recipe.data.folders
        self._mesh = mesh = single() if mesh is None else mesh
        size = recipe.train.micro_batch_size * mesh.size("replicate", "shard")
        self.batches = {folder: list(heldout_batches(recipe.data.only(folder), seq_len=recipe.train.seq_len,
                                                     batch_size=size, windows=WINDOWS,
                                                     vocab_size=recipe.model.vocab_size))
                        for folder in self._weights}

    @torch.no_grad()
    def losses(self, stepper: Stepper) -> dict[str, float]:
        """Folder → mean loss in nats a counted token, with the precision of training."""
        return {folder: sum(stepper.loss_sum(self._mine(batch)).item() for batch in batches)
                / sum(int(batch.mask.sum()) for batch in batches) for folder, batches in self.batches.items()}

    def __call__(self, stepper: Stepper) -> float:
        """The mean of the folders' losses by their weights."""
        return self._mean(self.losses(stepper))

    def record(self, stepper: Stepper) -> dict[str, float]:
        """What metrics.jsonl gets: held_out_loss, and held_out_loss.FOLDER for each folder of a blend."""
        losses = self.losses(stepper)
        apart = {f"held_out_loss.{folder}": loss for folder, loss in losses.items()} if len(losses) > 1 else {}
        return {"held_out_loss": self._mean(losses), **apart}

    def _mine(self, batch: Batch) -> Batch:
        """This rank's rows; all ranks have as many, filled up with rows that do not count."""
        ranks, rank = self._mesh.size("replicate", "shard"), self._mesh.index("replicate", "shard")
        if ranks == 1:
            return batch
        each = -(-len(batch.tokens) // ranks)
        places = np.arange(rank * each, (rank + 1) * each)
        real = places < len(batch.tokens)
        rows = np.where(real, places, 0)
        return Batch(batch.tokens[rows], batch.targets[rows], batch.mask[rows] & real[:, None],
                     None if batch.segments is None else batch.segments[rows], tuple(batch.names[r] for r in rows))

    def _mean(self, losses: dict[str, float]) -> float:
        return sum(losses[folder] * weight for folder, weight in self._weights.items()) / sum(self._weights.values())
