"""A finished model → the part of it that this rank trains: the order in which its transformations are applied."""

from __future__ import annotations

import torch

from hinny.config import ParallelConfig
from hinny.objective import Objective
from hinny.parallel.compiled import apply_compile
from hinny.parallel.context import apply_context
from hinny.parallel.fsdp import apply_fsdp
from hinny.parallel.mesh import Mesh
from hinny.parallel.recompute import apply_recompute
from hinny.parallel.tensor import apply_tensor


def parallelize(objective: Objective, mesh: Mesh, config: ParallelConfig,
                product_dtype: torch.dtype | None = None) -> None:
    """Change `objective`, in place, as [parallel] says; it may be on meta, or one stage of a pipeline. What comes
    before, float8 and the cut into stages, is the caller's.

    product_dtype: the type of matrix products where they run in another than the weights'.
    Raises ConfigError for sizes that do not fit the model.
    """
    if mesh.size("tensor") > 1:
        apply_tensor(objective, mesh)
    if mesh.size("context") > 1:
        apply_context(objective, mesh)
    if config.recompute is not None:
        apply_recompute(objective, config.recompute)
    if config.compile:
        apply_compile(objective)
    if mesh.size("replicate", "shard", "context") > 1:
        apply_fsdp(objective, mesh, product_dtype)
