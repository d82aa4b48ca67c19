"""Requests shaped like those of the paper's tasks, of random tokens: what an evaluation costs, without any data set.

    choices     each item a context of its own and four choices of several tokens: PIQA, ARC, QuALITY
    five-shot   subjects whose questions share five solved examples, four choices of one token: MMLU with 5 shots
    distinct    contexts that share nothing, two choices of several tokens: what sharing cannot help but little
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hinny.infer.reading.requests import Score

CHOICES = 4
CHOICE_TOKENS = (16, 32)
"""Tokens of a choice: at least, and below."""
QUESTION_TOKENS = (64, 160)
SHOTS = 5
SUBJECTS = 4


def choices(rng: np.random.Generator, vocab_size: int, *, items: int, length: int) -> list[Score]:
    """`items` contexts; context and longest choice together have at most `length` tokens."""
    found = []
    for _ in range(items):
        context = _words(rng, vocab_size, length - CHOICE_TOKENS[1] + 1)
        found += [Score(context, _words(rng, vocab_size, rng.integers(*CHOICE_TOKENS))) for _ in range(CHOICES)]
    return found


def five_shot(rng: np.random.Generator, vocab_size: int, *, items: int, length: int) -> list[Score]:
    """`items` questions of four subjects, behind five examples each; `length` plays no part."""
    letters = [(int(word),) for word in rng.choice(vocab_size, CHOICES, replace=False)]
    heads = [_words(rng, vocab_size, int(rng.integers(*QUESTION_TOKENS, size=SHOTS).sum())) for _ in range(SUBJECTS)]
    found = []
    for item in range(items):
        question = _words(rng, vocab_size, rng.integers(*QUESTION_TOKENS))
        found += [Score(heads[item * SUBJECTS // items] + question, letter) for letter in letters]
    return found


def distinct(rng: np.random.Generator, vocab_size: int, *, items: int, length: int) -> list[Score]:
    """`items` short contexts of different lengths with two choices each; `length` plays no part."""
    found = []
    for _ in range(items):
        context = _words(rng, vocab_size, rng.integers(*QUESTION_TOKENS))
        found += [Score(context, _words(rng, vocab_size, rng.integers(*CHOICE_TOKENS))) for _ in range(2)]
    return found


CASES: dict[str, Callable[..., list[Score]]] = {"choices": choices, "five-shot": five_shot, "distinct": distinct}
"""Name → maker of requests."""


def _words(rng: np.random.Generator, vocab_size: int, count: int | np.integer) -> tuple[int, ...]:
    return tuple(rng.integers(vocab_size, size=int(count)).tolist())
