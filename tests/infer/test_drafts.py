"""Guesses from the text so far: what followed the latest earlier place of its last tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from hinny.infer.drafts import GRAMS, Lookup


def naive(tokens: list[int], most: int) -> list[int]:
    """A search through the whole text, one token of the guess after the other."""
    for n in GRAMS:
        for start in range(len(tokens) - 1, n - 1, -1):
            if n <= len(tokens) and tokens[start - n:start] == tokens[-n:]:
                longer = list(tokens)
                for i in range(most):
                    longer.append(longer[start + i])
                return longer[len(tokens):]
    return []


@pytest.mark.parametrize("words", [2, 4, 30])
def test_guesses_are_those_of_a_search_through_the_whole_text(words: int) -> None:
    draw = random.Random(words)
    for _ in range(20):
        tokens = [draw.randrange(words) for _ in range(draw.randrange(8))]
        lookup = Lookup(tokens)
        for _ in range(60):
            most = draw.randrange(1, 6)
            assert lookup.propose(most) == naive(tokens, most)
            tokens.append(draw.randrange(words))
            lookup.append(tokens[-1])
        assert lookup.tokens == tokens


def test_the_longest_match_wins_and_of_these_the_latest() -> None:
    assert Lookup([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]).propose(1) == [50]
    assert Lookup([1, 2, 50, 1, 2, 60, 1, 2]).propose(3) == [60, 1, 2]


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    assert Lookup([5, 6, 7, 5, 6, 7, 5, 6]).propose(7) == [7, 5, 6, 7, 5, 6, 7]
    assert Lookup([9, 9, 9]).propose(4) == [9, 9, 9, 9]


def test_nothing_is_guessed_without_a_match() -> None:
    assert Lookup([]).propose(4) == Lookup([1]).propose(4) == Lookup([1, 2, 3, 4]).propose(4) == []
    # one token alone is not looked for
    assert Lookup([1, 2, 1]).propose(4) == []
    assert Lookup([1, 2, 1, 2]).propose(0) == []


def test_nothing_is_guessed_behind_the_end_of_a_document() -> None:
    tokens = [1, 2, 3, 0, 4, 5, 1, 2]
    assert Lookup(tokens, eod=0).propose(4) == [3, 0]
    assert Lookup(tokens).propose(4) == [3, 0, 4, 5]


class Watched(list):
    """A list that counts the items that are read from it."""

    read = 0

    def __getitem__(self, at: int | slice) -> object:
        found = super().__getitem__(at)
        self.read += len(found) if isinstance(at, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the whole text is read")


@pytest.mark.parametrize("length", [100, 20_000])
def test_a_token_and_a_guess_read_a_few_tokens_of_any_text(length: int) -> None:
    draw = random.Random(0)
    lookup = Lookup([draw.randrange(20) for _ in range(length)])
    lookup.tokens = watched = Watched(lookup.tokens)
    for token in (3, 4, 5):
        lookup.append(token)
        lookup.propose(4)
    assert 0 < watched.read <= 3 * (2 * sum(GRAMS) + 4)
