"""Where texts part, by their marks, is where they part token by token; and finding it costs what is new alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny.infer.delivery import Writing
from hinny.infer.limits import Limits
from hinny.infer.marks import BLOCK, Marks, alike
from hinny.infer.pages import Memory
from hinny.infer.prefixes import Prefixes
from hinny.infer.request import Request
from hinny.infer.sampler import Chooser
from hinny.infer.scheduler import Scheduler
from hinny.infer.sequence import Continuation


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Token by token."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


LENGTHS = st.one_of(st.integers(0, 3 * BLOCK), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, LENGTHS, LENGTHS, LENGTHS)
def test_two_texts_part_where_their_first_unequal_token_is(same: int, left: int, right: int, at: int) -> None:
    begun = [n * 7 % 50 for n in range(same)]
    one, other = [*begun, *[50] * left], [*begun, *[60 if n == 0 else 50 for n in range(right)]]
    at = min(at, _common(one, other))
    edge_marks = Marks().of(one)[at // BLOCK:]
    assert alike(one[at:], edge_marks, other, Marks().of(other), at) == _common(one, other) - at


def test_marks_of_a_text_that_grew_are_those_of_the_whole() -> None:
    marks, tokens = Marks(), list[int]()
    for n in range(300):
        tokens.append(n * n % 97)
        assert list(marks.of(tokens)) == list(Marks().of(tokens))
    assert len(marks.of(tokens)) == 300 // BLOCK


PIECES = st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 90)), min_size=1, max_size=5), max_size=15)


@settings(max_examples=60, deadline=None)
@given(PIECES, st.booleans())
def test_a_tree_of_long_texts_finds_the_longest_beginning(pieces: list[list[tuple[int, int]]], recurrent: bool) -> None:
    texts = [[token for token, times in text for _ in range(times)] for text in pieces]
    cache = Prefixes(Memory(40, 0, 4), recurrent=recurrent, most=None, worth=1)
    kept: list[list[int]] = []
    for tokens in texts:
        common = [_common(tokens, other) for other in kept]
        usable = [n for n, other in zip(common, kept, strict=True) if not recurrent or n == len(other)]
        match = cache.match(tokens, len(tokens))
        assert (match.held, match.known) == (max(usable, default=0), max(common, default=0))
        assert cache.lacks(tokens) == (tokens not in kept if recurrent else max(common, default=0) < len(tokens))
        if cache.lacks(tokens):
            slot = cache.memory.slots.take()
            cache.keep(tokens, (), slot if recurrent else None)
            cache.memory.slots.release([slot])
        kept.append(tokens)


class Counted(list[int]):
    """Counts the tokens that anyone takes out of it."""

    taken = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        Counted.taken += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        Counted.taken += len(self)
        return super().__iter__()


class NoCopies:
    """Nothing is copied."""

    def clear_slot(self, slot: int) -> None: ...
    def copy_slot(self, source: int, target: int) -> None: ...
    def copy_page(self, source: int, target: int) -> None: ...


def _burst(length: int, recurrent: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """16 prompts that begin alike come at once → tokens taken in the first step, in any step in which the first one
    alone is being read, and in all."""
    waiting, step = 16, 64
    memory = Memory(40, 0, 4)
    limits = Limits(sequences=waiting, context=10**6, step_tokens=step, page=4)
    prefixes = Prefixes(memory, recurrent=recurrent, most=None)
    scheduler, alone, first = Scheduler(memory, prefixes, NoCopies(), limits), [0], 0
    begun = [n * n % 5003 for n in range(length)]
    for number in range(waiting):
        # integers of its own, so that no two are found equal by being one object
        request = Request(tuple(int(str(token)) for token in (*begun, *[6000 + number] * 100)), 1)
        sequence = Continuation(number, 0, request, cast(Chooser, None), cast(Writing, None))
        sequence.tokens = Counted(sequence.tokens)
        scheduler.add(sequence)
    monkeypatch.setattr(Counted, "taken", 0)
    for n in range(10**6):
        before = Counted.taken
        work = scheduler.schedule()
        if not n:
            first = Counted.taken
        elif [each.sequence.number for each in work] == [0] and work[0].sequence.held < length - step:
            alone.append(Counted.taken - before)
        for each in work:
            scheduler.done(each, 0)
            if each.wanted:
                scheduler.end(each.sequence, keep=True)
        if not scheduler.running:
            break
    assert not scheduler.waiting
    assert len(alone) > length // step // 2
    return first, max(alone), Counted.taken


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_burst_of_equal_beginnings_is_compared_once(recurrent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (_burst(length, recurrent, monkeypatch) for length in (2000, 8000))
    # in the first step the marks of each prompt are made; then a block or two a prompt, however long these are
    assert long[0] <= 2 * 16 * 8100
    assert long[1] <= short[1] + 64
    assert long[1] <= 16 * 6 * BLOCK
    assert long[2] <= 8 * 16 * 8100, "in all, each prompt a few times"
