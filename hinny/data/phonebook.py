"""Phone books: names with numbers, then one of the numbers is asked for (paper section 3.3.3).

Standard form: the book, two questions with their answers, the question. Reversed form: the question is announced before
the book. Both end in a line `Answer: ` before the number; the paper's reversed form leaves that line to the model.
Tokens are pieced together from parts that were encoded once, numbers digit by digit: they spell the text exactly, but a
tokenizer that joins digits or phrases would encode the whole text otherwise. Training and evaluation share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from hinny.data import names
from hinny.errors import ConfigError, DataError
from hinny.tokenizer import Tokenizer

FIRST, LAST = names.FIRST.split(), names.LAST.split()

GROUPS = {4: (4,), 7: (3, 4), 10: (3, 3, 4)}
"""Digits of a number → lengths of its groups: NNNN, EEE-NNNN, AAA-EEE-NNNN."""

RANGES = {3: (200, 1000), 4: (1000, 10000)}
"""Length of a group → its numbers, first to one past the last."""

REVERSED_SHARE = 0.25
"""Share of reversed books in training; a quarter keeps the form familiar at little cost to the standard one."""

PHRASES = {
    "entry": ": ", "newline": "\n", "question": "What is the phone number for", "answer": "?\nAnswer: ",
    "intro": "Given a phone book with entries of the form:\n",
    "more": "... and so on.\nPlease find the phone number for",
    "later": ".\nI will ask you for this phone number later.\nMemorize it so you can respond correctly.\nRemember",
    "book": ".\nHere is the phonebook:\n",
    "end": "Okay, that is the end of the phonebook.\nRemember when I asked you to memorize the phone number for",
    "asked": "?\n",
}


@dataclass
class Example:
    """A document of tokens and, for each, whether it is an answer that must be recalled."""

    tokens: list[int] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)

    def write(self, tokens: list[int], answer: bool = False) -> None:
        """Append tokens."""
        self.tokens += tokens
        self.answers += [answer] * len(tokens)


@dataclass(frozen=True)
class Line:
    """One person of a book, in tokens: the name at a line's start, the name after a space, the number."""

    name: list[int]
    spaced: list[int]
    phone: list[int]


class Parts:
    """The encoded parts of phone books in one tokenizer. DataError for a tokenizer that cannot spell them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.phrase = {name: self._part(text) for name, text in PHRASES.items()}
        self._first = [self._part(name) for name in FIRST]
        self._spaced = [self._part(f" {name}") for name in FIRST]
        self._last = [self._part(f" {name}") for name in LAST]
        self._character = {c: self._part(c) for c in "0123456789-"}
        self.longest = {digits: self._longest(digits) for digits in GROUPS}
        """For each length of number, a person of the longest lines; what has room for them has room for anyone."""
        self.shortest_entry = {digits: self._shortest_entry(digits) for digits in GROUPS}
        self._check()

    def _part(self, text: str) -> list[int]:
        """Tokens of `text` in the middle of a line: some tokenizers mark the beginning of what they encode."""
        for before in ("7", "a", "\n"):
            start, whole = self._tokenizer.encode(before), self._tokenizer.encode(before + text)
            if whole[:len(start)] == start:
                return whole[len(start):]
        return self._tokenizer.encode(text)

    def _check(self) -> None:
        text, tokens = "\n", list(self.phrase["newline"])
        for i, (first, last) in enumerate(zip(FIRST, LAST, strict=True)):
            text += f"{first} {last}: 234-567-8901\n {first}?\n"
            line = Line(self._first[i] + self._last[i], self._spaced[i], self._digits("234-567-8901"))
            tokens += [*self.entry(line), *line.spaced, *self.phrase["asked"]]
        text, tokens = text + "".join(PHRASES.values()), tokens + [t for part in self.phrase.values() for t in part]
        if self._tokenizer.decode(tokens) != text:
            raise DataError("this tokenizer cannot spell a phone book exactly (line breaks, spaces and single digits); "
                            "leave phonebook out, or use another tokenizer.")

    def _digits(self, number: str) -> list[int]:
        return [token for character in number for token in self._character[character]]

    def people(self, rng: np.random.Generator, n: int, digits: int) -> list[Line]:
        """`n` people of different names. ConfigError if there are not so many names."""
        if n > len(FIRST) * len(LAST):
            raise ConfigError(f"a phone book of {n} entries: there are only {len(FIRST) * len(LAST)} names.")
        names = rng.choice(len(FIRST) * len(LAST), n, replace=False).tolist()
        groups = [rng.integers(*RANGES[size], n).tolist() for size in GROUPS[digits]]
        lines = []
        for i, number in zip(names, zip(*groups, strict=True), strict=True):
            first, last = divmod(i, len(LAST))
            lines.append(Line(self._first[first] + self._last[last], self._spaced[first] + self._last[last],
                              self._digits("-".join(map(str, number)))))
        return lines

    def entry(self, line: Line) -> list[int]:
        """`{name}: {phone}` and the line's end."""
        return [*line.name, *self.phrase["entry"], *line.phone, *self.phrase["newline"]]

    def ask(self, example: Example, line: Line) -> None:
        """Append question and answer."""
        example.write([*self.phrase["question"], *line.spaced, *self.phrase["answer"]])
        example.write(line.phone, answer=True)

    def question_length(self, line: Line) -> int:
        """Tokens that `ask` and a line's end take."""
        return (len(self.phrase["question"]) + len(line.spaced) + len(self.phrase["answer"]) + len(line.phone)
                + len(self.phrase["newline"]))

    def standard(self, book: list[Line], asked: list[Line]) -> Example:
        """The book and a question for each of `asked`."""
        example = Example()
        for line in book:
            example.write(self.entry(line))
        for i, line in enumerate(asked):
            if i:
                example.write(self.phrase["newline"])
            self.ask(example, line)
        return example

    def reversed(self, book: list[Line], shown: list[Line], asked: Line) -> Example:
        """The announcement with two entries for show, the book, the question."""
        example = Example()
        example.write(self.phrase["intro"])
        for line in shown:
            example.write(self.entry(line))
        example.write([*self.phrase["more"], *asked.spaced, *self.phrase["later"], *asked.spaced, *self.phrase["book"],
                       *self.phrase["newline"]])
        for line in book:
            example.write(self.entry(line))
        example.write([*self.phrase["end"], *asked.spaced, *self.phrase["asked"]])
        self.ask(example, asked)
        return example

    def _longest(self, digits: int) -> Line:
        first, spaced, last = (max(part, key=len) for part in (self._first, self._spaced, self._last))
        return Line(first + last, spaced + last, self._digits("-".join("2" * size for size in GROUPS[digits])))

    def _shortest_entry(self, digits: int) -> int:
        """Tokens of the shortest entry there can be."""
        first, last = (min(part, key=len) for part in (self._first, self._last))
        return len(self.entry(Line(first + last, [], self.longest[digits].phone)))


def spelling() -> str:
    """Every word of phone books as it stands in them: for a tokenizer that is to write them in few tokens."""
    people = "".join(f"{name}\n {name}\n" for name in FIRST) + "".join(f" {name}\n" for name in LAST)
    return people + "\n".join(PHRASES.values())


@lru_cache(maxsize=8)
def parts(tokenizer: Tokenizer) -> Parts:
    """The parts of phone books in `tokenizer`, encoded once."""
    return Parts(tokenizer)


def draw_size(rng: np.random.Generator, least: int, most: int) -> int:
    """A size from `least` to `most`, each doubling as likely as the next; `least` if there is no room."""
    if most <= least:
        return least
    return min(int(math.exp(rng.uniform(math.log(least), math.log(most + 1)))), most)


def phonebook_min_length(tokenizer: Tokenizer, *, digits: int, form: Literal["standard", "reversed"]) -> int:
    """Tokens with which `phonebook` can always write its smallest book, of three entries."""
    _check_form(digits, form)
    three = [parts(tokenizer).longest[digits]] * 3
    if form == "standard":
        return len(parts(tokenizer).standard(three, three).tokens)
    return len(parts(tokenizer).reversed(three, three[:2], three[2]).tokens)


def phonebook(rng: np.random.Generator, tokenizer: Tokenizer, *, length: int, digits: int,
              form: Literal["standard", "reversed"], depth: float | None = None) -> Example:
    """Prompt and answer with as many entries as fit in `length` tokens; the last number is the answer.

    Two other people of the book are the solved examples (standard) or the entries for show (reversed); all three stand
    at random places, but for the one who is asked for where `depth` says the place: 0 the first entry, 1 the last.
    ConfigError if `length` is too small for three entries.
    """
    least = phonebook_min_length(tokenizer, digits=digits, form=form)
    if length < least:
        raise ConfigError(f"a {form} phone book of {digits}-digit numbers in {length} tokens: this tokenizer needs at "
                          f"least {least}.")
    made = parts(tokenizer)
    people = made.people(rng, max(length // made.shortest_entry[digits], 3), digits)
    *shown, asked = people[:3]
    frame = made.standard([], people[:3]) if form == "standard" else made.reversed([], shown, asked)
    book = people[:_fitting(made, people, length - len(frame.tokens))]
    book = [book[i] for i in rng.permutation(len(book))]
    if depth is not None:
        book.remove(asked)
        book.insert(round(depth * len(book)), asked)
    example = made.standard(book, [*shown, asked]) if form == "standard" else made.reversed(book, shown, asked)
    if form == "standard":
        # the solved examples are part of the prompt
        start = len(example.tokens) - len(asked.phone)
        example.answers[:start] = [False] * start
    return example


def phonebook_training(rng: np.random.Generator, tokenizer: Tokenizer, *, length: int, digits: int) -> Example:
    """A book of 2 entries up to as many as fit in `length` tokens, and a question for as many of them as fit.

    Every answer counts. A quarter of the books has the reversed form, where `length` allows it. Too small a `length`
    gives the smallest standard book, which is longer.
    """
    made = parts(tokenizer)
    people = made.people(rng, max(length // made.shortest_entry[digits], 3), digits)
    *shown, asked = people[:3]
    if rng.random() < REVERSED_SHARE:
        room = _fitting(made, people, length - len(made.reversed([], shown, asked).tokens))
        if room >= 3:
            book = people[:draw_size(rng, 3, room)]
            return made.reversed([book[i] for i in rng.permutation(len(book))], shown, asked)
    room = _fitting(made, people, length - made.question_length(made.longest[digits]))
    book = people[:draw_size(rng, 2, room)]
    left = length - sum(len(made.entry(line)) for line in book)
    questions = [book[i] for i in rng.permutation(len(book))]
    fitting = np.searchsorted(np.cumsum([made.question_length(line) for line in questions]), left, side="right")
    return made.standard(book, questions[:max(int(fitting), 1)])


def _fitting(made: Parts, people: Iterable[Line], room: int) -> int:
    """How many entries fit in `room` tokens."""
    return int(np.searchsorted(np.cumsum([len(made.entry(line)) for line in people]), room, side="right"))


def _check_form(digits: int, form: str) -> None:
    if digits not in GROUPS:
        raise ConfigError(f"phone numbers of {digits} digits; allowed: {', '.join(map(str, GROUPS))}.")
    if form not in ("standard", "reversed"):
        raise ConfigError(f"phone book form {form!r}; allowed: standard, reversed.")
