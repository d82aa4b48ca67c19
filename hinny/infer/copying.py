"""Rows of the pools for sequences, with states copied into them. A copy spares work; where one fails, it is done."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hinny.checkpoint.ranks import RankFailure
from hinny.infer.pages import Copies, Memory
from hinny.infer.sequence import Continuation
from hinny.infer.stats import Tally

logger = logging.getLogger(__name__)


class Copying:
    """Takes rows for sequences and has states copied. A copy that fails is counted, the first one told, and its rows
    are free again; RankFailure, behind which nothing can be run, is raised."""

    def __init__(self, memory: Memory, copies: Copies, tally: Tally, *, recurrent: bool) -> None:
        """recurrent: slots hold states; else only pages do."""
        self.memory, self.copies, self.tally, self.recurrent = memory, copies, tally, recurrent

    def take(self, sequence: Continuation, source: int | None, pages: Sequence[int], held: int, more: int) -> bool:
        """Rows for a sequence; False, and none, if a copy fails. Its state is the one of slot `source`, None for that
        before a first token; of the `pages` that hold so many tokens whole ones are shared and one begun is copied.
        Without a state that could be copied, an exception is the runner's own."""
        memory = self.memory
        full, part = divmod(held, memory.page) if memory.pages.total else (0, 0)
        own, slot = [*pages[:full]], memory.slots.take()
        memory.pages.share(own)
        own += [memory.pages.take() for _ in range(more)]
        try:
            if part:
                self.copies.copy_page(pages[full], own[full])
            if self.recurrent and source is not None:
                self.copies.copy_slot(source, slot)
            elif self.recurrent:
                self.copies.clear_slot(slot)
        except Exception as error:
            memory.pages.release(own)
            memory.slots.release((slot,))
            if not held:
                raise
            self._do_without(error)
            return False
        sequence.slot, sequence.pages, sequence.held = slot, own, held
        return True

    def copied(self, sequence: Continuation) -> int | None:
        """A slot with its state; None if the copy fails."""
        assert sequence.slot is not None
        slot = self.memory.slots.take()
        try:
            self.copies.copy_slot(sequence.slot, slot)
        except Exception as error:
            self.memory.slots.release((slot,))
            self._do_without(error)
            return None
        return slot

    def _do_without(self, error: Exception) -> None:
        if isinstance(error, RankFailure):
            raise error
        if not self.tally.failed_copies:
            logger.warning("a copy of a sequence's state failed; requests go on without it. This is told once, and "
                           "counted (failed_copies).", exc_info=error)
        self.tally.failed_copies += 1
