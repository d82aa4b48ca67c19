"""Layers' states for one forward pass of a ragged batch: all tokens of all sequences in one row, x (1 T d).

Projections, norms and MLPs see T tokens. Where tokens of a sequence meet, in attention, convolution and SSM, the row is
cut: sequences with equally few tokens, decoding ones, go together through the pools, in place; every longer piece of a
prompt goes by itself, through the layer's own mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hinny import ops
from hinny.infer.pool import Pages, Pool, Slots
from hinny.state import KVState, LayerState, SSMState

Mix = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Few:
    """b sequences with t tokens each; all tensors on the device, so that a CUDA graph may record what is done."""

    first: int
    """Where their tokens begin in the row."""
    t: int
    slots: Tensor
    """(b,) int64; negative: padding."""
    tables: Tensor
    """(b m) int32: pages of each."""
    lengths: Tensor
    """(b,) int32: keys of each, those of these tokens included; 0: padding."""

    def of(self, x: Tensor) -> Tensor:
        """Their part of x (1 T ...): (b t ...)."""
        return x[0, self.first:self.first + len(self.slots) * self.t].unflatten(0, (-1, self.t))


@dataclass(frozen=True)
class Long:
    """One sequence with many tokens."""

    first: int
    t: int
    slot: int
    pages: Tensor
    """(m,) int64, on the device: the pages of its start + t keys."""
    start: int
    """Tokens that it had before."""

    def of(self, x: Tensor) -> Tensor:
        """Its part of x (1 T ...): (1 t ...)."""
        return x[:, self.first:self.first + self.t]


@dataclass(frozen=True)
class Ragged:
    """The sequences of a pass in the order of their tokens."""

    few: Sequence[Few]
    long: Sequence[Long]
    positions: Tensor
    """(1 T) int64: where each token stands in its sequence."""
    places: Tensor
    """(T,) int64: page * page length + place in the page; negative for padding."""

    def layers(self, pool: Pool) -> list[LayerState]:
        """The states of a model's layers for this pass."""
        return [PooledKV(layer, self) if isinstance(layer, Pages) else PooledSSM(layer, self)
                if isinstance(layer, Slots) else None for layer in pool.layers]


class PooledKV(KVState):
    """Keys and values in pages."""

    def __init__(self, pages: Pages, batch: Ragged) -> None:
        self._pages, self._batch = pages, batch

    @property
    def start(self) -> Tensor:
        """(1 T): where each token stands."""
        return self._batch.positions

    def attend(self, mix: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As for every state: q (1 T h p), k, v (1 T g p) → (1 T h p)."""
        pages, batch = self._pages, self._batch
        ops.write_pages(k[0], v[0], pages.k, pages.v, batch.places)
        found = [ops.paged_attention(few.of(q), pages.k, pages.v, few.tables, few.lengths).flatten(0, 1)
                 for few in batch.few]
        for long in batch.long:
            if long.start:
                keys, values = (_in_order(pool, long.pages, long.start + long.t) for pool in (pages.k, pages.v))
            else:
                keys, values = long.of(k), long.of(v)
            found.append(mix(long.of(q), keys, values, segments=None, lengths=None)[0])
        return _joined(found)


class PooledSSM(SSMState):
    """States in slots."""

    def __init__(self, slots: Slots, batch: Ragged) -> None:
        super().__init__(slots.conv, slots.ssm)
        self._batch = batch

    def advance(self, mix: Mix, step: Callable[..., Tensor] | None, *tokens: Tensor) -> Tensor:
        """As for every state: tokens (1 T ...) → (1 T ...); in place."""
        found = []
        for few in self._batch.few:
            parts = [few.of(x) for x in tokens]
            y = self._gathered(mix, parts, few.slots) if step is None else step(*parts, self.ssm, self.conv, few.slots)
            found.append(y.flatten(0, 1))
        for long in self._batch.long:
            row = slice(long.slot, long.slot + 1)
            y, ssm, conv = mix(*(long.of(x) for x in tokens), self.ssm[row].to(_wide(self.ssm)), self.conv[row])
            self.ssm[row] = ssm.to(self.ssm.dtype)
            self.conv[row] = conv.to(self.conv.dtype)
            found.append(y[0])
        return _joined(found)

    def _gathered(self, mix: Mix, parts: Sequence[Tensor], slots: Tensor) -> Tensor:
        """Of a layer without a step in place: rows of the pool out, and back."""
        rows, live = slots.clamp(min=0), slots >= 0
        held = self.ssm[rows], self.conv[rows]
        y, *new = mix(*parts, held[0].to(_wide(self.ssm)), held[1])
        # padding repeats what the first live row writes, so that no two rows write different things to a place
        source = torch.where(live, torch.arange(len(slots), device=slots.device), live.int().argmax())
        for pool, old, now in zip((self.ssm, self.conv), held, new, strict=True):
            now = torch.where(live.view(-1, *[1] * (now.dim() - 1)), now.to(pool.dtype), old)
            pool.index_copy_(0, rows[source], now[source])
        return y


def _in_order(pool: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` keys (1 s g p) of a sequence in `pages` of pool (pages g page p)."""
    return pool[pages].transpose(1, 2).flatten(0, 1)[None, :length]


def _joined(found: list[Tensor]) -> Tensor:
    """Parts (t ...) one behind the other: (1 T ...)."""
    return (found[0] if len(found) == 1 else torch.cat(found))[None]


def _wide(state: Tensor) -> torch.dtype:
    """What states are computed in."""
    return torch.promote_types(state.dtype, torch.float32)
