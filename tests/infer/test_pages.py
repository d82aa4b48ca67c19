"""Rows of the pools: who holds which, and that none is lost or given twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny.infer.pages import Memory, Rows, Usage

CALLS = ["take", "share", "release", "keep", "drop"]


def test_a_row_is_free_again_when_its_last_holder_lets_go() -> None:
    rows = Rows(2)
    row = rows.take()
    rows.share([row])
    rows.keep([row])
    rows.release([row])
    rows.release([row])
    assert (rows.free, rows.available, rows.usage) == (1, 2, Usage(2, 0, 1))
    rows.drop([row])
    assert (rows.free, rows.usage) == (2, Usage(2, 0, 0))


def test_a_cached_row_that_a_sequence_shares_is_not_available() -> None:
    rows = Rows(1)
    row = rows.take()
    rows.keep([row])
    rows.release([row])
    rows.share([row])
    assert (rows.available, rows.usage) == (0, Usage(1, 1, 0))


@pytest.mark.parametrize("wrong", ["share", "release", "keep", "drop"])
def test_a_free_row_can_only_be_taken(wrong: str) -> None:
    with pytest.raises(AssertionError):
        getattr(Rows(3), wrong)([1])


def test_nothing_can_be_taken_from_an_empty_pool() -> None:
    with pytest.raises(AssertionError):
        Rows(0).take()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 4)), max_size=60))
def test_counts_are_those_of_a_list_of_holders(calls: list[tuple[str, int]]) -> None:
    rows, users, keepers = Rows(5), [0] * 5, [0] * 5
    for call, row in calls:
        held = users[row] or keepers[row]
        allowed = {"share": held, "keep": held, "release": users[row], "drop": keepers[row]}
        if call == "take" and rows.free:
            users[rows.take()] += 1
        elif allowed.get(call):
            getattr(rows, call)([row])
            changed = users if call in ("share", "release") else keepers
            changed[row] += 1 if call in ("share", "keep") else -1
        used = sum(n > 0 for n in users)
        cached = sum(k > 0 and not u for u, k in zip(users, keepers, strict=True))
        assert rows.usage == Usage(5, used, cached)
        assert rows.free == 5 - used - cached


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_tokens_take_whole_pages(tokens: int, pages: int) -> None:
    assert Memory(1, 9, 8).needed(tokens) == pages


def test_a_model_without_attention_needs_no_pages() -> None:
    assert Memory(1, 0, 8).needed(1000) == 0
