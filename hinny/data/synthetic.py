"""Practice: copying and multi-query recall here, phone books in hinny.data.phonebook, choices in hinny.data.choices.

Training and evaluation use the same constructions, so that an evaluation asks for what was practised. `TRAINING` maps
the task names of a recipe to generators of practice documents; their sizes vary from tiny to all that fits, because
small models learn to look things up from short documents first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hinny.config import SyntheticConfig
from hinny.data.choices import choice_min_length, choice_training
from hinny.data.phonebook import Example, draw_size, phonebook, phonebook_min_length, phonebook_training
from hinny.errors import ConfigError, DataError
from hinny.tokenizer import Tokenizer

__all__ = ["TRAINING", "Example", "copy", "copy_training", "mqar", "mqar_training", "phonebook", "phonebook_min_length",
           "phonebook_training", "symbols"]

SYMBOLS = 32
"""Size of each of the three alphabets, where the vocabulary has room for it.

Small on purpose, also where the vocabulary is large: a small model learns recall sooner from few symbols, seen often.
"""

BYTE_TOKENS = 257
"""Learnt vocabularies begin with special tokens and bytes, which are left to the text."""


@dataclass(frozen=True)
class Symbols:
    """Disjoint sets of ordinary tokens: keys and values of associative recall, letters to copy, the copy's signal."""

    keys: np.ndarray
    values: np.ndarray
    letters: np.ndarray
    separator: list[int]


@lru_cache(maxsize=8)
def symbols(tokenizer: Tokenizer) -> Symbols:
    """The alphabets within a tokenizer's vocabulary, spread evenly over it."""
    first = BYTE_TOKENS if tokenizer.vocab_size >= 4 * BYTE_TOKENS else 0
    ids = np.setdiff1d(np.arange(first, tokenizer.vocab_size), [tokenizer.eod])
    n = min(SYMBOLS, (len(ids) - 2) // 3)
    if n < 8:
        raise DataError(f"a vocabulary of {tokenizer.vocab_size} tokens is too small for recall tasks, which need 27.")
    picked = ids[np.linspace(0, len(ids) - 1, 3 * n + 2).astype(int)]
    return Symbols(picked[0:3 * n:3], picked[1:3 * n:3], picked[2:3 * n:3], picked[3 * n:].tolist())


def mqar(rng: np.random.Generator, tokenizer: Tokenizer, *, pairs: int) -> Example:
    """Multi-query associative recall: `pairs` keys with values, then each key once more, in random order.

    4 · pairs tokens; the answers are the values after the queries (Zoology, arXiv 2312.04927, section 3).
    ConfigError for more pairs than there are keys.
    """
    alphabet = symbols(tokenizer)
    if not 1 <= pairs <= len(alphabet.keys):
        raise ConfigError(f"mqar with {pairs} pairs: this vocabulary has {len(alphabet.keys)} keys; ask for 1 to that.")
    keys = rng.choice(alphabet.keys, pairs, replace=False)
    table = np.stack([keys, rng.choice(alphabet.values, pairs)], axis=1)
    queries = table[rng.permutation(pairs)]
    return Example(np.concatenate([table, queries]).ravel().tolist(), [False] * (2 * pairs) + [False, True] * pairs)


def mqar_training(rng: np.random.Generator, tokenizer: Tokenizer, length: int) -> Example:
    """Associative recall with 4 pairs up to as many as fit in `length` tokens; 16 tokens at least."""
    most = min(length // 4, len(symbols(tokenizer).keys))
    return mqar(rng, tokenizer, pairs=draw_size(rng, 4, most))


def copy(rng: np.random.Generator, tokenizer: Tokenizer, *, length: int) -> Example:
    """Random letters, a separator of two tokens, the same letters again, which are the answers.

    As many letters as fit in `length` tokens. ConfigError below 4 tokens.
    """
    alphabet = symbols(tokenizer)
    n = (length - len(alphabet.separator)) // 2
    if n < 1:
        raise ConfigError(f"copy in {length} tokens: one letter, the separator and its copy need 4.")
    letters = rng.choice(alphabet.letters, n).tolist()
    tokens = [*letters, *alphabet.separator, *letters]
    return Example(tokens, [i >= len(tokens) - n for i in range(len(tokens))])


def copy_training(rng: np.random.Generator, tokenizer: Tokenizer, length: int) -> Example:
    """Copying of 8 letters up to as many as fit in `length` tokens; 18 tokens at least."""
    return copy(rng, tokenizer, length=2 * draw_size(rng, 8, (length - 2) // 2) + 2)


def _phonebook(rng: np.random.Generator, tokenizer: Tokenizer, length: int, config: SyntheticConfig) -> Example:
    return phonebook_training(rng, tokenizer, length=length, digits=config.phonebook_digits)


TRAINING: dict[str, Callable[[np.random.Generator, Tokenizer, int, SyntheticConfig], Example]] = {
    "phonebook": _phonebook,
    "copy": lambda rng, tokenizer, length, config: copy_training(rng, tokenizer, length),
    "mqar": lambda rng, tokenizer, length, config: mqar_training(rng, tokenizer, length),
    "choice": lambda rng, tokenizer, length, config: choice_training(rng, tokenizer, length),
}
"""Task of a recipe → one practice document of about `length` tokens."""


def check_room(tokenizer: Tokenizer, config: SyntheticConfig, length: int) -> None:
    """DataError if sequences of `length` tokens have no room for a question of multiple choice and its answer."""
    if "choice" in config.tasks and length < (least := choice_min_length(tokenizer)):
        raise DataError(f"data.synthetic.tasks.choice: a sequence has {length} tokens, one question with its answer up "
                        f"to {least} of this tokenizer; set train.seq_len to {least - 1} or more, or leave choice out.")
