"""A recipe's model as this process trains it: cut by [parallel], on its device, without values yet."""

from __future__ import annotations

import torch

from hinny.config import Recipe
from hinny.errors import ConfigError
from hinny.model import Model
from hinny.objective import Objective
from hinny.parallel.apply import parallelize
from hinny.parallel.context import check_context
from hinny.parallel.float8 import apply_float8
from hinny.parallel.mesh import Mesh
from hinny.parallel.pipeline import Pipeline, cut, local_length


def build(recipe: Recipe, mesh: Mesh, device: torch.device) -> tuple[Objective, Pipeline | None]:
    """The objective of `recipe`, its parameters uninitialised memory on `device`; and the pipeline that it is a stage
    of, if there is one. Raises ConfigError where the sizes of model, batch and mesh do not fit.
    """
    check(recipe, mesh, device)
    product_dtype = torch.bfloat16 if recipe.train.precision == "bf16" else None
    with torch.device("meta"):
        objective = Objective(Model(recipe.model), recipe.optim.z_loss)
    if recipe.parallel.float8:
        # of the whole model: a stage may have no linear that fits
        apply_float8(objective, mesh.size("tensor"))
    if mesh.size("pipeline") > 1:
        cut(objective, mesh)
    parallelize(objective, mesh, recipe.parallel, product_dtype)
    objective.to_empty(device=device)
    pipeline = None
    if mesh.size("pipeline") > 1:
        pipeline = Pipeline(objective, mesh, recipe, device)
    return objective, pipeline


def check(recipe: Recipe, mesh: Mesh, device: torch.device) -> None:
    """ConfigError where batch, graphs or the kinds of processes do not fit."""
    train, ranks = recipe.train, mesh.size("replicate", "shard")
    if train.batch_size % (train.micro_batch_size * ranks):
        raise ConfigError(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}) x parallel.replicate ({mesh.size('replicate')}) x parallel.shard "
            f"({mesh.size('shard')}) = {train.micro_batch_size * ranks}: each of {ranks} ranks takes equal parts of a "
            "batch in whole micro-batches. Change one of them.")
    local_length(recipe, mesh)
    check_context(recipe.model, train.seq_len, mesh)
    if train.cuda_graphs and (device.type != "cuda" or mesh.world > 1):
        where = f"{mesh.world} processes" if mesh.world > 1 else f"device {device.type}"
        raise ConfigError(f"train.cuda_graphs is true and this training is on {where}: it is for one GPU alone. Give "
                          "train.cuda_graphs=false.")
