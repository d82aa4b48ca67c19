"""Collectives that a gradient passes: what a rank's tensor becomes among those of its group.

    gather        shards along a dimension → the whole       backward: the gradients' sum, each rank its shard
    scatter_sum   the sum of the ranks' tensors, each rank its shard                     backward: gather
    copy_in       the tensor itself                                                      backward: the sum
    sum_out       the sum of the ranks' tensors                                          backward: the tensor itself
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """x (... s ...) → (... ranks * s ...), shards in the order of ranks; every rank must use the whole differently
    or the same way: its gradients are summed.
    """
    return _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """x (... ranks * s ...) → this rank's (... s ...) of the sum over ranks."""
    return _ScatterSum.apply(x, dim, group)


def copy_in(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, equal on all ranks, used by each for its part of a sum."""
    return _CopyIn.apply(x, group)


def sum_out(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' x, used by all of them alike."""
    return _SumOut.apply(x, group)


def gathered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """`gather` without a gradient."""
    ranks = dist.get_world_size(group)
    moved = x.movedim(dim, 0).contiguous()
    whole = moved.new_empty(ranks * moved.shape[0], *moved.shape[1:])
    dist.all_gather_into_tensor(whole, moved, group=group)
    return whole.movedim(0, dim).contiguous()


def scattered_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """`scatter_sum` without a gradient."""
    ranks = dist.get_world_size(group)
    moved = x.movedim(dim, 0).contiguous()
    assert moved.shape[0] % ranks == 0, f"{moved.shape[0]} is not divisible by {ranks} ranks"
    part = moved.new_empty(moved.shape[0] // ranks, *moved.shape[1:])
    dist.reduce_scatter_tensor(part, moved, group=group)
    return part.movedim(0, dim).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return scattered_sum(dy, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return scattered_sum(x, dim, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(dy, ctx.dim, ctx.group), None, None


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(dy, ctx.group), None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
