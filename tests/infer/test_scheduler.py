"""The scheduler's plans, without a model: order, chunks, pre-emption, and that everyone's turn comes."""

from __future__ import annotations

from typing import cast

import pytest

from hinny.infer.delivery import Writing
from hinny.infer.drafts import Lookup
from hinny.infer.limits import Limits
from hinny.infer.pages import Memory
from hinny.infer.prefixes import Prefixes
from hinny.infer.request import Request
from hinny.infer.sampler import Chooser
from hinny.infer.scheduler import MOST_PENDING, Scheduler
from hinny.infer.sequence import Continuation, Work


class Copies:
    """Notes what is copied."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def clear_slot(self, slot: int) -> None:
        self.calls.append(("clear", slot, slot))

    def copy_slot(self, source: int, target: int) -> None:
        self.calls.append(("slot", source, target))

    def copy_page(self, source: int, target: int) -> None:
        self.calls.append(("page", source, target))


def _scheduler(*, slots: int = 4, pages: int = 20, sequences: int = 4, step_tokens: int = 16, drafts: int = 0,
               snapshots: int = 0, recurrent: bool = True) -> Scheduler:
    memory = Memory(slots, pages, 4)
    limits = Limits(sequences=sequences, context=100, step_tokens=step_tokens, page=4, drafts=drafts)
    return Scheduler(memory, Prefixes(memory, recurrent=recurrent, most=snapshots, worth=2), Copies(), limits)


def _add(scheduler: Scheduler, number: int, prompt: int, max_tokens: int = 20, guessed: bool = False) -> Continuation:
    request = Request(tuple(range(number * 100, number * 100 + prompt)), max_tokens)
    sequence = Continuation(number, 0, request, cast(Chooser, None), cast(Writing, None),
                            Lookup(()) if guessed else None)
    scheduler.add(sequence)
    return sequence


def _step(scheduler: Scheduler, right: int = 0, token: int = 7) -> list[Work]:
    work = scheduler.schedule()
    for each in work:
        sequence, good = each.sequence, min(right, each.drafts)
        guesses = each.tokens[len(each.tokens) - each.drafts:]
        scheduler.done(each, good)
        if each.wanted:
            sequence.tokens += [*guesses[:good], token]
    return work


def _plan(work: list[Work]) -> list[tuple[int, int, int]]:
    return [(each.sequence.number, len(each.tokens), each.wanted) for each in work]


def test_writers_go_first_and_prompts_have_what_is_left() -> None:
    scheduler = _scheduler()
    _add(scheduler, 0, 6)
    assert _plan(_step(scheduler)) == [(0, 6, 1)]
    _add(scheduler, 1, 20)
    assert _plan(_step(scheduler)) == [(0, 1, 1), (1, 15, 0)]
    _add(scheduler, 2, 30)
    assert _plan(_step(scheduler)) == [(0, 1, 1), (1, 5, 1), (2, 10, 0)]


def test_admission_is_in_order_of_arrival() -> None:
    scheduler = _scheduler(pages=8)
    _add(scheduler, 0, 10)
    _step(scheduler)
    _add(scheduler, 1, 24)
    _add(scheduler, 2, 1)
    assert _plan(_step(scheduler)) == [(0, 1, 1)], "a short prompt does not overtake one that waits for memory"
    scheduler.end(scheduler.running[0], keep=False)
    assert _plan(_step(scheduler)) == [(1, 16, 0)]


def test_the_newest_gives_its_pages_to_an_older_one_and_loses_no_token() -> None:
    scheduler = _scheduler(pages=6, step_tokens=40)
    old, new = _add(scheduler, 0, 7), _add(scheduler, 1, 7)
    for _ in range(6):
        _step(scheduler)
    assert scheduler.tally.preemptions == 0
    while not scheduler.tally.preemptions:
        written = len(new.tokens)
        _step(scheduler)
    assert scheduler.waiting == [new]
    assert (len(new.tokens), new.held, new.pages, new.slot) == (written, 0, [], None)
    scheduler.end(old, keep=False)
    assert _plan(_step(scheduler)) == [(1, written, 1)]


def test_no_request_waits_for_ever() -> None:
    scheduler = _scheduler(slots=3, pages=12, sequences=3, snapshots=2)
    left = {_add(scheduler, number, 1 + number * 5 % 23, 15) for number in range(30)}
    for _ in range(3000):
        for each in _step(scheduler):
            if each.wanted and not each.sequence.left:
                scheduler.end(each.sequence, keep=True)
                left.remove(each.sequence)
        if not left:
            break
    assert not left
    scheduler.prefixes.clear()
    assert (scheduler.memory.pages.free, scheduler.memory.slots.free) == (12, 3)


def test_a_prompt_is_cut_before_its_last_token_for_a_snapshot() -> None:
    scheduler = _scheduler(snapshots=2)
    _add(scheduler, 0, 9)
    assert [_plan(_step(scheduler)) for _ in range(2)] == [[(0, 8, 0)], [(0, 1, 1)]]
    assert cast(Copies, scheduler.copying.copies).calls == [("clear", 0, 0), ("slot", 0, 1)]


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_wrong_draft_is_taken_back(recurrent: bool) -> None:
    scheduler = _scheduler(drafts=3, recurrent=recurrent)
    sequence = _add(scheduler, 0, 4, guessed=True)
    sequence.tokens[:] = [5, 6, 5, 6]
    _step(scheduler, token=5)
    slot, held = sequence.slot, sequence.held
    work = _step(scheduler, right=1)
    assert (work[0].tokens, work[0].drafts, work[0].wanted) == ([5, 6, 5, 6], 3, 4)
    assert sequence.tokens == [5, 6, 5, 6, 5, 6, 7]
    assert sequence.held == (held if recurrent else held + 2)
    assert (sequence.slot == slot) != recurrent
    assert scheduler.memory.slots.usage.used == 1


def test_right_drafts_are_held() -> None:
    scheduler = _scheduler(drafts=3)
    sequence = _add(scheduler, 0, 4, guessed=True)
    sequence.tokens[:] = [5, 6, 5, 6]
    _step(scheduler, token=5)
    _step(scheduler, right=3, token=6)
    assert len(sequence.tokens) - sequence.held == 1
    assert scheduler.tally.accepted == 3


def test_a_state_that_lags_far_behind_catches_up_without_drafts() -> None:
    scheduler = _scheduler(drafts=3)
    sequence = _add(scheduler, 0, 4, max_tokens=60, guessed=True)
    sequence.tokens[:] = [5, 6, 5, 6]
    most = 0
    for n in range(30):
        work = _step(scheduler, token=5 + n % 2)
        assert work[0].drafts == 0 or len(work[0].tokens) - work[0].drafts <= MOST_PENDING
        most = max(most, len(work[0].tokens))
    assert most <= MOST_PENDING + 3
    assert scheduler.tally.drafted > 0


def test_drafts_take_no_slot_from_one_that_waits() -> None:
    scheduler = _scheduler(slots=2, drafts=3)
    sequence = _add(scheduler, 0, 4, guessed=True)
    sequence.tokens[:] = [5, 6, 5, 6]
    _step(scheduler, token=5)
    _add(scheduler, 1, 3)
    assert _plan(_step(scheduler)) == [(0, 1, 1), (1, 3, 1)]
