"""One training in float64 on one process and on several: the same losses, gradients and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small import small_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from hinny.model import Model
from hinny.objective import Objective
from hinny.parallel.mesh import Mesh
from hinny.parallel.norm import total_norm

STEPS = 3


def sample(length: int, rows: int = 4, vocab: int = 37, packed: bool = True) -> list[tuple[Tensor, ...]]:
    """STEPS batches: tokens, targets, mask, segments; documents begin at, before and behind a quarter of the row."""
    numbers = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        tokens, targets = (torch.randint(vocab, (rows, length), generator=numbers) for _ in range(2))
        mask = torch.rand(rows, length, generator=numbers) < 0.8
        starts = torch.zeros(rows, length, dtype=torch.int32)
        for row in range(rows):
            for start in (length // 4 + row - 1, length // 2, 3 * length // 4 - 2 * row):
                starts[row, start] += step != 1  # one step without boundaries
        segments = starts.cumsum(1, dtype=torch.int32)
        found.append((tokens, targets, mask, segments) if packed else (tokens, targets, mask))
    return found


def objective_of(pattern: str, device: str = "cpu", **changes: Any) -> Objective:
    """The float64 objective of a small model, with weights large enough that every path matters."""
    with torch.device(device):
        objective = Objective(Model(small_config(pattern, **changes)), z_loss=0.01)
    if device == "cpu":
        objective.model.init_weights(0)
    return objective.double().train()


def trained(objective: Objective, batches: list[tuple[Tensor, ...]], mesh: Mesh,
            mine: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda batch: batch,
            after_backward: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Losses, gradients by name (the last step's), norms and weights, whole, of STEPS steps of AdamW.

    mine: what this rank sees of a batch. after_backward: what adds up gradients that the objective leaves apart.
    """
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0.1)
    losses, norms, grads = [], [], {}
    for batch in batches:
        optimizer.zero_grad()
        total, _ = objective(*mine(batch))
        loss = total / int(batch[2].sum())
        loss.backward()
        after_backward()
        losses.append(mesh.sum(loss.detach().clone(), "replicate", "shard", "context").item())
        norms.append(total_norm(objective.parameters(), mesh).item())
        grads = {name: whole(parameter.grad) for name, parameter in objective.named_parameters()}
        optimizer.step()
    weights = {name: whole(parameter.detach()) for name, parameter in objective.named_parameters()}
    return {"losses": losses, "norms": norms, "grads": grads, "weights": weights}


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be cut over ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def worst(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest differences of two trainings, relative to the largest value of each tensor."""
    def gap(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()

    assert set(found["grads"]) == set(expected["grads"])
    return {"losses": max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)),
            "norms": max(abs(a / b - 1) for a, b in zip(found["norms"], expected["norms"], strict=True)),
            "grads": max(gap(found["grads"][name], grad) for name, grad in expected["grads"].items()),
            "weights": max(gap(found["weights"][name], weight) for name, weight in expected["weights"].items())}
