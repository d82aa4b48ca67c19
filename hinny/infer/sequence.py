"""A continuation at work: what it has read and written, and which rows of the pools are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hinny.infer.marks import Marks
from hinny.infer.request import Request

if TYPE_CHECKING:
    from hinny.infer.delivery import Writing
    from hinny.infer.drafts import Lookup
    from hinny.infer.sampler import Chooser


class Continuation:
    """One of a request's n continuations. The scheduler changes its rows and `held`, the core its tokens."""

    __slots__ = ("_marks", "begun", "cached", "chooser", "cuts", "forks", "held", "index", "lookup", "number", "order",
                 "pages", "prompt", "reading", "request", "slot", "tokens", "writing")

    def __init__(self, number: int, index: int, request: Request, chooser: Chooser, writing: Writing,
                 lookup: Lookup | None = None) -> None:
        """number: of the request; index: of the continuation, 0 to n - 1; lookup: None where nothing is guessed."""
        self.number, self.index, self.request = number, index, request
        self.chooser, self.writing, self.lookup = chooser, writing, lookup
        self.order = (number, index)
        """Of arrival: who comes earlier is served first and pre-empted last."""
        self.tokens = list(request.prompt)
        """The prompt and what was written: never fewer, whatever happens to the state."""
        self._marks = Marks()
        self.prompt = len(request.prompt)
        self.held = 0
        """Tokens that the state holds: the first so many."""
        self.pages: list[int] = []
        self.slot: int | None = None
        """None: waits."""
        self.reading = True
        """Tokens known before are being read; False: each step writes at least one."""
        self.cuts: set[int] = set()
        """Where a snapshot is wanted: no step reads across such a place."""
        self.forks: list[Continuation] = []
        """Continuations of the same prompt, until it has been read."""
        self.begun = False
        """Its prompt has been counted: of n continuations with the first one, and once, also if its reading is cut off
        by a pre-emption and begins again."""
        self.cached = 0
        """Tokens of the prompt that were not read at its first reading."""

    @property
    def marks(self) -> Sequence[bytes]:
        """Of the tokens: made as these come, so that looking for a long prompt again and again costs nothing."""
        return self._marks.of(self.tokens)

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.prompt + self.request.max_tokens - len(self.tokens)


@dataclass(slots=True)
class Work:
    """The next tokens of a sequence in a pass."""

    sequence: Continuation
    tokens: list[int]
    """Known ones, then drafts."""
    wanted: int
    """At so many of the last tokens logits are needed."""
    drafts: int = 0
    """So many of the last tokens are guesses."""
    spare: int | None = None
    """Slot of the state before this pass, should a draft be wrong."""

    def end_at(self, place: int) -> int:
        """Read no further than to this place of the sequence → tokens that are left out for it."""
        more = max(0, self.sequence.held + len(self.tokens) - place)
        if more:
            del self.tokens[-more:]
            self.wanted = 0
        return more


def arrival(sequence: Continuation) -> tuple[int, int]:
    """What sequences are ordered by."""
    return sequence.order
