"""Multiple choice over made-up lookups and sums, asked in the three ways that MMLU is asked.

Training and evaluation (choice-letter, choice-text, choice-cloze) share the questions and every word around them. A
document of practice is what an evaluation's prompt is: a headline, then questions of one form with their answers. It is
encoded as a whole, as the prompts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from hinny.data.phonebook import Example, draw_size
from hinny.errors import DataError
from hinny.tokenizer import Tokenizer

LETTERS = "ABCD"
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "yellow", "violet")
THINGS = ("box", "door", "chair", "lamp", "boat", "coat", "car", "book", "cup", "key")
HEAD = "The following are multiple choice questions (with answers) about codes and sums.\n\n"
CLOZE_HEAD = "The following are questions (with answers) about codes and sums.\n\n"
FORMS = ("letter", "text", "cloze")
"""letter: the choices are shown, a letter answers. text: shown, a choice answers. cloze: not shown, one answers."""


@dataclass(frozen=True)
class Item:
    """A question, four different choices, and which of them is right."""

    question: str
    choices: tuple[str, ...]
    right: int
    kind: str


def draw_item(rng: np.random.Generator, index: int) -> Item:
    """Even items are lookups, odd ones sums."""
    right = int(rng.integers(len(LETTERS)))
    if index % 2:
        a, b = (int(x) for x in rng.integers(11, 45, 2))
        # the wrong ones lie near, and all have two digits: 22 - 9 to 88 + 9; the sum has any rank among the four
        lower = int(rng.integers(len(LETTERS)))
        off = [*(-rng.permutation(9)[:lower] - 1), *(rng.permutation(9)[:len(LETTERS) - 1 - lower] + 1)]
        numbers = [str(a + b + int(x)) for x in rng.permutation(off)]
        numbers.insert(right, str(a + b))
        return Item(f"What is {a} plus {b}?", tuple(numbers), right, "sum")
    places = rng.choice(len(COLOURS) * len(THINGS), len(LETTERS), replace=False)
    things = [f"{COLOURS[place // len(THINGS)]} {THINGS[place % len(THINGS)]}" for place in places]
    codes = [str(code) for code in rng.choice(np.arange(100, 1000), len(LETTERS), replace=False)]
    return _lookup(things, codes, rng.permutation(len(LETTERS)).tolist(), right)


def _lookup(things: list[str], codes: list[str], order: list[int], right: int) -> Item:
    told = " ".join(f"The code of the {things[i]} is {codes[i]}." for i in order)
    return Item(f"{told} What is the code of the {things[right]}?", tuple(codes), right, "lookup")


def head(form: str) -> str:
    """What stands before the questions of a form."""
    return CLOZE_HEAD if form == "cloze" else HEAD


def asked(item: Item, form: str) -> str:
    """The question up to `Answer:`."""
    if form == "cloze":
        return f"Question: {item.question}\nAnswer:"
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=True)]
    return "\n".join([item.question, *lines, "Answer:"])


def answers(item: Item, form: str) -> tuple[str, ...]:
    """What may follow the question, in the order of the choices."""
    return tuple(f" {text}" for text in (LETTERS if form == "letter" else item.choices))


@lru_cache(maxsize=8)
def choice_min_length(tokenizer: Tokenizer) -> int:
    """Tokens of one question with its answer, as long as they can be: what practice with room for one always fits in.

    DataError for a tokenizer that cannot spell them.
    """
    pairs = [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
    size = {pair: len(ids) for pair, ids in zip(pairs, tokenizer.encode_many([f" {p}" for p in pairs]), strict=True)}
    codes = [str(code) for code in range(100, 1000)]
    digits = {code: len(ids) for code, ids in zip(codes, tokenizer.encode_many([f" {c}" for c in codes]), strict=True)}
    item = _lookup(sorted(pairs, key=size.__getitem__)[-4:], sorted(codes, key=digits.__getitem__)[-4:], [0, 1, 2, 3],
                   3)
    return max(len(_written(tokenizer, form, [item]).tokens) for form in FORMS)


def choice_training(rng: np.random.Generator, tokenizer: Tokenizer, length: int) -> Example:
    """Questions of one form, lookups and sums as they fall, with their answers: one up to as many as fit in `length`.

    Every answer counts. Too small a `length` gives one question, which is longer.
    """
    form = FORMS[int(rng.integers(len(FORMS)))]
    room = draw_size(rng, choice_min_length(tokenizer) // 3, length)
    items = [draw_item(rng, int(rng.integers(2)))]
    used = len(tokenizer.encode(_text(form, items)))
    while used < room:
        items.append(draw_item(rng, int(rng.integers(2))))
        used += len(tokenizer.encode(_question(items[-1], form) + "\n\n"))
    example = _written(tokenizer, form, items)
    while len(example.tokens) > min(room, length) and len(items) > 1:
        example = _written(tokenizer, form, items := items[:-1])
    return example


def _question(item: Item, form: str) -> str:
    return asked(item, form) + answers(item, form)[item.right]


def _text(form: str, items: list[Item]) -> str:
    return head(form) + "\n\n".join(_question(item, form) for item in items)


@lru_cache(maxsize=8)
def _sizes(tokenizer: Tokenizer) -> dict[int, int]:
    """Token → its bytes, of all that were looked up."""
    return {}


def _written(tokenizer: Tokenizer, form: str, items: list[Item]) -> Example:
    """The items as tokens of the whole text; a token with any part of an answer is one of its tokens."""
    text = _text(form, items)
    tokens = tokenizer.encode(text)
    if tokenizer.decode(tokens) != text:
        raise DataError("this tokenizer cannot spell multiple choice exactly (line breaks, spaces and digits); leave "
                        "choice out of data.synthetic.tasks, or use another tokenizer.")
    size = _sizes(tokenizer)
    size.update((token, tokenizer.n_bytes([token])) for token in set(tokens) - size.keys())
    ends = np.cumsum([size[token] for token in tokens])
    # some tokenizers put a space in front of what they encode
    ends -= ends[-1] - len(text)
    marked, place = np.zeros(len(tokens), bool), len(head(form))
    for item in items:
        start = place + len(asked(item, form))
        place = start + len(answers(item, form)[item.right])
        marked[np.searchsorted(ends, start, side="right"):np.searchsorted(ends, place) + 1] = True
        place += len("\n\n")
    return Example(tokens, marked.tolist())
