"""Tensor and sequence parallelism: ranks share each layer's heads and channels, and between layers the tokens.

    norm           on this rank's tokens                                        x (b t/ranks d)
    layer          tokens gathered, this rank's heads and channels              x (b t d)
    after it       the ranks' outputs summed, each rank its tokens              x (b t/ranks d)

Parameters become DTensors over "tensor" (plan.py). While a module runs, plain tensors stand in their place, as
attributes that hide them: the layers compute on what is there and know nothing of it, and whoever manages the
parameters (FSDP, the optimizer) always finds the DTensors.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hinny.config.fit import check_tensor
from hinny.layers import LAYERS
from hinny.layers.linear import SplitLinear
from hinny.model import Block
from hinny.objective import Objective
from hinny.parallel.collectives import copy_in, gather, scatter_sum, sum_out
from hinny.parallel.mesh import Mesh, share
from hinny.parallel.plan import PLAN, ROWS
from hinny.parallel.vocabulary import VocabularyEmbedding, VocabularyLoss
from hinny.state import CarriedLayer

SYMBOLS = {kind: symbol for symbol, kind in LAYERS.items()}


def apply_tensor(objective: Objective, mesh: Mesh) -> None:
    """Cuts the parameters of `objective`, in place, over mesh dimension "tensor"; of size 1, nothing is done.

    Parameters, on any device or meta, must be the same on all ranks: each keeps its part of its own, and nothing is
    sent. They keep their names. Of a pipeline's stage, what is there is cut. Afterwards `objective` takes tokens,
    targets and masks (b t) whole, the same on all ranks of "tensor", and returns the whole loss on each.
    Raises ConfigError, before any change, if the model's sizes do not fit; at the first forward, if t does not.
    """
    ranks = mesh.size("tensor")
    if ranks == 1:
        return
    check_tensor(objective.model.config, ranks)
    along, group = mesh.along("tensor"), mesh.group("tensor")
    for block in (module for module in objective.modules() if isinstance(module, Block)):
        _cut(block.layer, PLAN[SYMBOLS[type(block.layer)]], along)
        _cut(block.norm, {}, along)
        _run_locally(block.norm, group)
        # one by one: FSDP may gather their matrices only when they are called
        for projection in projections(block.layer):
            _run_locally(projection, group)
        _run_locally(block.layer, group, but=projections(block.layer))
        block.layer.register_forward_pre_hook(_Gather(group))
        block.layer.register_forward_hook(_ScatterSum(group))
        if SYMBOLS[type(block.layer)] == "1":
            cast(nn.Module, block.layer.x_proj).register_forward_hook(_SumParts(group))
    ends = dict(objective.model.named_children())
    if "norm" in ends:
        _cut(ends["norm"], {}, along)
        _run_locally(ends["norm"], group)
    if "head" in ends:
        _cut(ends["head"], {"weight": ROWS}, along)
    if "embedding" in ends:
        _cut(ends["embedding"], {"weight": ROWS}, along)
        objective.model.embedding = VocabularyEmbedding(cast(nn.Parameter, ends["embedding"].weight), group)
    loss = VocabularyLoss(group)
    objective.entropy, objective.entropy_z = loss.entropy, loss.entropy_z


def projections(module: nn.Module) -> list[nn.Module]:
    """The matrix products in `module`, each with its parameters; one in named parts is one. What else `module` has, it
    reads itself.
    """
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, (nn.Linear, SplitLinear)) else projections(child)
    return found


def _cut(module: nn.Module, plan: dict[str, int], along: DeviceMesh) -> None:
    """Makes DTensors of the parameters of `module`: cut along the dimensions in `plan`, whole where it names none."""
    for path, parameter in list(module.named_parameters()):
        owner, name = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        with torch.no_grad():
            if path in plan:
                dim = plan[path]
                part = share(parameter, along.get_local_rank(), along.size(), dim)
                # a copy of its own: a view would keep the whole alive
                local = part.clone(memory_format=torch.contiguous_format)
                placement: Shard | Replicate = Shard(dim)
            else:
                local, placement = parameter.detach(), Replicate()
            whole = DTensor.from_local(local, along, [placement], run_check=False)
        owner.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _run_locally(module: nn.Module, group: dist.ProcessGroup, but: list[nn.Module] | None = None) -> None:
    """From now on `module` runs with plain tensors in place of the parameters in it, those in `but` apart."""
    apart = {owner for other in but or [] for owner in other.modules()}
    local = _Local([(owner, name) for owner in module.modules() if owner not in apart
                    for name, _ in owner.named_parameters(recurse=False)], group)
    module.register_forward_pre_hook(local.put)
    # also when the forward ends with an exception, as recomputation does as soon as it has what it needs
    module.register_forward_hook(local.remove, always_call=True)


class _Local:
    """Hooks that let plain attributes hide parameters, each given by its owner and name, while a module runs."""

    def __init__(self, places: list[tuple[nn.Module, str]], group: dist.ProcessGroup) -> None:
        self.places = places
        self.group = group

    def put(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the forward. Whole parameters get the sum of the ranks' gradients, each of which is a part."""
        for owner, name in self.places:
            parameter = cast(DTensor, owner._parameters[name])
            local = parameter.to_local()
            if parameter.placements[0].is_replicate():
                local = copy_in(local, self.group)
            # an attribute is found before a parameter of its name, which nn.Module would not let us set
            owner.__dict__[name] = local

    def remove(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the forward, whatever its end."""
        for owner, name in self.places:
            owner.__dict__.pop(name, None)


class _Gather:
    """Hook before a layer: its tokens of all ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, segments = args
        if not (state is None or isinstance(state, CarriedLayer)):  # that one has this rank's heads
            raise ValueError("a state cannot be continued with parallel.tensor above 1: its heads would be on other "
                             "ranks. Generate with one process.")
        return gather(x, 1, self.group).contiguous(), state, segments


class _ScatterSum:
    """Hook behind a layer: the sum of the ranks' outputs, of this rank's tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return scatter_sum(output, 1, self.group).contiguous()


class _SumParts:
    """Hook behind Mamba-1's x_proj: it reads cut channels, and every channel uses all that it makes: sums both ways."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sums = copy_in(sum_out(torch.cat(output, -1), self.group), self.group)
        return sums.split([part.shape[-1] for part in output], -1)
