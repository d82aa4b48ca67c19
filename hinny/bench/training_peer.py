"""The peer of a timed training: the same model in transformers, with the same steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hinny.config import Recipe
from hinny.data.mix import Batch
from hinny.errors import BackendError
from hinny.model import Model

TOLERANCE = 1e-3
"""Largest difference of logits between the peers, both fp32: they sum in another order."""

TOLERANCE_BF16 = 0.03
"""The same between two mean losses in bf16, whose kernels round in different places."""


@dataclass(frozen=True)
class Timed:
    """Seconds of each step, its losses, and the most bytes that PyTorch's allocator held."""

    seconds: list[float]
    losses: list[float]
    peak_memory: int


def time_twin(twin: nn.Module, batches: Sequence[Batch], recipe: Recipe, *, expected: float, warm_up: int,
              device: torch.device) -> Timed:
    """Steps of `twin` on a GPU behind the first ones; BackendError if its first loss is not the `expected` one."""
    micro = recipe.train.micro_batch_size
    optimizer = torch.optim.AdamW(twin.parameters(), lr=recipe.optim.lr, fused=True)
    ends: list[float] = []
    losses: list[Tensor] = []
    done: list[torch.cuda.Event] = []
    for batch in batches:
        loss = torch.zeros((), device=device)
        for first in range(0, len(batch.tokens), micro):
            tokens, targets = (torch.from_numpy(part[first:first + micro]).to(device)
                               for part in (batch.tokens, batch.targets))
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=recipe.train.precision == "bf16"):
                entropy = nn.functional.cross_entropy(twin(tokens).logits.flatten(0, 1), targets.flatten())
            entropy = entropy * (len(tokens) / len(batch.tokens))
            entropy.backward()
            loss += entropy.detach()
        if not losses and abs(float(loss) - expected) > TOLERANCE_BF16 * expected:
            raise BackendError(f"{type(twin).__name__} with the same weights has loss {float(loss):.4f} where ours is "
                               f"{expected:.4f}: nothing was timed.")
        nn.utils.clip_grad_norm_(twin.parameters(), recipe.optim.clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        done.append(torch.cuda.Event())
        done[-1].record()
        if len(done) > warm_up:
            # as ours: the step before, while this one runs
            done[-2].synchronize()
            ends.append(time.perf_counter())
    return Timed([end - start for start, end in pairwise(ends)], [float(loss) for loss in losses],
                 torch.cuda.max_memory_allocated(device))


def twin_step(twin: nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        logits = twin(tokens[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def check_logits(model: Model, twin: nn.Module, tokens: Tensor) -> None:
    ours, theirs = model(tokens[:1, :-1]), twin(tokens[:1, :-1]).logits
    if (gap := float((ours - theirs).abs().max())) > TOLERANCE:
        raise BackendError(f"{type(twin).__name__} with the same weights differs by {gap:.2e} in its logits, more than "
                           f"{TOLERANCE}: nothing was timed.")
