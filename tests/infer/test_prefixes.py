"""The prefix cache: what it finds is the longest that is usable, and what it forgets is what was used least."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny.infer.pages import Memory
from hinny.infer.prefixes import Prefixes

PAGE = 4


def _cache(recurrent: bool, *, slots: int = 8, pages: int = 64, most: int | None = None, worth: int = 1,
           known_tokens: int = 1000) -> Prefixes:
    return Prefixes(Memory(slots, pages, PAGE), recurrent=recurrent, most=most, worth=worth, known_tokens=known_tokens)


def _put(cache: Prefixes, tokens: list[int]) -> tuple[int, ...]:
    """As a sequence that ends hands its rows over → its pages."""
    memory = cache.memory
    assert cache.make_room(memory.needed(len(tokens)), 1)
    slot, pages = memory.slots.take(), [memory.pages.take() for _ in range(memory.needed(len(tokens)))]
    if cache.lacks(tokens):
        cache.keep(tokens, pages, slot if cache.recurrent else None)
    memory.slots.release([slot])
    memory.pages.release(pages)
    return tuple(pages)


def test_a_state_serves_only_prompts_that_begin_with_all_its_tokens() -> None:
    cache = _cache(True)
    _put(cache, [1, 2, 3, 4, 5])
    assert cache.match([1, 2, 3, 4], 9).held == 0
    assert cache.match([1, 2, 3, 4, 9], 9).held == 0
    assert cache.match([1, 2, 3, 4, 5, 6], 9).held == 5


def test_pages_of_attention_serve_every_beginning() -> None:
    cache = _cache(False)
    pages = _put(cache, [1, 2, 3, 4, 5, 6])
    match = cache.match([1, 2, 3, 9, 9], 4)
    assert match.held == 3
    assert match.entry is not None
    assert match.entry.pages == pages


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_prompt_that_comes_again_leaves_a_token_to_run(recurrent: bool) -> None:
    cache = _cache(recurrent)
    _put(cache, [1, 2, 3])
    _put(cache, [1, 2, 3, 4])
    assert cache.match([1, 2, 3, 4], 3).held == 3


def test_an_earlier_prompt_tells_where_a_snapshot_would_pay() -> None:
    cache = _cache(True)
    cache.learn([1, 2, 3, 4, 5])
    match = cache.match([1, 2, 3, 7, 8], 4)
    assert (match.held, match.entry, match.known) == (0, None, 3)


def test_too_short_a_prefix_is_not_worth_its_slot() -> None:
    cache = _cache(True, worth=4)
    assert not cache.lacks([1, 2, 3])
    assert cache.lacks([1, 2, 3, 4])


def test_no_cache_keeps_nothing() -> None:
    assert not _cache(True, most=0).lacks([1, 2, 3])


def test_the_least_recently_used_is_forgotten_first() -> None:
    cache = _cache(True, most=2)
    _put(cache, [1, 1])
    _put(cache, [2, 2])
    assert cache.match([1, 1, 5], 2).held == 2
    _put(cache, [3, 3])
    assert [cache.match([n, n, 5], 2).held for n in (1, 2, 3)] == [2, 0, 2]


def test_pages_are_got_from_a_leaf_not_from_the_beginning_of_others() -> None:
    cache = _cache(True, pages=4)
    memory = cache.memory
    pages = [memory.pages.take() for _ in range(2)]
    for tokens, held in (([1] * 4, pages[:1]), ([1] * 8, pages)):
        slot = memory.slots.take()
        cache.keep(tokens, held, slot)
        memory.slots.release([slot])
    memory.pages.release(pages)
    assert cache.make_room(3, 0)
    assert cache.match([1] * 9, 8).held == 4


def test_room_that_sequences_hold_is_not_made() -> None:
    cache = _cache(True, pages=4)
    _put(cache, [1] * 8)
    cache.memory.pages.take()
    cache.memory.pages.take()
    assert not cache.make_room(3, 0)
    assert len(cache) == 1, "nothing is given up for nothing"
    assert cache.make_room(2, 0)


def test_a_longer_path_of_attention_replaces_a_shorter_one() -> None:
    cache = _cache(False)
    _put(cache, [1, 2, 3])
    _put(cache, [1, 2, 3, 4])
    assert len(cache) == 1
    assert not cache.lacks([1, 2])


def test_known_prompts_do_not_grow_without_end() -> None:
    cache = _cache(True, known_tokens=100)
    for n in range(50):
        cache.learn([n] * 10)
    assert cache.tokens <= 100
    assert cache.match([49] * 12, 11).known == 10


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), max_size=25)


@settings(max_examples=120, deadline=None)
@given(PROMPTS, PROMPTS, st.booleans())
def test_matches_are_those_of_a_list_of_all_prefixes(kept: list[list[int]], asked: list[list[int]],
                                                     recurrent: bool) -> None:
    cache = _cache(recurrent, slots=40, pages=200)
    for tokens in kept:
        if recurrent:
            cache.learn(tokens[:-1])
        _put(cache, tokens)
    for tokens in asked:
        common = [next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b),
                       min(len(tokens), len(other))) for other in kept]
        usable = [n for n, other in zip(common, kept, strict=True) if not recurrent or n == len(other)]
        match = cache.match(tokens, len(tokens))
        assert match.held == max(usable, default=0)
        assert match.known == max(common, default=0)
    cache.clear()
    assert cache.memory.pages.free == 200
    assert cache.memory.slots.free == 40
    assert (len(cache), cache.tokens, cache.match([1], 1).known) == (0, 0, 0)


@settings(max_examples=80, deadline=None)
@given(PROMPTS)
def test_a_small_cache_never_loses_a_row(kept: list[list[int]]) -> None:
    cache = _cache(True, slots=3, pages=4, most=2, known_tokens=15)
    for tokens in kept:
        cache.match(tokens, len(tokens))
        cache.learn(tokens)
        _put(cache, tokens)
        assert len(cache) <= 2
        assert cache.memory.pages.available == 4
        assert cache.memory.slots.usage.cached == len(cache)
    cache.clear()
    assert cache.memory.pages.free == 4
