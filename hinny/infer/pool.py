"""The memory of all sequences: pages of keys and values for attention layers, slots of states for Mamba layers.

A page has the keys of some tokens of one sequence, a slot the states of one sequence; who has which is the scheduler's
business. Each lies as the kernels read it: a page of a head in one piece, all layers of a slot one behind the other, so
that a sequence's state is copied in one go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hinny.errors import ConfigError
from hinny.model import Model
from hinny.ops.decode import STATE_DTYPES
from hinny.state import KVState, SSMState


@dataclass(frozen=True)
class Pages:
    """Keys and values of an attention layer."""

    k: Tensor
    """(pages g page p)."""
    v: Tensor


@dataclass(frozen=True)
class Slots:
    """States of a Mamba layer."""

    ssm: Tensor
    """(slots h p n) or (slots d n), in the pool's type for states; a view of what all layers of its shape share."""
    conv: Tensor
    """(slots ch w-1)."""


class Pool:
    """Pools for each layer of a model, on its device."""

    def __init__(self, model: Model, slots: int, pages: int, page: int, state_dtype: torch.dtype | None = None) -> None:
        """slots, pages: how many; page: tokens of a page; state_dtype: of SSM states, None for the model's own, which
        is float32 or, of a float64 model, float64. ConfigError for another type than ops.mamba2_update takes.
        """
        if state_dtype is not None and state_dtype not in (*STATE_DTYPES, torch.float64):
            raise ConfigError(f"state_dtype is {state_dtype}; it must be one of {', '.join(map(str, STATE_DTYPES))}.")
        self.page = page
        shapes, device = model.init_state(1, device="meta").layers, model.embedding.weight.device
        # a layer's keys have the type of what flows between the layers
        flowing = model.embedding.weight.dtype
        self._stacks: list[Tensor] = []
        found: dict[int, Pages | Slots | None] = dict.fromkeys(range(len(shapes)))
        states = {i: layer for i, layer in enumerate(shapes) if isinstance(layer, SSMState)}
        for kind in {(layer.ssm.shape, layer.conv.shape): None for layer in states.values()}:
            members = [i for i, layer in states.items() if (layer.ssm.shape, layer.conv.shape) == kind]
            own = states[members[0]]
            dtype = own.ssm.dtype if state_dtype is None else state_dtype
            ssm, conv = (torch.zeros(slots, len(members), *shape[1:], dtype=of, device=device)
                         for shape, of in zip(kind, (dtype, own.conv.dtype), strict=True))
            self._stacks += [ssm, conv]
            found |= {i: Slots(ssm[:, n], conv[:, n]) for n, i in enumerate(members)}
        for i, layer in enumerate(shapes):
            if isinstance(layer, KVState):
                _, _, g, p = layer.k.shape
                # zeros: a page is read whole, and what counts nothing must still be a number
                k, v = (torch.zeros(pages, g, page, p, dtype=flowing, device=device) for _ in "kv")
                found[i] = Pages(k, v)
        self.layers = list(found.values())

    def tensors(self) -> Iterator[Tensor]:
        """All of the memory."""
        yield from self._stacks
        for layer in self._paged():
            yield from (layer.k, layer.v)

    @property
    def slot_bytes(self) -> int:
        """Of one sequence's states."""
        return sum(stack[0].nbytes for stack in self._stacks)

    @property
    def page_bytes(self) -> int:
        """Of one page, in all layers."""
        return sum(layer.k[0].nbytes + layer.v[0].nbytes for layer in self._paged())

    def clear_slot(self, slot: int) -> None:
        """Zeros: the state before a first token."""
        for stack in self._stacks:
            stack[slot].zero_()

    def copy_slot(self, source: int, target: int) -> None:
        """The states of one sequence over those of another."""
        for stack in self._stacks:
            stack[target].copy_(stack[source])

    def copy_page(self, source: int, target: int) -> None:
        """A page over another, in all layers."""
        for layer in self._paged():
            layer.k[target].copy_(layer.k[source])
            layer.v[target].copy_(layer.v[source])

    def _paged(self) -> list[Pages]:
        return [layer for layer in self.layers if isinstance(layer, Pages)]
