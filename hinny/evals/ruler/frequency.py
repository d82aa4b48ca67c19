"""Counting: the ten words that a list has most often (cwe), the three of a coded text (fwe).

Prompts from NVIDIA/RULER (github.com/NVIDIA/RULER), Apache-2.0. Where they differ from the original's: words are put
in an order drawn anew for each sample, where the original has one order for all samples of a length.

cwe: the original, at its head, draws from a long list of English words where more different words are needed than
wonderwords has (some 8,160); here the rest are pairs of them ("calm-river"), never among the ten; and the shortest list
has other words than the ten (one, or ten in 2024-06). 2024-06 has no more than wonderwords' words, as then.

fwe: room for the answer is kept in both versions, where 2024-06 forgot it; at the head the text fills its length,
where the original adds a 32nd at a time; and there are always fewer of the fifth word than of the fourth, so that the
three in question are no others.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from hinny.evals.ruler import words
from hinny.evals.ruler.base import Draw, RulerTask, is_head, length_of
from hinny.evals.ruler.fitting import Parts, Plan, running
from hinny.evals.task import Setting
from hinny.tokenizer import Tokenizer

COMMON = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
          "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: "
          "The top 10 words that appear most often in the list are:")
CODED = ("Read the following coded text and track the frequency of each coded word. Find the three most frequently "
         "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
         "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
         "text above, the three most frequently appeared words are:")

TEN = 10
ZETA_2 = math.pi**2 / 6
CODED_AT_LEAST = 27
"""At this many words the fourth is there once and the fifth is not."""


def numbered(items: Sequence[str]) -> str:
    """1. one 2. two 3. three"""
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))


@dataclass(frozen=True)
class _Repeats:
    """How often the ten and the other words come in a list."""

    common: int
    other: int

    def items(self, n: int) -> int:
        """Length of the list of `n` different words."""
        return TEN * self.common + (n - TEN) * self.other

    def listed(self, chosen: Sequence[str], order: int) -> str:
        """The list in a random order; the ten are the first of `chosen`."""
        items = [*list(chosen[:TEN]) * self.common, *list(chosen[TEN:]) * self.other]
        return numbered([items[i] for i in np.random.default_rng(order).permutation(len(items))])


@dataclass(frozen=True)
class CommonWords(RulerTask):
    """Ten words 30 times among words 3 times, after one example; 6 and 1 times in lengths below 4096."""

    shots: ClassVar[int] = 1
    answer_tokens: ClassVar[int] = 120

    def draw(self, setting: Setting) -> Draw:
        """A different word is a unit."""
        head, parts, vocabulary = is_head(setting), Parts(setting.tokenizer), words.vocabulary()
        short = length_of(setting) < 4096
        repeats, shown = (_Repeats(6, 1), _Repeats(3, 1)) if short else (_Repeats(30, 3), _Repeats(10, 3))
        labels = _Labels(parts)

        def plan(index: int) -> Plan:
            rng = setting.rng(self.name, index)
            example = [vocabulary[i] for i in rng.choice(len(vocabulary), size=20 if short else 40, replace=False)]
            orders = rng.integers(2**63, size=2).tolist()
            answer = numbered(example[:TEN])
            front = COMMON.format(context=shown.listed(example, orders[0])) + (" " if head else "") + answer + "\n"
            chosen = _Chosen(rng, parts)
            frame = int(parts.passing([front, COMMON.format(context="")]).sum())

            def size(n: int) -> int:
                sums = chosen.sums(n)
                twice = int(sums[TEN] * repeats.common + (sums[n] - sums[TEN]) * repeats.other)
                return frame + twice + labels.size(repeats.items(n))

            def most(tokens: int) -> int:
                # a number and its word are two tokens or more
                enough = tokens // (2 * repeats.other) + TEN
                n = min(enough, len(vocabulary))
                while head and n < enough and size(n) <= tokens:
                    n += _Chosen.AT_ONCE
                return n

            def told(n: int) -> dict[str, Any]:
                return {"listed": repeats.items(n), "repeats": [repeats.common, repeats.other],
                        "formed": max(0, n - len(vocabulary))}
            return Plan(text=lambda n: front + COMMON.format(context=repeats.listed(chosen.first(n), orders[1])),
                        size=size, low=TEN + 1 if head else 2 * TEN, step=1 if head else TEN, most=most,
                        references=tuple(chosen.first(TEN)), facts=told,
                        reserve="" if head else " " + numbered(chosen.first(TEN)))
        return plan


class _Labels:
    """Tokens of the numbers of a list."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._sums = np.zeros(1, dtype=np.int64)

    def size(self, n: int) -> int:
        """Tokens of the first `n`, each with the space before it."""
        if n >= len(self._sums):
            self._sums = running(self._parts.passing([f" {i}." for i in range(1, n + n // 4 + 1)]))
        return int(self._sums[n])


class _Chosen:
    """Different words in a drawn order: the vocabulary first, then pairs of its words."""

    AT_ONCE = 1024

    def __init__(self, rng: np.random.Generator, parts: Parts) -> None:
        self._order = rng.permutation(len(words.vocabulary()))
        self._words = [words.vocabulary()[i] for i in self._order]
        self._rng, self._parts = rng, parts
        self._sums: np.ndarray | None = None

    def first(self, n: int) -> list[str]:
        while len(self._words) < n:
            self._words += words.distinct(words.pairs, self._rng, self.AT_ONCE, {*self._words})
        return self._words[:n]

    def sums(self, n: int) -> np.ndarray:
        """Tokens of the first 0, 1, …, `n` words or more, each with the space before it."""
        if self._sums is None:
            self._sums = running(_sizes(self._parts.tokenizer)[self._order])
        if n >= len(self._sums):
            new = self._parts.passing([" " + word for word in self.first(n)[len(self._sums) - 1:]])
            self._sums = np.concatenate([self._sums, self._sums[-1] + np.cumsum(new)])
        return self._sums


@lru_cache(maxsize=4)
def _sizes(tokenizer: Tokenizer) -> np.ndarray:
    """(words,): tokens of each word of the vocabulary, with the space before it."""
    return Parts(tokenizer).passing([" " + word for word in words.vocabulary()])


@dataclass(frozen=True)
class CodedWords(RulerTask):
    """Words of six letters, the one of rank k as often as 1 / k²; the first rank is "..."."""

    answer_tokens: ClassVar[int] = 50

    def draw(self, setting: Setting) -> Draw:
        """The unit is a word of the distribution; fractions of words are left out, so that the text has fewer."""
        head, parts, length = is_head(setting), Parts(setting.tokenizer), length_of(setting)
        ranks = max(5, (length - self.answer_tokens if head else length) // 50)
        share = np.arange(1, ranks + 1, dtype=np.float64) ** -2.0 / ZETA_2
        step = 1 if head else max(1, length // 32)
        low = CODED_AT_LEAST if head else _from(length // 6, step, CODED_AT_LEAST)

        def times(n: int) -> np.ndarray:
            """(ranks,): how often each word comes."""
            while (found := (n * share).astype(np.int64))[3] == found[4]:
                n -= 1
            return found

        def plan(index: int) -> Plan:
            rng = setting.rng(self.name, index)
            order, coded = int(rng.integers(2**63)), _Coded(rng, ranks, parts)
            frame = parts.one(CODED.format(context=""))

            def text(n: int) -> str:
                drawn = times(n)
                drawn = drawn[drawn > 0]
                coded_words = coded.first(len(drawn))
                places = np.random.default_rng(order).permutation(np.repeat(np.arange(len(drawn)), drawn))
                return CODED.format(context=" ".join(coded_words[place] for place in places))
            return Plan(text=text, size=lambda n: frame + int(coded.sizes() @ times(n)), low=low, step=step,
                        # six in ten words are of the first rank alone
                        most=lambda tokens: 2 * tokens, references=tuple(coded.first(4)[1:]),
                        facts=lambda n: {"words": int(times(n).sum()), "vocabulary": ranks})
        return plan


def _from(start: int, step: int, least: int) -> int:
    """The smallest number of at least `least` that is whole steps away from `start`."""
    return start - (start - least) // step * step


class _Coded:
    """Different coded words by rank, drawn in full only when asked for."""

    def __init__(self, rng: np.random.Generator, ranks: int, parts: Parts) -> None:
        self._rng, self._ranks, self._parts = rng, ranks, parts
        self._source = words.letters(string.ascii_lowercase, 6)
        self._words = ["...", *words.distinct(self._source, rng, 4)]
        self._sizes: np.ndarray | None = None

    def first(self, n: int) -> list[str]:
        if n > len(self._words):
            self._words += words.distinct(self._source, self._rng, self._ranks - len(self._words), {*self._words})
        return self._words[:n]

    def sizes(self) -> np.ndarray:
        """(ranks,): tokens of each, with the space before it."""
        if self._sizes is None:
            self._sizes = self._parts.passing([" " + word for word in self.first(self._ranks)])
        return self._sizes


TASKS = (CommonWords("ruler-cwe"), CodedWords("ruler-fwe"))
"""The two of counting."""
