"""A micro-batch in segments (train.segment_len): each begins with the states that the one before it left."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hinny.state import Carried

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Tokens, targets, mask and documents, each (b t); None where documents see each other."""


def in_segments(micro_batch: Inputs, length: int, carried: Carried) -> Iterator[tuple[Inputs, Carried]]:
    """The segments of `length` tokens, in order, each with what it carries; the first has `carried`.

    A segment must have run through the model when the next one is asked for. A document that goes on over the edge
    keeps its state; one that begins there starts from zeros.
    """
    documents = micro_batch[3]
    for start in range(0, micro_batch[0].shape[1], length):
        if start:
            carried = carried.onward(None if documents is None else documents[:, start] != documents[:, start - 1])
        here = slice(start, start + length)
        tokens, targets, mask = (part[:, here].contiguous() for part in micro_batch[:3])
        yield (tokens, targets, mask, None if documents is None else documents[:, here].contiguous()), carried
