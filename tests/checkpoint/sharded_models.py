"""What the ranks of test_store_ranks.py do: small models cut in several ways, saved, loaded and compared bit for bit.

A gradient here is a function of the weight alone, number by number: so any cut of a model trains exactly as the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small import small_config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hinny.checkpoint.store import load
from hinny.config import load_recipe
from hinny.model import Model
from hinny.run import Run

# 37 and 5 are divisible by no number of ranks: shards are uneven, and the last of four ranks has none of some
CONFIG = small_config("----", vocab_size=37, mlp={"d_ff": 5, "activation": "gelu"})
RECIPE = load_recipe("tiny-hybrid").model_copy(update={"model": CONFIG})
EXTRA = {"recipe": RECIPE.model_dump(mode="json"), "tokens": 7}
SHARDED = {"embedding.weight": 0, "head.weight": 0, "layer.up.weight": 0, "layer.down.weight": 1}
"""Weights that tensor parallelism cuts here, by the end of their names, and along which dimension."""


def built(seed: int) -> Model:
    """The whole model in float32."""
    model = Model(CONFIG)
    model.init_weights(seed)
    return model


def cut(model: Model, layout: str, ranks: list[int]) -> Model:
    """`model` in place over `ranks`: "fsdp" over all, "hsdp" and "fsdp x tp" over halves."""
    if layout == "fsdp":
        fully_shard(model, mesh=DeviceMesh("cpu", ranks))
        return model
    mesh = DeviceMesh("cpu", torch.tensor(ranks).view(2, -1), mesh_dim_names=("outer", "inner"))
    if layout == "hsdp":
        fully_shard(model, mesh=mesh)
        return model
    assert layout == "fsdp x tp", layout
    for name, weight in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        dims = [dim for end, dim in SHARDED.items() if name.endswith(end)]
        placement = Shard(dims[0]) if dims else Replicate()
        whole = distribute_tensor(weight.detach(), mesh["inner"], [placement])
        setattr(model.get_submodule(owner), key, nn.Parameter(whole))
    fully_shard(model, mesh=mesh["outer"])
    return model


def wrapped(model: Model) -> Model:
    """Every block under activation checkpointing, which puts a name of its own in front of the weights'."""
    for name, block in list(model.layers.named_children()):
        model.layers.register_module(name, checkpoint_wrapper(block))
    return model


def stage(model: Model, part: int, parts: int) -> Model:
    """`model` with the weights of one of `parts` pipeline stages alone."""
    if part != 0:
        model.embedding = nn.Identity()  # type: ignore[assignment]
    if part != parts - 1:
        model.norm, model.head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    each = -(-len(model.layers) // parts)
    for i in range(len(model.layers)):
        if i // each != part:
            model.layers[i] = nn.Identity()
    return model


def adam(model: nn.Module) -> torch.optim.AdamW:
    """A new optimiser."""
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=False, foreach=False)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    """Steps whose gradient is a function of each number alone."""
    for _ in range(steps):
        for weight in model.parameters():
            weight.grad = weight.detach() * 0.5 + 0.125
        optimizer.step()
    optimizer.zero_grad()


def trained(model: Model, steps: int) -> tuple[Model, torch.optim.AdamW]:
    """`model` after some steps, and its optimiser."""
    optimizer = adam(model)
    advance(model, optimizer, steps)
    return model, optimizer


def contents(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Copies of all weights, moments and step counts of this rank's model, whole."""
    found: dict[str, Any] = dict(get_model_state_dict(model))
    if optimizer is not None:
        for name, moments in get_optimizer_state_dict(model, optimizer)["state"].items():
            found |= {f"{name}.{key}": value for key, value in moments.items()}
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in found.items()}


def whole(seed: int, steps: int) -> dict[str, Tensor]:
    """What one process has after `steps`."""
    return contents(*trained(built(seed), steps))


def differ(found: dict[str, Tensor], expected: dict[str, Tensor], part: bool = False) -> list[str]:
    """Names that are on one side only, or whose numbers are not equal bit for bit; `part`: some are enough."""
    names = set(found) if part else {*found, *expected}
    return sorted(name for name in names if name not in found or name not in expected
                  or not torch.equal(found[name], expected[name]))


def new_run(folder: Path) -> Run:
    """A run directory, made by rank 0."""
    run = Run(folder)
    if dist.get_rank() == 0:
        run.write_recipe(RECIPE)
    dist.barrier()
    return run


def reloaded(run: Run, layout: str, group: Any) -> tuple[Model, torch.optim.AdamW]:
    """Another model with a new optimiser, filled from the newest checkpoint."""
    model = cut(built(1), layout, list(range(dist.get_world_size(group))))
    optimizer = adam(model)
    load(run, model, optimizer, group=group)
    return model, optimizer
