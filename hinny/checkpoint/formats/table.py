"""Name tables: which tensors of a foreign checkpoint hold which weights of ours, and how.

A format is a list of rows. The same rows read a checkpoint (`Layout.split`) and write one (`Layout.join`), merge the
shards of tensor-parallel ranks (`Cut.merge`) and make them (`Cut.shards`). So what goes out is what comes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Layout(ABC):
    """How one of their tensors holds some of ours."""

    @abstractmethod
    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Their tensor, from ours. Also shapes alone: meta tensors do."""

    @abstractmethod
    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Ours, of these shapes, from their tensor, which has the shape that `join` would give."""


@dataclass(frozen=True)
class Stacked(Layout):
    """Ours one after the other along axis 0; one alone is the same tensor. unit: with an axis of 1 behind the first."""

    unit: bool = False

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        theirs = ours[0] if len(ours) == 1 else torch.cat(list(ours))
        return theirs.unsqueeze(1) if self.unit else theirs

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        theirs = theirs.squeeze(1) if self.unit else theirs
        return list(theirs.split([shape[0] for shape in shapes]))


@dataclass(frozen=True)
class Interleaved(Layout):
    """Megatron's query, key and value: for each key/value head its query heads, then the key, then the value."""

    kv_heads: int

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        columns = ours[0].shape[1]
        grouped = [v.reshape(self.kv_heads, -1, columns) for v in ours]
        return torch.cat(grouped, 1).view(-1, columns)

    def split(self, theirs: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        grouped = theirs.reshape(self.kv_heads, -1, theirs.shape[1])
        parts = grouped.split([shape[0] // self.kv_heads for shape in shapes], 1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class Cut(ABC):
    """How tensor-parallel ranks share one of their tensors."""

    @abstractmethod
    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor. Raises ValueError where the shards contradict each other."""

    @abstractmethod
    def shards(self, whole: Tensor, ranks: int) -> list[Tensor]:
        """What each rank holds, views of `whole` where that is possible. Raises ValueError where `ranks` does not
        divide it."""


@dataclass(frozen=True)
class Replicated(Cut):
    """Every rank has all of it."""

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        for rank, shard in enumerate(shards):
            if not torch.equal(shard, shards[0]):
                raise ValueError(f"rank {rank} has another copy than rank 0 of what every rank must have alike")
        return shards[0]

    def shards(self, whole: Tensor, ranks: int) -> list[Tensor]:
        return [whole] * ranks


@dataclass(frozen=True)
class Along(Cut):
    """Equal parts along an axis. blocks: along axis 0 each of these shares (in any unit, of the whole) is cut by
    itself, and a rank has its part of every block: what is stacked stays stacked on each rank."""

    axis: int = 0
    blocks: tuple[int, ...] = (1,)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        parts = [self._blocks(shard) for shard in shards]
        return torch.cat([part[i] for i in range(len(self.blocks)) for part in parts], self.axis)

    def shards(self, whole: Tensor, ranks: int) -> list[Tensor]:
        blocks = self._blocks(whole)
        for block in blocks:
            if block.shape[self.axis] % ranks:
                raise ValueError(f"{block.shape[self.axis]} rows or columns cannot be shared by {ranks} ranks")
        cut = [block.chunk(ranks, self.axis) for block in blocks]
        # one block alone needs no copy
        return [parts[0] if len(parts) == 1 else torch.cat(parts, self.axis) for parts in zip(*cut, strict=True)]

    def _blocks(self, v: Tensor) -> tuple[Tensor, ...]:
        size, total = v.shape[self.axis], sum(self.blocks)
        if any(size * share % total for share in self.blocks):
            raise ValueError(f"{size} rows or columns cannot be cut in shares of {self.blocks}")
        return v.split([size * share // total for share in self.blocks], self.axis)


REPLICATED = Replicated()
STACKED = Stacked()


@dataclass(frozen=True)
class Row:
    """One of their tensors.

    theirs   its name there
    ours     names in our model's state dict, in the order in which the tensor holds them
    layout   how
    cut      how tensor-parallel ranks share it, in formats that have such
    padded   rows may follow those of ours (a vocabulary made longer): they are dropped, and not made again
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = STACKED
    cut: Cut = field(default=REPLICATED)
    padded: bool = False
