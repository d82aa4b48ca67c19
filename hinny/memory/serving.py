"""The pools of an engine that serves many sequences: bytes of a slot and of a page, and how many fit.

    slot   the states of one sequence: SSM states in `state_width` bytes a number, convolutions' inputs in float32
    page   keys and values of `page` tokens of all attention layers, in the weights' type

Sequences at work each have a slot, and a spare one where drafts are tried; snapshots of the prefix cache have the rest.
No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from hinny import counts
from hinny.config import ModelConfig
from hinny.errors import ConfigError

CONV_WIDTH = 4
"""Bytes of a number of a convolution's state."""


@dataclass(frozen=True)
class PoolSizes:
    """What an engine has for sequences."""

    slots: int
    pages: int
    page: int
    """Tokens of a page."""
    slot_bytes: int
    page_bytes: int

    @property
    def bytes(self) -> int:
        """Of both pools."""
        return self.slots * self.slot_bytes + self.pages * self.page_bytes


def pool_sizes(model: ModelConfig, *, sequences: int, context: int, snapshots: int, drafts: bool, page: int,
               width: int = 2, state_width: int = 4, ranks: int = 1, budget: int | None = None) -> PoolSizes:
    """Slots for `sequences` at work and `snapshots`, and pages for all sequences at `context` tokens, or as many as
    `budget` bytes leave room for.

    width: bytes of a key's number; ranks: processes among which heads are cut, the figures being one's. ConfigError
    where the budget does not hold one sequence of `context` tokens beside the slots.
    """
    slot, page_size = slot_bytes(model, state_width=state_width) // ranks, page * kv_bytes(model, width) // ranks
    each, slots = -(-context // page), sequences + ((snapshots + sequences * drafts) if slot else 0)
    if not page_size:
        pages = 0
    elif budget is None:
        pages = sequences * each
    else:
        pages = max(0, budget - slots * slot) // page_size
    sizes = PoolSizes(slots, pages, page, slot, page_size)
    if budget is not None and (sizes.bytes > budget or (page_size and pages < each)):
        least = slots * slot + each * page_size
        raise ConfigError(f"memory is {budget:,} bytes, but {slots} states of {slot:,} and the keys of one sequence of "
                          f"{context:,} tokens need {least:,}. Give more memory, or lower sequences, snapshots or "
                          "context.")
    return sizes


def slot_bytes(model: ModelConfig, *, state_width: int = 4) -> int:
    """Of the states of one sequence."""
    return counts.state_bytes(model, dtype_bytes=state_width, conv_dtype_bytes=CONV_WIDTH)


def kv_bytes(model: ModelConfig, width: int = 2) -> int:
    """Of the keys and values of one token."""
    return counts.kv_bytes_per_token(model, dtype_bytes=width)
