"""What states take of memory, and how much there is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hinny.model import Model
from hinny.state import KVState


@dataclass(frozen=True)
class RowSize:
    """Bytes of the state of one sequence."""

    fixed: int
    """Of Mamba layers."""
    per_token: int
    """Of attention layers, for each token seen."""

    def at(self, position: int) -> int:
        """After `position` tokens."""
        return self.fixed + self.per_token * position


def row_size(model: Model) -> RowSize:
    """Of a state of `model`, from the shapes of an empty one."""
    fixed = per_token = 0
    for layer in model.init_state(1, device="meta").layers:
        for tensor in {} if layer is None else layer.tensors().values():
            if isinstance(layer, KVState):
                per_token += tensor.shape[2] * tensor.shape[3] * tensor.element_size()
            else:
                fixed += tensor.numel() * tensor.element_size()
    return RowSize(fixed, per_token)


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now on `device`."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # what torch has set aside and does not use counts as free
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle
