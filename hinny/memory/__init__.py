"""Memory that training and evaluation need, predicted: `training` of a recipe for a named GPU, `inference`. No torch.

    layers.py      what a layer keeps and makes, by kind and mode of recomputation
    training.py    what is alive when: the moments of a step, on the rank that needs the most
    inference.py   what reading a long text takes
"""

from __future__ import annotations

from typing import Any

from hinny import pattern
from hinny.config import DIMENSIONS, Recipe
from hinny.config.fit import check_fit
from hinny.errors import ConfigError
from hinny.memory.inference import inference
from hinny.memory.training import PARTS, Plan, peak

__all__ = ["PARTS", "Plan", "inference", "peak", "plan", "training"]


def plan(recipe: Recipe, devices: int | None = None, shards: int | None = None) -> Plan:
    """The recipe's plan for so many devices, as many as [parallel] says if None; or for so many shards.

    Raises ConfigError where training would: if the devices are not the product of the sizes, or cannot share batch,
    sequences and layers equally; for CUDA graphs on several.
    """
    if devices is not None and devices < 1:
        raise ConfigError(f"devices is {devices}; it must be at least 1.")
    parallel, train = recipe.parallel, recipe.train
    sizes = {name: getattr(parallel, name) or 1 for name in DIMENSIONS}
    if shards is not None:
        sizes["shard"] = shards
    elif devices is not None:
        sizes = parallel.sizes(devices)
    stages = len(pattern.stages(recipe.model.pattern))
    if sizes["pipeline"] > 1 and sizes["pipeline"] != stages:
        raise ConfigError(f"parallel.pipeline is {sizes['pipeline']}, but model.pattern has {stages} stages: cut it "
                          "with `|`, or set parallel.pipeline to their number.")
    check_fit(recipe, sizes)
    ranks = sizes["replicate"] * sizes["shard"]
    return Plan(sizes=sizes, seq_len=train.pass_len, segments=train.seq_len // train.pass_len,
                micro_batch=train.micro_batch_size,
                micro_batches=train.batch_size // (train.micro_batch_size * ranks),
                width=2 if train.precision == "bf16" else 4, recompute=parallel.recompute,
                gpipe=parallel.schedule == "gpipe", packed=recipe.data.boundaries == "reset")


def training(recipe: Recipe, usable: int, devices: int | None = None) -> dict[str, Any]:
    """What a device needs at the peak, by parts, and whether it fits in `usable` bytes.

    `devices_needed` is the smallest number of devices, more of them sharding, on which it fits; None where what does
    not shrink with them is too much already. More than one have no CUDA graphs.
    """
    given = plan(recipe, devices)
    found = peak(recipe.model, given)
    world = 1
    for size in given.sizes.values():
        world *= size
    return {"devices": world, **found, "usable_bytes": usable, "fits": found["memory_bytes"] <= usable,
            "devices_needed": _needed(recipe, usable, world // given.size("shard"))}


def _needed(recipe: Recipe, usable: int, others: int) -> int | None:
    """The smallest number of devices that fits, among those that can share the batch; `others` do not shard."""
    alone, each = recipe, recipe.train.micro_batch_size * recipe.parallel.replicate
    several = recipe.model_copy(update={"train": recipe.train.model_copy(update={"cuda_graphs": False})})
    most = recipe.train.batch_size // each if recipe.train.batch_size % each == 0 else 0
    for shards in (number for number in range(1, most + 1) if most % number == 0):
        asked = alone if shards * others == 1 else several
        if peak(recipe.model, plan(asked, shards=shards))["memory_bytes"] <= usable:
            return shards * others
    return None
