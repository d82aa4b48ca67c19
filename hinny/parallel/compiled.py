"""torch.compile of a model's blocks, one at a time.

Compiled is what a block's forward pass does: norm, layer, residual. It pays where PyTorch's own small operators follow
each other: the activation of an MLP and its gradient, rotary positions, the residual. Our kernels are operators to the
compiler, and stay what they are; so do matrix products. In plain torch (on a CPU) a graph ends where SSD looks at its
decays, and at collectives of other dimensions of the mesh: what lies between is compiled.
Embedding, last norm and loss are not compiled: the loss is a kernel of ours, and the rest is two calls.
A compiled function takes the place of `forward` on the instance, so names and hooks stay, and FSDP's hooks are outside.
"""

from __future__ import annotations

import torch

from hinny.errors import ConfigError
from hinny.objective import Objective
from hinny.parallel.recompute import Recomputed

GRAPHS = 64
"""Graphs that all blocks may share, more than PyTorch's 8: kinds of layer x packed or not x with gradients or not."""


def apply_compile(objective: Objective, backend: str = "inductor") -> None:
    """Compile every block of `objective`, in place, when it is first called. After recomputation, before FSDP.

    A block that is recomputed as a whole is compiled inside that. Raises ConfigError for selective recomputation: the
    compiler chooses by itself what a graph keeps. Sets torch._dynamo's recompile_limit, to GRAPHS at least.
    """
    changed = [block.forward for block in objective.model.blocks if isinstance(block.forward, Recomputed)]
    if any(forward.selective for forward in changed):
        raise ConfigError('parallel.compile is true and parallel.recompute is "selective": compiled layers choose by '
                          'themselves what to compute again. Leave recompute out, give "full" or kinds of layer, or '
                          "set compile to false.")
    # past it PyTorch runs the rest as it is, with a warning alone
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in objective.model.blocks:
        if isinstance(block.forward, Recomputed):
            block.forward.made.forget()
            block.forward.run = torch.compile(block.forward.run, backend=backend)
        else:
            block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
