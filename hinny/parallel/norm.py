"""The norm of a gradient that is spread over a mesh."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hinny.parallel.mesh import Mesh


def total_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients together, the same on every rank; parameters may be on different meshes."""
    kinds: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            kind = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
            kinds.setdefault(kind, []).append(grad)
    norms = []
    for grads in kinds.values():
        norm = nn.utils.get_total_norm(grads)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if len(norms) == 1 and mesh.size("pipeline") == 1:
        return norms[0]
    return mesh.sum(torch.stack(norms).square().sum(), "pipeline").sqrt()
