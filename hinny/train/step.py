"""One optimiser step: the batch in micro-batches, the exact mean loss, the gradient's norm, the update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hinny.config import Recipe
from hinny.data.mix import Batch
from hinny.errors import TrainingError
from hinny.objective import Objective
from hinny.parallel.context import own
from hinny.parallel.fsdp import give_up
from hinny.parallel.mesh import Mesh, single
from hinny.parallel.norm import total_norm
from hinny.parallel.pipeline import Pipeline
from hinny.state import Carried
from hinny.train.graphs import Losses, Replayed
from hinny.train.optim import learning_rate
from hinny.train.segments import Inputs, in_segments


@dataclass(frozen=True)
class Step:
    """What one step did. `loss`: nats a counted target, before the update. `grad_norm`: before clipping.

    `z_loss` is what optim.z_loss adds to the loss that is minimised; None without it. `loss` is without.
    """

    loss: float
    lr: float
    grad_norm: float
    z_loss: float | None = None


class Begun:
    """A step that is on its way; `result` waits for it. On a GPU that is what lets the next one be launched meanwhile.
    """

    def __init__(self, index: int, batch: Batch, lr: float, z_loss: bool, numbers: Tensor, spoiled: Tensor) -> None:
        self._index, self._batch, self._lr, self._z_loss, self._spoiled = index, batch, lr, z_loss, spoiled
        self._numbers, self._copied = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> Step:
        """What the step did. Raises TrainingError if it was not finite, or followed one that was not and of which
        nobody had been told: then it changed no weight, and the steps begun from now on do again.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, z_loss, norm, spoiled = self._numbers.tolist()
        if spoiled:
            self._spoiled.zero_()
            why = (f"the loss is {loss} and the gradient's norm {norm}"
                   if not (math.isfinite(loss) and math.isfinite(norm)) else "the step before it was not finite")
            raise TrainingError(f"step {self._index + 1}: {why}. The step was not applied. Its batch: "
                                f"{self._batch.describe()}.")
        return Step(loss=loss, lr=self._lr, grad_norm=norm, z_loss=z_loss if self._z_loss else None)


class Stepper:
    """Applies steps of `recipe` to `objective` and `optimizer`, both in place.

    The optimizer is one of PyTorch's fused ones: a flag on the device, which is set by the first step that is not
    finite, keeps it from changing anything, so nothing waits for the loss.
    With a mesh of several processes each gives the rows of the batch that are its own, and all make the same step.
    """

    def __init__(self, recipe: Recipe, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device,
                 mesh: Mesh | None = None, pipeline: Pipeline | None = None) -> None:
        self.recipe = recipe
        self.objective = objective
        self.optimizer = optimizer
        self.device = device
        self.mesh = single() if mesh is None else mesh
        self.pipeline = pipeline
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        train = recipe.train
        self._renewed = train.cuda_graphs and train.micro_batch_size == train.batch_size and train.segment_len is None
        self._replayed = (Replayed(self._forward_backward, self.parameters if self._renewed else ())
                          if train.cuda_graphs else None)
        self._warm = False
        self._spoiled = torch.zeros((), device=device)

    def step(self, index: int, batch: Batch) -> Step:
        """Step number `index`, counted from 0. Raises TrainingError, and changes no weight, if it is not finite."""
        return self.begin(index, batch).result()

    def begin(self, index: int, batch: Batch) -> Begun:
        """Launch step number `index`, counted from 0; a step that is not finite changes no weight, nor does any begun
        before its `result` was asked for. Raises TrainingError if no target of the batch counts.
        """
        config = self.recipe.optim
        size = self.recipe.train.batch_size
        lr = learning_rate(config, (index + 1) * size, self.recipe.train.steps * size)
        if not (self._renewed and self._warm):
            self.optimizer.zero_grad(set_to_none=not self.recipe.train.cuda_graphs)
        loss, z_loss = self.accumulate(batch)
        norm = total_norm(self.parameters, self.mesh)
        finite = loss.isfinite() & norm.isfinite()
        torch.maximum(self._spoiled, (~finite).float(), out=self._spoiled)
        begun = Begun(index, batch, lr, config.z_loss is not None,
                      torch.stack([loss, z_loss, norm.to(loss.dtype), self._spoiled]), self._spoiled)
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # the others would take no notice of the flag
        assert self.optimizer.defaults.get("fused"), "the optimizer is one of PyTorch's fused ones"
        self.optimizer.found_inf = self._spoiled  # type: ignore[attr-defined]  # as torch.amp's scaler tells it
        self.optimizer.step()
        self._warm = True
        return begun

    def accumulate(self, batch: Batch) -> Losses:
        """Add the gradient of the batch's mean loss to the parameters; returns the cross-entropy and the z-loss in it,
        both of the whole batch.

        Each micro-batch counts by its number of targets, not as one of n means: so any cut of the batch gives the
        same gradient, also where the masks differ.
        """
        counted = self._counted(batch)
        if counted == 0:
            raise TrainingError(f"no target of this batch counts in the loss: {batch.describe()}.")
        divisor = torch.full((), counted, device=self.device)
        self.objective.train()
        if self.pipeline is not None:
            total, z_loss = self.pipeline.step(self._micro_batches(batch), divisor)
            return self._over_ranks(total - z_loss), self._over_ranks(z_loss)
        entropy, z_loss = (torch.zeros((), device=self.device) for _ in range(2))
        # the first step runs as it is: then all memory that stays is taken before a graph takes its own
        replayed = self._replayed if self._warm else None
        for inputs, carried in self._passes(batch):
            # a recipe with segments has no graphs
            losses = (replayed(*inputs, divisor) if replayed is not None else
                      self._forward_backward(*inputs, divisor, carried))
            entropy += losses[0]
            z_loss += losses[1]
        return self._over_ranks(entropy), self._over_ranks(z_loss)

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the counted targets of the ranks' batches, in nats, without any z-loss.

        Of whole sequences, as evaluation reads them, also where training cuts them into segments.
        """
        self.objective.eval()
        total = torch.zeros((), device=self.device)
        if self.pipeline is not None:
            total += self.pipeline.evaluate(self._micro_batches(batch))
        else:
            with self._precision():
                for micro_batch in self._micro_batches(batch):
                    total += self.objective(*micro_batch)[0]
        give_up(self.objective)
        return self._over_ranks(total)

    def _forward_backward(self, tokens: Tensor, targets: Tensor, mask: Tensor, segments: Tensor | None,
                          divisor: Tensor, carried: Carried | None = None) -> Losses:
        with self._precision():
            total, z_loss = self.objective(tokens, targets, mask, segments, carried)
        loss = total / divisor
        loss.backward()
        z_loss = z_loss / divisor
        return loss.detach() - z_loss, z_loss

    def _precision(self) -> torch.autocast | nullcontext[None]:
        if self.recipe.train.precision != "bf16":
            return nullcontext()
        # every weight is used once in a pass, so a cache of casts would only hold memory
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def _counted(self, batch: Batch) -> int:
        counted = torch.tensor(int(batch.mask.sum()))
        return int(self.mesh.sum(counted, "replicate", "shard"))

    def _over_ranks(self, loss: Tensor) -> Tensor:
        return self.mesh.sum(loss, "replicate", "shard", "context")

    def _passes(self, batch: Batch) -> Iterator[tuple[Inputs, Carried | None]]:
        """The inputs of each forward and backward pass, with what it carries where sequences are cut into segments."""
        for micro_batch in self._micro_batches(batch):
            if (length := self.recipe.train.segment_len) is None:
                yield micro_batch, None
            else:
                yield from in_segments(micro_batch, length, self.objective.model.carry())

    def _micro_batches(self, batch: Batch) -> list[Inputs]:
        """tokens, targets and mask that this rank sees, and the segments of the whole sequences."""
        size = self.recipe.train.micro_batch_size
        found = []
        for start in range(0, len(batch.tokens), size):
            rows = slice(start, start + size)
            tokens, targets, mask = (own(self._tensor(part[rows]), self.mesh)
                                     for part in (batch.tokens, batch.targets, batch.mask))
            found.append((tokens, targets, mask,
                          None if batch.segments is None else self._tensor(batch.segments[rows])))
        return found

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
