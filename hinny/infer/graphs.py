"""Decoding steps as CUDA graphs: one for each number of rows, over numbers that lie where they lay when it was made.

A step of fewer rows than its graph has is filled up with padding: no slot, no keys, no place to write to. Graphs share
their memory, for only one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hinny.infer.parts import Part

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)
"""Rows of graphs; beyond, multiples of the last difference times two."""
LEAST_PAGES = 16
UNRECORDED = 2
"""Passes before the one that is recorded: they compile kernels and fill caches."""
COLUMNS = 5


@dataclass(frozen=True)
class Steps:
    """Numbers of a step of b rows, on the device."""

    tokens: Tensor
    """(b,) int64, as all but tables."""
    positions: Tensor
    slots: Tensor
    lengths: Tensor
    places: Tensor
    tables: Tensor
    """(b m) int32."""


class _Graph:
    """A recorded step, its numbers on both sides, and its result."""

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.numbers = torch.zeros(COLUMNS, rows, dtype=torch.int64, pin_memory=pinned)
        self.tables = torch.zeros(rows, pages, dtype=torch.int32, pin_memory=pinned)
        self._there = self.numbers.to(device), self.tables.to(device)
        tokens, positions, slots, lengths, places = self._there[0].unbind(0)
        self.steps = Steps(tokens, positions, slots, lengths, places, self._there[1])
        self._filled: list[tuple[Sequence[int], int, int]] = [((), 0, -1)] * rows
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None
        self._sent: torch.cuda.Event | None = torch.cuda.Event() if pinned else None

    def fill(self, parts: Sequence[Part], page: int) -> None:
        """Take the numbers of a step over."""
        if self._sent is not None:
            # the copy of the step before must have read them
            self._sent.synchronize()
        b, numbers, tables = len(parts), self.numbers.numpy(), self.tables.numpy()
        starts = np.array([part.start for part in parts], dtype=np.int64)
        numbers[0, :b] = [part.tokens[0] for part in parts]
        numbers[1, :b], numbers[3, :b] = starts, starts + 1
        numbers[2, :b] = [part.slot for part in parts]
        numbers[:2, b:], numbers[2, b:], numbers[3, b:], numbers[4] = 0, -1, 0, -1
        changed = False
        for row, part in enumerate(parts):
            held, count, last = self._filled[row]
            # most rows have the pages that they had: a sequence's list only changes at its end
            if held is not part.pages or count != len(part.pages) or (count and last != part.pages[-1]):
                tables[row, :len(part.pages)] = part.pages
                self._filled[row], changed = (part.pages, len(part.pages), part.pages[-1] if part.pages else -1), True
        if parts[0].pages:
            numbers[4, :b] = tables[np.arange(b), starts // page].astype(np.int64) * page + starts % page
        self._there[0].copy_(self.numbers, non_blocking=True)
        if changed:
            self._there[1].copy_(self.tables, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Graphs:
    """`step` recorded for as many rows as come."""

    def __init__(self, step: Callable[[Steps], Tensor], device: torch.device) -> None:
        """step: numbers → logits (b words). On a CPU it runs as it is, over the same numbers."""
        self._step, self._device = step, device
        self._made: dict[tuple[int, int], _Graph] = {}
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, parts: Sequence[Part], page: int) -> Tensor:
        """Logits (len(parts), words) of parts of one token each; overwritten by the next run."""
        rows = padded_rows(len(parts))
        pages = max(LEAST_PAGES, 1 << (max(len(part.pages) for part in parts) - 1).bit_length())
        graph = self._made.get((rows, pages))
        if graph is None:
            graph = self._made[rows, pages] = _Graph(rows, pages, self._device)
        graph.fill(parts, page)
        if self._device.type != "cuda":
            return self._step(graph.steps)[:len(parts)]
        if graph.graph is None:
            self._record(graph)
        assert graph.graph is not None
        assert graph.result is not None
        graph.graph.replay()
        return graph.result[:len(parts)]

    def _record(self, graph: _Graph) -> None:
        """Not before it has run as it is: on a step's numbers that write nowhere, which must not be run twice."""
        kept = [v.clone() for v in (graph.steps.slots, graph.steps.places, graph.steps.lengths)]
        graph.steps.slots.fill_(-1)
        graph.steps.places.fill_(-1)
        graph.steps.lengths.zero_()
        aside, now = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(UNRECORDED):
                self._step(graph.steps)
        now.wait_stream(aside)
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made, pool=self._memory, capture_error_mode="thread_local"):
            graph.result = self._step(graph.steps)
        graph.graph = made
        for place, old in zip((graph.steps.slots, graph.steps.places, graph.steps.lengths), kept, strict=True):
            place.copy_(old)


def padded_rows(rows: int) -> int:
    """Rows of the graph that serves so many."""
    if rows <= ROWS[-1]:
        return next(n for n in ROWS if n >= rows)
    return -(-rows // 16) * 16
