"""One optimiser step: the batch in micro-batches, the exact mean loss, the gradient's norm, the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from hinny import ops
from hinny.config import Recipe
from hinny.data.mix import Batch
from hinny.errors import TrainingError
from hinny.model import Model
from hinny.train.optim import learning_rate

Loss = TypeVar("Loss")


@dataclass(frozen=True)
class Step:
    """What one step did. `loss`: nats a counted target, before the update. `grad_norm`: before clipping.

    `z_loss` is what optim.z_loss adds to the loss that is minimised; None without it. `loss` is without.
    """

    loss: float
    lr: float
    grad_norm: float
    z_loss: float | None = None


class Stepper:
    """Applies steps of `recipe` to `model` and `optimizer`, both in place."""

    def __init__(self, recipe: Recipe, model: Model, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.recipe = recipe
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, index: int, batch: Batch) -> Step:
        """Step number `index`, counted from 0. Raises TrainingError, and changes no weight, if it is not finite."""
        config = self.recipe.optim
        size = self.recipe.train.batch_size
        lr = learning_rate(config, (index + 1) * size, self.recipe.train.steps * size)
        self.optimizer.zero_grad(set_to_none=True)
        loss, z_loss = self.accumulate(batch)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        done = Step(loss=loss.item(), lr=lr, grad_norm=norm.item(),
                    z_loss=None if config.z_loss is None else z_loss.item())
        if not (math.isfinite(done.loss) and math.isfinite(done.grad_norm)):
            raise TrainingError(f"step {index + 1}: the loss is {done.loss} and the gradient's norm {done.grad_norm}. "
                                f"The step was not applied. Its batch: {batch.describe()}.")
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return done

    def accumulate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradient of the batch's mean loss to the parameters; returns the cross-entropy and the z-loss in it.

        Each micro-batch counts by its number of targets, not as one of n means: so any cut of the batch gives the
        same gradient, also where the masks differ.
        """
        counted = int(batch.mask.sum())
        if counted == 0:
            raise TrainingError(f"no target of this batch counts in the loss: {batch.describe()}.")
        entropy, z_loss = (torch.zeros((), device=self.device) for _ in range(2))
        for start in range(0, len(batch.tokens), self.recipe.train.micro_batch_size):
            rows = slice(start, start + self.recipe.train.micro_batch_size)
            if self.recipe.optim.z_loss is None:
                loss = self.loss_sum(batch, rows) / counted
                entropy += loss.detach()
            else:
                total, z = self._losses(batch, rows, partial(ops.linear_cross_entropy_z,
                                                             z_loss=self.recipe.optim.z_loss))
                loss = total / counted
                entropy += (total.detach() - z) / counted
                z_loss += z / counted
            loss.backward()
        return entropy, z_loss

    def loss_sum(self, batch: Batch, rows: slice) -> torch.Tensor:
        """Cross-entropy summed over the counted targets of some rows of `batch`, in nats, without any z-loss."""
        return self._losses(batch, rows, ops.linear_cross_entropy)

    def _losses(self, batch: Batch, rows: slice, op: Callable[..., Loss]) -> Loss:
        """What `op` makes of the last hidden states and the targets of some rows of `batch`, summed."""
        segments = None if batch.segments is None else self._tensor(batch.segments[rows])
        precision = torch.autocast(self.device.type, dtype=torch.bfloat16,
                                   enabled=self.recipe.train.precision == "bf16")
        with precision:
            hidden = self.model.hidden(self._tensor(batch.tokens[rows]), segments=segments)
            return op(hidden, self.model.output_weight, self._tensor(batch.targets[rows]),
                      self._tensor(batch.mask[rows]), reduction="sum")

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
