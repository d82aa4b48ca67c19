"""What the scheduler has run: the tokens of some sequences in one forward pass, and who runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The next tokens of one sequence."""

    slot: int
    """Row of the pool of SSM states; no two parts of a pass have the same."""
    pages: Sequence[int]
    """Pages of keys, in order: room for start + len(tokens) tokens at least. The sequence's own list, which from pass
    to pass changes at its end alone."""
    start: int
    """Tokens that the sequence's state holds."""
    tokens: Sequence[int]
    """At least one."""
    wanted: int = 1
    """At so many of the last tokens logits are needed: 0 in the middle of a prompt, more than 1 behind drafts."""


class Runner(Protocol):
    """A model over pools of pages and slots. It knows nothing of requests; it changes what it is told to change."""

    page: int
    """Tokens of a page."""
    words: int
    """Tokens that may be chosen: the first so many of the model's."""

    def run(self, parts: Sequence[Part]) -> Tensor:
        """One forward pass → logits (sum of wanted, words), float32, part by part; the states are those behind it."""

    def clear_slot(self, slot: int) -> None:
        """Zeros: the state before a first token."""

    def copy_slot(self, source: int, target: int) -> None:
        """A fork or a snapshot of a sequence's SSM states."""

    def copy_page(self, source: int, target: int) -> None:
        """A page that two sequences share, before one of them writes into it."""
