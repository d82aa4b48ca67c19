"""A model over pools of pages and slots: what the scheduler plans becomes one forward pass.

    parts          some sequences' next tokens (`hinny.infer.parts`)
    few and long   parts of one to MOST_FEW tokens go together by their number, the others alone (`hinny.infer.pooled`)
    graphs         passes of one token each are CUDA graphs on a GPU (`hinny.infer.graphs`)
    lean           a pass of one token on a CPU goes by itself, in fewer operations (`hinny.infer.lean`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hinny.infer.graphs import Graphs, Steps, padded_rows
from hinny.infer.head import logits
from hinny.infer.lean import Lean, Place, fits
from hinny.infer.limits import PAGE
from hinny.infer.parts import Part
from hinny.infer.pool import Pool
from hinny.infer.pooled import Few, Long, Ragged
from hinny.infer.prepare import hidden
from hinny.infer.sums import Sums
from hinny.model import Model

MOST_FEW = 8
"""Tokens of a sequence that go through the pools in place, one after the other; more are read as a piece of text."""


class ModelRunner:
    """A `hinny.infer.parts.Runner`. The model must be ready for inference: no gradients."""

    def __init__(self, model: Model, *, slots: int, pages: int, page: int = PAGE, words: int | None = None,
                 state_dtype: torch.dtype | None = None, head: Callable[[Tensor], Tensor] | None = None,
                 sums: Sums | None = None, recorded: bool | None = None) -> None:
        """words: that may be chosen, the model's first ones, None for all; state_dtype: as for Pool; head: hidden
        (r d) → logits (r words), where it is not the model's own; sums: of a model that is cut over processes;
        recorded: steps of one token each as CUDA graphs, None: on a GPU.
        """
        self.model, self.page = model, page
        self.words = len(model.output_weight) if words is None else words
        self.device = model.embedding.weight.device
        self.pool = Pool(model, slots, pages, page, state_dtype)
        self._sums = sums
        self._head = head if head is not None else lambda rows: logits(rows, model.output_weight[:self.words])
        alone = sums is None and head is None and not recorded and fits(model, self.pool)
        self._lean = Lean(model, self.pool, self.words) if alone else None
        recorded = self.device.type == "cuda" if recorded is None else recorded
        self._graphs = Graphs(self._step, self.device) if recorded else None

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.pool.slot_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.pool.page_bytes

    @torch.no_grad()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """As for every Runner; the logits may be overwritten by the next run."""
        if self._graphs is not None and self._recordable(parts):
            return self._graphs.run(parts, self.page)
        if self._lean is not None and len(parts) == len(parts[0].tokens) == 1:
            return self._alone(self._lean, parts[0])
        order = sorted(range(len(parts)), key=lambda i: _group(parts[i]))
        ragged, tokens = self._ragged([parts[i] for i in order])
        found = self._hidden(tokens, ragged)
        ends = np.cumsum([len(parts[i].tokens) for i in order])
        at: dict[int, range] = {i: range(end - parts[i].wanted, end) for i, end in zip(order, ends.tolist(),
                                                                                       strict=True)}
        rows = [row for i in range(len(parts)) for row in at[i]]
        return self._head(found[0, torch.tensor(rows, device=self.device, dtype=torch.int64)])

    def clear_slot(self, slot: int) -> None:
        """As for every Runner."""
        self.pool.clear_slot(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """As for every Runner."""
        self.pool.copy_slot(source, target)

    def copy_page(self, source: int, target: int) -> None:
        """As for every Runner."""
        self.pool.copy_page(source, target)

    def _alone(self, lean: Lean, part: Part) -> Tensor:
        """The pass of one token of one sequence on a CPU."""
        found = lean.logits(part.tokens[0], Place(part.slot, part.pages, part.start, self.page))
        return found[None][:part.wanted]

    def _recordable(self, parts: Sequence[Part]) -> bool:
        """Whether a graph stands for this pass: one token each, and no sums that graphs may not record."""
        weight = self.model.embedding.weight
        return (all(len(part.tokens) == part.wanted == 1 for part in parts)
                and (self._sums is None
                     or self._sums.recordable(padded_rows(len(parts)), weight.shape[1], weight.dtype)))

    def _hidden(self, tokens: Tensor, batch: Ragged) -> Tensor:
        """tokens (1 T) → (1 T d)."""
        return hidden(self.model, tokens, batch.layers(self.pool), self._sums)

    def _step(self, steps: Steps) -> Tensor:
        """Logits (b words) of b sequences' next tokens, all of whose numbers are on the device."""
        few = Few(0, 1, steps.slots, steps.tables, steps.lengths.int())
        return self._head(self._hidden(steps.tokens[None], Ragged([few], [], steps.positions[None], steps.places))[0])

    def _ragged(self, parts: Sequence[Part]) -> tuple[Ragged, Tensor]:
        """The pass of parts that are in the order of `_group`, and its tokens (1 T)."""
        tokens, positions, places = [], [], []
        for part in parts:
            stand = np.arange(part.start, part.start + len(part.tokens))
            tokens.append(np.asarray(part.tokens, dtype=np.int64))
            positions.append(stand)
            if len(part.pages):
                places.append(np.asarray(part.pages, dtype=np.int64)[stand // self.page] * self.page
                              + stand % self.page)
            else:
                places.append(np.full(len(stand), -1))
        moved = self._moved(np.stack([np.concatenate(tokens), np.concatenate(positions), np.concatenate(places)]))
        few, long, first = [], [], 0
        groups: dict[int, list[Part]] = {}
        for part in parts:
            if _group(part) <= MOST_FEW:
                groups.setdefault(len(part.tokens), []).append(part)
        for t, members in groups.items():
            few.append(self._few(first, t, members))
            first += t * len(members)
        for part in parts[sum(map(len, groups.values())):]:
            used = -(-(part.start + len(part.tokens)) // self.page)
            pages = self._moved(np.asarray(part.pages[:used] if part.start else [], dtype=np.int64))
            long.append(Long(first, len(part.tokens), part.slot, pages, part.start))
            first += len(part.tokens)
        return Ragged(few, long, moved[1:2], moved[2]), moved[:1]

    def _few(self, first: int, t: int, parts: Sequence[Part]) -> Few:
        tables = np.zeros((len(parts), max(1, max(len(part.pages) for part in parts))), dtype=np.int32)
        for row, part in zip(tables, parts, strict=True):
            row[:len(part.pages)] = part.pages
        slots = self._moved(np.array([part.slot for part in parts], dtype=np.int64))
        lengths = self._moved(np.array([part.start + t for part in parts], dtype=np.int32))
        return Few(first, t, slots, self._moved(tables), lengths)

    def _moved(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


def _group(part: Part) -> int:
    """Parts of one group go through the pools together: those of as many tokens, if they are few."""
    return min(len(part.tokens), MOST_FEW + 1)
