"""Needles in a haystack: eight tasks, told apart by haystack, keys, values and their numbers.

Prompts from NVIDIA/RULER (github.com/NVIDIA/RULER), Apache-2.0. Where the samples differ from the original's, all
keys and all values of a sample differ, so that a question has one answer; the order of needles is drawn anew for each
sample, where the original has one order for all; and the haystack goes down to one line a needle, or 20 words,
where the original tries one size for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from hinny.evals.ruler import words
from hinny.evals.ruler.base import Draw, RulerTask, is_head, length_of
from hinny.evals.ruler.fitting import Parts, Plan, running
from hinny.evals.ruler.haystack import NOISE, Prose, prose
from hinny.evals.task import Setting
from hinny.tokenizer import Tokenizer

ONE = ("A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
       "the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided "
       "text? The special magic {kind} for {query} mentioned in the provided text is")
SOME = ("Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text? The special magic {kind} for {query} mentioned in the provided text are")
NEEDLE = "One of the special magic {kind} for {key} is: {value}."

DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int)
"""Where needles may stand in prose, in percent of its sentences."""
WORDS_AT_LEAST = 20

SOURCES: dict[str, Callable[[np.random.Generator, int], list[str]]] = {
    "words": words.pairs, "numbers": words.numbers, "uuids": words.uuids}


@dataclass(frozen=True)
class Needles(RulerTask):
    """`keys` keys with `values` values each; `queries` of the keys are asked for."""

    haystack: Literal["noise", "prose", "needles"] = "noise"
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    answer_tokens: ClassVar[int] = 128

    def missing(self, setting: Setting) -> list[str]:
        """The haystack that was named."""
        if self.haystack == "prose" and setting.haystack is not None and not setting.haystack.exists():
            return [f"the haystack {setting.haystack}, which is not there: name a .txt, .json or .jsonl file or "
                    "a folder of .txt, or leave it out for the stand-in"]
        return []

    def draw(self, setting: Setting) -> Draw:
        """One line of noise or one word of prose is a unit of haystack; or one more needle."""
        parts = Parts(setting.tokenizer)
        stack = _Text(prose(setting.haystack), setting.tokenizer) if self.haystack == "prose" else None

        def plan(index: int) -> Plan:
            rng = setting.rng(self.name, index)
            hidden = _Hidden.drawn(self, rng)
            if stack:
                return self._in_prose(hidden, stack, setting, parts, rng)
            return self._in_lines(hidden, setting, parts, rng)
        return plan

    def steps(self, setting: Setting) -> tuple[int, int]:
        """The fewest units, and how many more at a time."""
        if is_head(setting):
            return WORDS_AT_LEAST if self.haystack == "prose" else self.keys * self.values, 1
        step = 500 if self.haystack == "prose" else 25 if length_of(setting) >= 4096 else 5
        return step, step

    def _plan(self, hidden: _Hidden, setting: Setting, parts: Parts, most: Callable[[int], int],
              lay: Callable[[int], str], hay: Callable[[int], int], where: Callable[[int], list[float]],
              haystack: str) -> Plan:
        """What prose and lines have in common; `lay` and `hay` give the context and about its tokens."""
        frame = int(parts.passing([self.prompt("", hidden.query), *hidden.lines]).sum())
        low, step = self.steps(setting)

        def told(n: int) -> dict[str, Any]:
            depths = [depth for depth, asked in zip(where(n), hidden.asked, strict=True) if asked]
            one = {"depth": depths[0]} if len(depths) == 1 else {}
            return {"haystack": haystack, "needles": len(hidden.lines), **one, "depths": depths}
        return Plan(text=lambda n: self.prompt(lay(n), hidden.query), size=lambda n: frame + hay(n), low=low,
                    step=step, most=most, references=hidden.answers, facts=told,
                    reserve="" if is_head(setting) else " ".join(hidden.answers))

    def prompt(self, context: str, query: str) -> str:
        """The instruction, the context and the question for `query`, with the beginning of an answer."""
        if self.queries * self.values == 1:
            return ONE.format(kind=self.value.removesuffix("s"), context=context, query=query)
        return SOME.format(kind=self.value, context=context, query=query)

    def _in_prose(self, hidden: _Hidden, stack: _Text, setting: Setting, parts: Parts,
                  rng: np.random.Generator) -> Plan:
        depths = np.sort(rng.choice(DEPTHS, size=len(hidden.lines), replace=False)).tolist()
        # the original of 2024-06 never reads its essays twice
        most = (lambda tokens: tokens) if is_head(setting) else (lambda tokens: min(tokens, len(stack.prose.words)))

        def lay(n: int) -> str:
            sentences = stack.prose.sentences(n)
            cuts = [0, *(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
            pieces = [" ".join(sentences[a:b]) for a, b in pairwise(cuts)]
            # an empty piece leaves a space of its own, as in the original
            return " ".join(text for pair in zip(pieces, [*hidden.lines, ""], strict=True) for text in pair)[:-1]
        return self._plan(hidden, setting, parts, most, lay, stack.size,
                          lambda n: [depth / 100 for depth in depths], stack.prose.name)

    def _in_lines(self, hidden: _Hidden, setting: Setting, parts: Parts, rng: np.random.Generator) -> Plan:
        order = int(rng.integers(2**63))
        lines = _Noise(parts) if self.haystack == "noise" else _Distractors(self, hidden, parts, rng)

        def places(n: int) -> list[int]:
            drawn = np.random.default_rng(order).choice(n, size=len(hidden.lines), replace=False)
            return sorted(drawn.tolist())

        def lay(n: int) -> str:
            text = lines.first(n)
            for place, needle in zip(reversed(places(n)), reversed(hidden.lines), strict=True):
                text.insert(place, needle)
            return "\n".join(text)
        return self._plan(hidden, setting, parts, lines.most, lay, lines.size,
                          lambda n: [round(place / n, 4) for place in places(n)], self.haystack)


@dataclass(frozen=True)
class _Hidden:
    """The needles in the order in which they are laid, and what is asked."""

    lines: list[str]
    asked: list[bool]
    query: str
    answers: tuple[str, ...]
    keys: list[str]
    values: list[str]

    @staticmethod
    def drawn(task: Needles, rng: np.random.Generator) -> _Hidden:
        keys = words.distinct(SOURCES[task.key], rng, task.keys)
        values = words.distinct(SOURCES[task.value], rng, task.keys * task.values, besides=keys)
        queries = rng.choice(task.keys, size=task.queries, replace=False).tolist()
        order = rng.permutation(len(values)).tolist()
        names = [keys[i] for i in queries]
        return _Hidden(
            lines=[NEEDLE.format(kind=task.value, key=keys[i // task.values], value=values[i]) for i in order],
            asked=[i // task.values in queries for i in order],
            query=", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0],
            answers=tuple(values[i * task.values + j] for i in queries for j in range(task.values)),
            keys=keys, values=values)


class _Noise:
    """The same line again and again."""

    def __init__(self, parts: Parts) -> None:
        self._line = parts.one(NOISE + "\n")

    def first(self, n: int) -> list[str]:
        return [NOISE] * n

    def size(self, n: int) -> int:
        return n * self._line

    def most(self, tokens: int) -> int:
        return tokens // self._line + 1


class _Distractors:
    """Needles of other keys with other values, drawn as they are asked for."""

    def __init__(self, task: Needles, hidden: _Hidden, parts: Parts, rng: np.random.Generator) -> None:
        self._task, self._parts, self._rng = task, parts, rng
        self._taken = {*hidden.keys, *hidden.values}
        self._lines: list[str] = []
        self._sums = [0]

    def first(self, n: int) -> list[str]:
        while len(self._lines) < n:
            # as many again: few for the shortest sample, few times for a long one
            self._draw(min(256, max(4, len(self._lines))))
        return self._lines[:n]

    def size(self, n: int) -> int:
        if n >= len(self._sums):
            self.first(n)
            sizes = self._parts.passing([line + "\n" for line in self._lines[len(self._sums) - 1:]])
            self._sums += (self._sums[-1] + np.cumsum(sizes)).tolist()
        return self._sums[n]

    def most(self, tokens: int) -> int:
        while self.size(len(self._lines)) <= tokens:
            self.first(len(self._lines) + 1)
        return len(self._lines)

    def _draw(self, n: int) -> None:
        keys = words.distinct(SOURCES[self._task.key], self._rng, n, self._taken)
        values = words.distinct(SOURCES[self._task.value], self._rng, n, self._taken)
        self._taken |= {*keys, *values}
        self._lines += [NEEDLE.format(kind=self._task.value, key=key, value=value)
                        for key, value in zip(keys, values, strict=True)]


class _Text:
    """Prose and about the tokens of its first words."""

    def __init__(self, text: Prose, tokenizer: Tokenizer) -> None:
        self.prose = text
        self._sums = _sums(text, tokenizer)

    def size(self, n: int) -> int:
        times, rest = divmod(n, len(self.prose.words))
        return int(times * self._sums[-1] + self._sums[rest])


@lru_cache(maxsize=4)
def _sums(text: Prose, tokenizer: Tokenizer) -> np.ndarray:
    """(words + 1,): tokens of the first 0, 1, … words, each by itself with the space before it."""
    return running(Parts(tokenizer).many([" " + word for word in text.words]))


TASKS = (
    Needles("ruler-niah-single-1"),
    Needles("ruler-niah-single-2", "prose"),
    Needles("ruler-niah-single-3", "prose", value="uuids"),
    Needles("ruler-niah-multikey-1", "prose", keys=4),
    Needles("ruler-niah-multikey-2", "needles"),
    Needles("ruler-niah-multikey-3", "needles", "uuids", "uuids"),
    Needles("ruler-niah-multivalue", "prose", values=4),
    Needles("ruler-niah-multiquery", "prose", keys=4, queries=4),
)
"""The eight, as the benchmark defines them."""
