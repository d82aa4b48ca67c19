"""What the ranks of a tensor-parallel model exchange: sums of what each made, parts of what all need.

A decoding step of an 8B model has 57 to 65 sums of a few rows, each 8 KB to 256 KB: their latency counts, not their
bytes. One-shot sums are one kernel: a rank copies its part to memory that the others can read, waits until theirs is
there too, and adds all of them up. Larger sums, and those of types that it does not know, are NCCL's.
"""

from __future__ import annotations

import logging
import socket
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hinny.errors import BackendError
from hinny.ops import peers

How = Literal["auto", "one-shot", "collective"]

ONE_SHOT_BYTES = 512 << 10
"""The largest sum by one kernel, which reads all parts on every rank: beyond, bytes begin to count."""
ONE_SHOT_RANKS = (2, 4, 8)
"""So many it adds up in one order on all ranks, so that they find equal bits."""
ONE_SHOT_TYPES = (torch.bfloat16, torch.float32)
ALIGNED = 16
"""Bytes that a thread moves at a time."""

logger = logging.getLogger(__name__)


class Norm(Protocol):
    """A norm of hinny.layers.norm; with a bias it is a layer norm whose gain is weight + 1."""

    @property
    def weight(self) -> Tensor:
        """(d,)."""

    @property
    def bias(self) -> Tensor | None:
        """(d,)."""

    @property
    def eps(self) -> float:
        """Added to the mean square, or the variance."""


class Sums:
    """The ranks of `group` that share a model, and how they add up. All ranks must call the same methods with the same
    shapes in the same order, on one stream; CUDA graphs may record them.

    how: "one-shot" needs GPUs of one host that reach each other's memory; "auto" takes it where that is so, and says
    what it took; "collective" leaves every sum to the group. Memory that the ranks share is made here: all must do it.
    BackendError where "one-shot" cannot be.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, how: How = "auto") -> None:
        self.group = group
        self.device = device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        hindrance = _hindrance(group, device) if how != "collective" else None
        if how == "one-shot" and hindrance:
            raise BackendError(f"one-shot sums were asked for, and {hindrance}. Give \"auto\" or \"collective\".")
        self.one_shot = how != "collective" and hindrance is None
        self._shared = _shared(ONE_SHOT_BYTES, group, device) if self.one_shot else None
        self._parts: tuple[Tensor, ...] | None = None
        self._columns: tuple[Tensor, ...] | None = None
        if how == "auto" and self.rank == 0:
            kind = f"one-shot up to {ONE_SHOT_BYTES >> 10} KB" if self.one_shot else f"none one-shot, for {hindrance}"
            logger.info("sums of %d ranks: %s; else %s", self.size, kind, dist.get_backend(group))

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, contiguous and of any shape; equal bits on all of them. x may be overwritten."""
        if self._shared is not None and _is_small(x):
            # the kernel ends only when all ranks have read: the next one may overwrite what lies there. So one
            # buffer is enough, on one stream
            place = self._shared[:x.nbytes].view(x.dtype).view(x.shape)
            return torch.ops.symm_mem.one_shot_all_reduce_copy(place, x, "sum", self.group.group_name)
        dist.all_reduce(x, group=self.group)
        return x

    def recordable(self, rows: int, d: int, dtype: torch.dtype) -> bool:
        """Whether a CUDA graph may record a pass of so many rows of d numbers: a collective of NCCL's behind launches
        that begin early has hung in one, so only passes that need none may be recorded."""
        return (self.one_shot and dtype in ONE_SHOT_TYPES and rows <= peers.MOST_ROWS
                and rows * d * dtype.itemsize <= ONE_SHOT_BYTES)

    def takes(self, x: Tensor) -> bool:
        """Whether `add_norm` is for rows like x (... d); the same on all ranks."""
        return self.one_shot and x.dtype == torch.bfloat16 and 0 < x.numel() // x.shape[-1] <= peers.MOST_ROWS

    def add_norm(self, norm: Norm, x: Tensor, delta: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """x (... d) + the sum of the ranks' delta, and its norm, in one launch: what `takes` takes.

        place: 0, 1 or 2, another one than the call before had. The first call makes memory that the ranks share: no
        graph may record it.
        """
        if self._parts is None:
            words = _shared(8 * peers.sum_words(x.shape[-1], self.size), self.group, self.device)
            counts = torch.zeros(peers.MOST_ROWS, dtype=torch.int32, device=self.device)
            self._parts = self._addresses(words.zero_()), counts, words
        parts, counts, _ = self._parts
        return peers.sum_norm(x, delta, norm.weight, norm.bias, norm.eps, parts, counts, place, self.rank, self.size)

    def gather(self, x: Tensor) -> Tensor:
        """x (r c) → (r, ranks * c), the columns of all ranks in their order, on each of them.

        By one launch where sums are one-shot and rows few; the next call overwrites its result then. The first call
        makes memory for so many columns.
        """
        if not self.one_shot or x.dtype not in ONE_SHOT_TYPES or not len(x):
            return self._gathered(x)
        if len(x) > peers.MOST_ROWS:
            return torch.cat([self.gather(piece).clone() for piece in x.split(peers.MOST_ROWS)])
        columns = self.size * x.shape[-1]
        if self._columns is None:
            made = _shared(peers.MOST_ROWS * columns * x.element_size(), self.group, self.device)
            flags = _shared(4 * peers.gather_flags(self.size), self.group, self.device)
            self._columns = self._addresses(made), self._addresses(flags.zero_()), made, flags
        parts, flags, made, _ = self._columns
        size = len(x) * columns * x.element_size()
        assert peers.MOST_ROWS * columns * x.element_size() == made.nbytes, "a model has one number of words"
        peers.gather(x, parts, flags, self.rank, self.size)
        return made[:size].view(x.dtype).view(-1, columns)

    def _addresses(self, shared: Tensor) -> Tensor:
        """Where each rank's part of shared memory lies, as this one sees it: (ranks,) int64 on the device. All ranks
        have filled theirs then."""
        import torch.distributed._symmetric_memory as symmetric

        found = list(symmetric.rendezvous(shared, self.group).buffer_ptrs)
        assert found[self.rank] == shared.data_ptr(), (found, shared.data_ptr())
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)
        return torch.tensor(found, device=self.device)

    def _gathered(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=self.group)
        return parts.movedim(0, 1).flatten(1)


def _is_small(x: Tensor) -> bool:
    """Whether one kernel may add up tensors of this kind; the same on all ranks."""
    return (0 < x.nbytes <= ONE_SHOT_BYTES and x.dtype in ONE_SHOT_TYPES and x.nbytes % ALIGNED == 0
            and x.storage_offset() * x.element_size() % ALIGNED == 0 and x.is_contiguous())


def _hindrance(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why there can be no one-shot sums, in words; all ranks find the same."""
    if device.type != "cuda":
        return f"the ranks work on {device.type}"
    size = dist.get_world_size(group)
    if size not in ONE_SHOT_RANKS:
        return f"there are {size} ranks, not {', '.join(map(str, ONE_SHOT_RANKS))}"
    places: list[tuple[str, int]] = [("", 0)] * size
    mine = torch.cuda.current_device() if device.index is None else device.index
    dist.all_gather_object(places, (socket.gethostname(), mine), group=group)
    if len({host for host, _ in places}) > 1:
        return "the ranks are on several hosts"
    reached = [other == mine or torch.cuda.can_device_access_peer(mine, other) for _, other in places]
    everyone = torch.tensor(all(reached), dtype=torch.int32, device=device)
    dist.all_reduce(everyone, op=dist.ReduceOp.MIN, group=group)
    return None if everyone.item() else "some GPUs cannot reach each other's memory"


def _shared(size: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """So many bytes at which the ranks read each other's."""
    # imported where it is used: a machine without GPUs has no need of it
    import torch.distributed._symmetric_memory as symmetric

    place = symmetric.empty(size, dtype=torch.uint8, device=device)
    symmetric.rendezvous(place, group)
    return place
