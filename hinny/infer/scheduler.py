"""Which sequences run which tokens next: admission, prompts in chunks, drafts, pre-emption. No tensors here."""

from __future__ import annotations

from bisect import insort

from hinny.infer.copying import Copying
from hinny.infer.drafts import Lookup
from hinny.infer.limits import Limits
from hinny.infer.marks import alike
from hinny.infer.pages import Copies, Memory
from hinny.infer.prefixes import Match, Prefixes
from hinny.infer.sequence import Continuation, Work, arrival
from hinny.infer.stats import Tally

MOST_PENDING = 8
"""Known tokens that a state must catch up with, beyond which no drafts are added to them."""


class Scheduler:
    """Sequences that run and that wait. It changes their rows, and has rows copied, but never their tokens."""

    def __init__(self, memory: Memory, prefixes: Prefixes, copies: Copies, limits: Limits) -> None:
        self.memory, self.prefixes, self.limits = memory, prefixes, limits
        self.recurrent = prefixes.recurrent
        self.running: list[Continuation] = []
        self.waiting: list[Continuation] = []
        """Both in order of arrival."""
        self.tally = Tally()
        self.copying = Copying(memory, copies, self.tally, recurrent=self.recurrent)
        self.at_fault: Continuation | None = None
        """Whose slot could not be cleared, if that is why `schedule` raised."""

    def add(self, sequence: Continuation) -> None:
        """Let it wait for a place."""
        insort(self.waiting, sequence, key=arrival)

    def schedule(self) -> list[Work]:
        """The next pass: a token or more of every sequence that writes, then prompts, as long as tokens are left.
        Where a slot cannot be cleared it raises, with all rows as they were: without the one `at_fault` it can be tried
        again."""
        work: list[Work] = []
        self.at_fault = None
        try:
            self._plan(work)
        except Exception:
            for each in work:
                self.undo(each)
            raise
        return work

    def _plan(self, work: list[Work]) -> None:
        left = self.limits.step_tokens
        writing = [s for s in self.running if not s.reading]
        for behind, sequence in zip(range(len(writing) - 1, -1, -1), writing, strict=True):
            if sequence.slot is not None and (turn := self._write(sequence, left - behind)):
                work.append(turn)
                left -= len(turn.tokens)
        for sequence in self.running:
            if sequence.reading and left:
                work.append(self._read(sequence, left))
                left -= len(work[-1].tokens)
        # who waits for another's reading lets the next ones pass
        place, most = 0, self.limits.sequences
        while place < min(len(self.waiting), most) and len(self.running) < most:
            sequence = self.waiting[place]
            match = self.prefixes.match(sequence.tokens, len(sequence.tokens) - 1, sequence.marks)
            if ahead := self._ahead(sequence, match):
                other, at = ahead
                other.cuts.add(at)
                left += sum(each.end_at(at) for each in work if each.sequence is other)
                place += 1
                continue
            if not left or not self._admit(sequence, match):
                break
            del self.waiting[place]
            insort(self.running, sequence, key=arrival)
            work.append(self._read(sequence, left))
            left -= len(work[-1].tokens)

    def done(self, work: Work, right: int) -> None:
        """After the pass: the state holds its tokens. right: drafts that were, all before the first wrong one."""
        sequence = work.sequence
        self.tally.drafted += work.drafts
        self.tally.accepted += right
        if right == work.drafts:
            sequence.held += len(work.tokens)
        elif not self.recurrent:
            sequence.held += len(work.tokens) - work.drafts + right
        if work.spare is not None:
            if right < work.drafts:
                assert sequence.slot is not None
                sequence.slot, work.spare = work.spare, sequence.slot
            self.memory.slots.release((work.spare,))
            work.spare = None
        if sequence.reading:
            self.tally.read += len(work.tokens)
            ready = sequence.held == len(sequence.tokens)
            sequence.reading = not ready
            if sequence.held in sequence.cuts or (ready and not self.recurrent):
                self._snapshot(sequence)

    def undo(self, work: Work) -> None:
        """After a pass that failed: give up the spare slot; nobody knows what the others hold."""
        if work.spare is not None:
            self.memory.slots.release((work.spare,))
            work.spare = None

    def fork(self, parent: Continuation, child: Continuation) -> bool:
        """Let `child` go on from the parent's state, which holds the whole prompt. Whether it does: there may be no
        room, or the copy fails."""
        memory = self.memory
        child.begun, child.cached = True, parent.cached
        part = parent.held % memory.page if memory.pages.total else 0
        if len(self.running) >= self.limits.sequences or not self.prefixes.make_room(bool(part), 1):
            return False
        if not self.copying.take(child, parent.slot, parent.pages, parent.held, int(bool(part))):
            return False
        child.reading = False
        insort(self.running, child, key=arrival)
        return True

    def end(self, sequence: Continuation, *, keep: bool) -> None:
        """Take its rows; keep: its state goes to the prefix cache, as it is, for a prompt that begins with its text."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        tokens = sequence.tokens[:sequence.held]
        if keep and self.prefixes.lacks(tokens, sequence.marks):
            self.prefixes.keep(tokens, sequence.pages[:self.memory.needed(len(tokens))],
                               sequence.slot if self.recurrent else None, sequence.marks)
        self.running.remove(sequence)
        self._release(sequence)

    def _write(self, sequence: Continuation, most: int) -> Work | None:
        """The next tokens of a sequence that writes; None: it was pre-empted, for want of a page."""
        held, known = sequence.held, len(sequence.tokens)
        pending = known - held
        if pending > most:  # tokens behind a wrong draft, more than others leave room for
            pending, known = most, held + most
        if self.memory.pages.total and not self._pages(sequence, known):
            return None
        if known < len(sequence.tokens):
            return Work(sequence, sequence.tokens[held:known], 0)
        if sequence.lookup and pending <= MOST_PENDING:
            return self._guess(sequence, sequence.lookup, min(self.limits.drafts, most - pending, sequence.left - 1))
        return Work(sequence, sequence.tokens[held:], 1)

    def _guess(self, sequence: Continuation, lookup: Lookup, most: int) -> Work:
        """The known tokens and up to `most` drafts, for which no other sequence has to give up anything."""
        known, spare = sequence.tokens[sequence.held:], None
        work = Work(sequence, known, 1)
        promised = bool(self.waiting) and len(self.running) < self.limits.sequences
        if most < 1 or (self.recurrent and self.memory.slots.free <= promised):
            return work
        for token in sequence.tokens[len(lookup.tokens):]:
            lookup.append(token)
        guesses = lookup.propose(most)
        pages = self.memory.needed(len(sequence.tokens) + len(guesses)) - len(sequence.pages)
        if not guesses or pages > self.memory.pages.free:
            return work
        if self.recurrent and (spare := self.copying.copied(sequence)) is None:
            return work
        sequence.pages += [self.memory.pages.take() for _ in range(pages)]
        work.tokens, work.drafts, work.wanted, work.spare = known + guesses, len(guesses), 1 + len(guesses), spare
        return work

    def _read(self, sequence: Continuation, most: int) -> Work:
        """The next chunk of tokens known before: up to a cut, and at most so many."""
        held, known = sequence.held, len(sequence.tokens)
        to = min([held + most, known, *(cut for cut in sequence.cuts if cut > held)])
        return Work(sequence, sequence.tokens[held:to], int(to == known))

    def _pages(self, sequence: Continuation, tokens: int) -> bool:
        """Give it pages for so many tokens, pre-empting the newest if need be. False: it was that one itself."""
        more = self.memory.needed(tokens) - len(sequence.pages)
        if more <= 0:
            return True
        while not self.prefixes.make_room(more, 0):
            newest = self.running.pop()
            self.tally.preemptions += 1
            self._release(newest)
            self.add(newest)
            if newest is sequence:
                return False
        sequence.pages += [self.memory.pages.take() for _ in range(more)]
        return True

    def _release(self, sequence: Continuation) -> None:
        """Its rows are others' to take; what it has read and written stays known, to be read again."""
        assert sequence.slot is not None
        self.memory.pages.release(sequence.pages)
        self.memory.slots.release((sequence.slot,))
        sequence.pages, sequence.slot, sequence.held, sequence.reading = [], None, 0, True
        sequence.cuts.clear()

    def _ahead(self, sequence: Continuation, match: Match) -> tuple[Continuation, int] | None:
        """Who is reading what this one begins with too, and to where: this one can go on from a state kept there.
        Every such place is passed, so that nobody waits for ever."""
        worth, tokens = self.prefixes.worth, sequence.tokens
        if self.prefixes.most == 0:
            return None
        for other in self.running:
            if other.reading and other.tokens[:worth] == tokens[:worth]:
                same = min(len(tokens) - 1, alike(tokens, sequence.marks, other.tokens, other.marks))
                if same - match.held >= worth and same > other.held:
                    return other, same
        return None

    def _admit(self, sequence: Continuation, match: Match) -> bool:
        """Give it a slot and pages for all its tokens and one more, if there is room; with a prefix held already."""
        if not self._start(sequence, match):
            # the cached state itself may be what takes the room, or cannot be copied
            if not match.entry or not self._start(sequence, Match(known=match.known)):
                return False
            match = Match(known=match.known)
        if len(sequence.tokens) == sequence.prompt:
            self._begin(sequence, match)
        return True

    def _begin(self, sequence: Continuation, match: Match) -> None:
        """Count a prompt that is begun, if it was not before, and say where snapshots of it are wanted."""
        if not sequence.begun:
            sequence.begun, sequence.cached = True, match.held
            self.tally.prompts += 1
            self.tally.hits += match.held > 0
            self.tally.prompt_tokens += sequence.prompt
            self.tally.cached += match.held
        if self.recurrent and self.prefixes.most != 0:
            prompt = sequence.request.prompt
            # a prompt that comes again needs the state before its last token: that one must be run for logits
            for cut in {match.known, len(prompt) - 1}:
                if cut - match.held >= self.prefixes.worth and self.prefixes.lacks(prompt[:cut], sequence.marks):
                    sequence.cuts.add(cut)
            self.prefixes.learn(prompt, sequence.marks)

    def _start(self, sequence: Continuation, match: Match) -> bool:
        """Rows for a sequence, the ones of `match` copied or shared. False, and nothing changed, without room or if
        a copy fails."""
        memory, entry = self.memory, match.entry
        full, part = divmod(match.held, memory.page) if memory.pages.total else (0, 0)
        more = memory.needed(len(sequence.tokens) + 1) - full
        lent = entry.pages[:full + bool(part)] if entry else ()
        snapshot = (entry.slot,) if entry and entry.slot is not None else ()
        memory.pages.share(lent)
        memory.slots.share(snapshot)
        # a page for each that writes: who is let in only to be pre-empted reads for nothing
        reserve = len(self.running) if memory.pages.total else 0
        try:
            room = memory.pages.available >= more + reserve and self.prefixes.make_room(more, 1)
            if room:
                self.at_fault = sequence
                room = self.copying.take(sequence, entry.slot if entry else None, lent, match.held, more)
                self.at_fault = None
        finally:
            memory.pages.release(lent)
            memory.slots.release(snapshot)
        return room

    def _snapshot(self, sequence: Continuation) -> None:
        """Keep the state of a sequence that goes on from it, if there is a slot for it and it can be copied."""
        tokens, slot = sequence.tokens[:sequence.held], None
        if not self.prefixes.lacks(tokens, sequence.marks):
            return
        if self.recurrent and (not self.prefixes.make_place() or (slot := self.copying.copied(sequence)) is None):
            return
        self.prefixes.keep(tokens, sequence.pages[:self.memory.needed(len(tokens))], slot, sequence.marks)
        if slot is not None:
            self.memory.slots.release((slot,))
