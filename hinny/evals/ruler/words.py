"""The words of RULER: the lists of nouns, adjectives and verbs of the package wonderwords (MIT)."""

from __future__ import annotations

import importlib.resources
import uuid
from collections.abc import Callable, Collection
from functools import lru_cache

import numpy as np


@lru_cache
def _list(kind: str) -> tuple[str, ...]:
    file = importlib.resources.files("wonderwords") / "assets" / f"{kind}list.txt"
    # some lines end with a space, which would belong to a word and to what is looked for in an answer
    return tuple(word for line in file.read_text(encoding="utf-8").splitlines() if (word := line.strip()))


@lru_cache
def vocabulary() -> tuple[str, ...]:
    """All nouns, adjectives and verbs in alphabetical order, each once, also where two differ in case alone.

    Answers are compared without case: "Early" and "early" would be one answer and two words.
    """
    every = sorted({*_list("noun"), *_list("adjective"), *_list("verb")})
    return tuple(sorted({word.lower(): word for word in every}.values()))


def pairs(rng: np.random.Generator, n: int) -> list[str]:
    """`n` times an adjective and a noun, as in "calm-river"; a pair may come twice.

    The original draws from the list of all pairs, which has the same distribution up to the few spelt alike.
    """
    adjectives, nouns = _list("adjective"), _list("noun")
    first, second = rng.integers(len(adjectives), size=n), rng.integers(len(nouns), size=n)
    return [f"{adjectives[i]}-{nouns[j]}" for i, j in zip(first, second, strict=True)]


def numbers(rng: np.random.Generator, n: int) -> list[str]:
    """`n` numbers of seven digits."""
    return [str(number) for number in rng.integers(10**6, 10**7, size=n)]


def uuids(rng: np.random.Generator, n: int) -> list[str]:
    """`n` random UUIDs (version 4)."""
    drawn = rng.bytes(16 * n)
    return [str(uuid.UUID(bytes=drawn[16 * i:16 * i + 16], version=4)) for i in range(n)]


def letters(alphabet: str, length: int) -> Callable[[np.random.Generator, int], list[str]]:
    """A source of strings of `length` letters of `alphabet`."""
    def drawn(rng: np.random.Generator, n: int) -> list[str]:
        places = rng.integers(len(alphabet), size=(n, length))
        return ["".join(alphabet[i] for i in row) for row in places]
    return drawn


def distinct(source: Callable[[np.random.Generator, int], list[str]], rng: np.random.Generator, n: int,
             besides: Collection[str] = ()) -> list[str]:
    """`n` different texts of `source`, none of them among `besides`, which leaves enough of them."""
    found: dict[str, None] = {}
    while len(found) < n:
        found |= dict.fromkeys(text for text in source(rng, n - len(found)) if text not in besides)
    return list(found)
