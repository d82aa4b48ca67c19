"""A runner whose model is a hash of every token that a sequence's state has seen: any mistake changes the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hinny.infer.parts import Part
from hinny.tokenizer import ByteTokenizer

WORDS = ByteTokenizer().vocab_size
EMPTY = (0, 0, ())
"""State of a slot: tokens seen, a hash of them, the last few."""
AGO = 5
"""The model often repeats the token that stands so far back, so that guesses come true."""


class FakeRunner:
    """`parts.Runner` over integers. `recurrent`: its slots count; pages 0: no pages do."""

    def __init__(self, slots: int, pages: int, page: int = 8, *, recurrent: bool = True, draws: int = 499) -> None:
        self.page, self.words, self.recurrent, self.paged = page, WORDS, recurrent, pages > 0
        self._slots: list[tuple[int, int, tuple[int, ...]]] = [(-1, -1, ())] * slots
        self._pages = [[-1] * page for _ in range(pages)]
        self._stale = -2
        self._table = torch.randn(draws, WORDS, generator=torch.Generator().manual_seed(0))
        self.failures: set[int] = set()
        """Passes, counted from 0, that raise in the middle."""
        self.copy_failures: set[int] = set()
        """Copies and clearings of rows, counted from 0, that raise before they are done."""
        self.counts: Counter[str] = Counter()

    def run(self, parts: Sequence[Part]) -> Tensor:
        assert parts
        assert len({part.slot for part in parts}) == len(parts)
        self.counts["passes"] += 1
        rows = []
        for i, part in enumerate(parts):
            if i and self.counts["passes"] - 1 in self.failures:
                raise RuntimeError("the machine is on fire")
            rows += self._part(part)
        return torch.stack(rows) if rows else torch.empty(0, WORDS)

    def clear_slot(self, slot: int) -> None:
        self._changed()
        self._slots[slot] = EMPTY

    def copy_slot(self, source: int, target: int) -> None:
        assert self.recurrent
        assert source != target
        self._changed()
        self._slots[target] = self._slots[source]
        self.counts["slot copies"] += 1

    def copy_page(self, source: int, target: int) -> None:
        assert source != target
        self._changed()
        self._pages[target] = self._pages[source].copy()
        self.counts["page copies"] += 1

    def _changed(self) -> None:
        self.counts["changes"] += 1
        if self.counts["changes"] - 1 in self.copy_failures:
            raise torch.OutOfMemoryError("no room for a copy")

    def _part(self, part: Part) -> list[Tensor]:
        assert 0 <= part.wanted <= len(part.tokens)
        assert len(part.tokens) > 0
        self.counts["tokens"] += len(part.tokens)
        keys: tuple[int, ...] = ()
        if self.paged:
            keys = self._keys(part)
        rows = []
        for i, token in enumerate(part.tokens):
            seen, summary, last = EMPTY
            if self.recurrent:
                seen, summary, last = self._slots[part.slot]
                assert seen == part.start + i, "the slot holds other tokens than the sequence thinks"
                summary, last = hash((summary, token)), (*last, token)[-AGO:]
                self._slots[part.slot] = seen + 1, summary, last
            if i >= len(part.tokens) - part.wanted:
                rows.append(self._logits(summary, last, keys[:part.start + i + 1]))
        return rows

    def _keys(self, part: Part) -> tuple[int, ...]:
        """Write the tokens into their pages → all tokens of the sequence; what was behind them is poisoned."""
        assert len(part.pages) * self.page >= part.start + len(part.tokens)
        assert len(set(part.pages)) == len(part.pages)
        for at, token in enumerate(part.tokens, part.start):
            where, page = at % self.page, self._pages[part.pages[at // self.page]]
            page[where] = token
            for behind in range(where + 1, self.page):
                self._stale -= 1
                page[behind] = self._stale
        found = [token for number in part.pages for token in self._pages[number]]
        return tuple(found[:part.start + len(part.tokens)])

    def _logits(self, summary: int, last: tuple[int, ...], keys: tuple[int, ...]) -> Tensor:
        draw = hash((summary, keys))
        row = self._table[draw % len(self._table)]
        last = last or keys[-AGO:]
        if draw % 5 and len(last) == AGO:
            row = row.clone()
            row[last[0] % WORDS] += 6
        return row
