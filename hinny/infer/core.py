"""The engine's core: requests go in, and each step one forward pass serves all that are at work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from hinny.checkpoint.ranks import RankFailure
from hinny.errors import RequestError
from hinny.infer.delivery import Writing
from hinny.infer.drafts import Lookup
from hinny.infer.limits import Limits
from hinny.infer.pages import Memory
from hinny.infer.parts import Part, Runner
from hinny.infer.prefixes import WORTH, Prefixes
from hinny.infer.request import Choice, Delivery, Request
from hinny.infer.sampler import Chooser, LogitsError, choose
from hinny.infer.scheduler import Scheduler
from hinny.infer.sequence import Continuation, Work
from hinny.infer.stats import Stats
from hinny.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Turn:
    """A sequence that writes in this step, and where its logits are."""

    sequence: Continuation
    work: Work
    """A fork's is that of the sequence it came from."""
    first: int


class Core:
    """All requests of an engine. One thread calls it; between two steps requests come and go."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, limits: Limits, *, slots: int, pages: int,
                 recurrent: bool, slot_bytes: int = 0, page_bytes: int = 0, worth: int = WORTH) -> None:
        """slots, pages: of the runner's pools, the first so many; pages 0: no layer is attention. recurrent: some layer
        has a state that cannot be cut back. worth: tokens from which on a prefix is kept."""
        self.runner, self.tokenizer, self.limits = runner, tokenizer, limits
        self.memory = Memory(slots, pages, runner.page)
        # without snapshots there is no limit but the pages
        most = limits.sequences if limits.snapshots is None and recurrent else limits.snapshots
        self.prefixes = Prefixes(self.memory, recurrent=recurrent, most=most, worth=worth)
        self.scheduler = Scheduler(self.memory, self.prefixes, runner, limits)
        self._bytes = slot_bytes, page_bytes
        self._next = 0
        self._alive: dict[int, list[Continuation]] = {}
        self._ready: list[Delivery] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do or deliver anything."""
        return bool(self._alive or self._ready)

    def add(self, request: Request) -> int:
        """Queue a request → its number. RequestError for one that could never be served; that, or what a tokenizer
        raises that cannot write the prompt, leaves all as it was."""
        self._check(request)
        number, self._next = self._next, self._next + 1
        all_of_it = [self._continuation(number, index, request) for index in range(request.n)]
        first, *all_of_it[0].forks = all_of_it
        self._alive[number] = all_of_it
        self.scheduler.add(first)
        return number

    def cancel(self, number: int) -> None:
        """End what is left of a request and free its memory; the next step says so. Nothing for one that has ended."""
        for sequence in self._alive.get(number, [])[::-1]:
            self._ready.append(self._cut_off(sequence, "cancelled"))

    def step(self) -> list[Delivery]:
        """One pass → what became certain. A runner that raises fails the requests of this pass, no others, or before it
        that one whose slot it could not clear; RankFailure, behind which nothing can be run, is raised."""
        ready, self._ready = self._ready, []
        if not self._alive:
            return ready
        work: list[Work] = []
        try:
            work = self.scheduler.schedule()
            assert work, f"{len(self.scheduler.waiting)} sequences wait and none runs"
            turns, choices = self._run(work)
        except RankFailure:
            raise
        except Exception as error:
            broken = {each.sequence.number for each in work}
            if not work:
                if self.scheduler.at_fault is None:
                    raise
                broken = {self.scheduler.at_fault.number}
            return ready + self._fail(work, broken, error)
        return ready + [self._deliver(turn, choices) for turn in turns]

    def stats(self) -> Stats:
        """Counts of now and since the start."""
        slots, pages = self.memory.slots.usage, self.memory.pages.usage
        held = slots.used + slots.cached, pages.used + pages.cached
        slot, page = self._bytes
        return Stats(running=len(self.scheduler.running), waiting=len(self.scheduler.waiting), pages=pages.total,
                     pages_used=held[1], pages_cached=pages.cached, slots=slots.total, slots_used=held[0],
                     slots_cached=slots.cached, bytes=slots.total * slot + pages.total * page,
                     bytes_used=held[0] * slot + held[1] * page, **asdict(self.scheduler.tally))

    def forget(self) -> None:
        """Empty the prefix cache."""
        self.prefixes.clear()

    def _check(self, request: Request) -> None:
        length = len(request.prompt) + request.max_tokens
        size = f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.max_tokens}: {length} together"
        if length > self.limits.context:
            raise RequestError(f"{size}, but the engine takes {self.limits.context} (context). Shorten the prompt, "
                               f"lower max_tokens, or start the engine with a larger context.")
        if self.memory.needed(length) > self.memory.pages.total:
            room = self.memory.pages.total * self.memory.page
            raise RequestError(f"{size}, but the engine's memory holds {room}. Shorten the prompt, lower "
                               f"max_tokens, or give the engine more memory.")
        if min(request.prompt) < 0 or max(request.prompt) >= self.runner.words:
            wrong = next(token for token in request.prompt if not 0 <= token < self.runner.words)
            raise RequestError(f"the prompt has token {wrong}; tokens are 0 to {self.runner.words - 1}. Encode the "
                               f"prompt with the model's own tokenizer.")

    def _continuation(self, number: int, index: int, request: Request) -> Continuation:
        chooser = Chooser(request.sampling, request.prompt, index)
        guessed = self.limits.drafts > 0 and chooser.plain
        lookup = Lookup((), None if request.ignore_eod else self.tokenizer.eod) if guessed else None
        return Continuation(number, index, request, chooser, Writing(number, request, index, self.tokenizer), lookup)

    def _run(self, work: Sequence[Work]) -> tuple[list[Turn], list[Choice | None]]:
        """Run a pass and choose from its logits → who writes, and the choices that `Turn.first` counts in."""
        logits = self.runner.run([_part(each) for each in work])
        turns: list[Turn] = []
        rows: list[int] = []
        at = 0
        for each in work:
            sequence = each.sequence
            if not each.drafts:
                self.scheduler.done(each, 0)
            if each.wanted:
                for one in [sequence, *self._forked(sequence)] if sequence.forks else [sequence]:
                    turns.append(Turn(one, each, len(rows)))
                    rows += range(at, at + each.wanted)
                at += each.wanted
        if not turns:
            return [], []
        if len(rows) > at:  # forks choose from one row
            logits = logits[torch.tensor(rows, device=logits.device)]
        chosen = [turn.sequence for turn in turns for _ in range(turn.work.wanted)]
        return turns, _chosen(logits, chosen)

    def _fail(self, work: Sequence[Work], broken: set[int], error: Exception) -> list[Delivery]:
        """End these requests, of a pass that could not be run."""
        logger.error("a forward pass for %d requests failed", len(broken), exc_info=error)
        for each in work:
            self.scheduler.undo(each)
        return [self._cut_off(sequence, "failed", f"{type(error).__name__}: {error}")
                for number in sorted(broken) for sequence in self._alive[number][::-1]]

    def _forked(self, parent: Continuation) -> list[Continuation]:
        """The other continuations of a prompt that has just been read, which go on from its state; those for which
        there is no room, or whose copy fails, read the prompt themselves when there is."""
        at_work: list[Continuation] = []
        while parent.forks:
            fork = parent.forks[0]
            if self.scheduler.fork(parent, fork):
                at_work.append(fork)
            else:
                self.scheduler.add(fork)
            del parent.forks[0]
        return at_work

    def _deliver(self, turn: Turn, choices: Sequence[Choice | None]) -> Delivery:
        """Take the choices that follow from each other: a draft that is the model's own choice proves the next one."""
        sequence, work, writing = turn.sequence, turn.work, turn.sequence.writing
        first = len(work.tokens) - work.drafts
        writing.cached = sequence.cached
        right, pieces = 0, []
        while True:
            choice = choices[turn.first + right]
            if choice is None:
                self.scheduler.undo(work)
                pieces.append(self._cut_off(sequence, "failed", "the model's logits are not finite (NaN or infinity)."))
                return _joined(pieces)
            sequence.tokens.append(choice.token)
            sequence.chooser.written(choice.token)
            pieces.append(writing.take(choice))
            is_draft = right < work.drafts and choice.token == work.tokens[first + right]
            right += is_draft
            if not is_draft or writing.ended:
                break
        self.scheduler.tally.written += len(pieces)
        if work.drafts:
            self.scheduler.done(work, right)
        if writing.ended:
            self._end(sequence, keep=True)
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _cut_off(self, sequence: Continuation, ended: str, message: str = "") -> Delivery:
        """End a continuation before its time; what a failed pass left in its state is not kept."""
        self._end(sequence, keep=ended == "cancelled")
        sequence.writing.cached = sequence.cached
        return sequence.writing.finish(ended, message)

    def _end(self, sequence: Continuation, *, keep: bool) -> None:
        """Free its memory, and forget it."""
        alive = self._alive[sequence.number]
        if not any(sequence in other.forks for other in alive):
            self.scheduler.end(sequence, keep=keep)
        alive.remove(sequence)
        if not alive:
            del self._alive[sequence.number]


def _chosen(logits: Tensor, sequences: Sequence[Continuation]) -> list[Choice | None]:
    """A choice for each row; None for one from which nothing can be chosen."""
    choosers, told = [s.chooser for s in sequences], [s.request.logprobs for s in sequences]
    try:
        return [*choose(logits, choosers, told)]
    except LogitsError as error:
        logger.error("%s", error)
        sound = [i for i in range(len(sequences)) if i not in error.rows]
        found = choose(logits[torch.tensor(sound, device=logits.device)],
                       [choosers[i] for i in sound], [told[i] for i in sound]) if sound else []
        choices: list[Choice | None] = [None] * len(sequences)
        for i, choice in zip(sound, found, strict=True):
            choices[i] = choice
        return choices


def _joined(pieces: Sequence[Delivery]) -> Delivery:
    """The deliveries of one continuation in one step, as one."""
    return replace(pieces[-1], text="".join(piece.text for piece in pieces),
                   choices=tuple(choice for piece in pieces for choice in piece.choices))


def _part(work: Work) -> Part:
    sequence = work.sequence
    assert sequence.slot is not None
    return Part(sequence.slot, sequence.pages, sequence.held, work.tokens, work.wanted)
