"""Recall from the context: Phonebook (paper section 3.3.3), multi-query recall, copying.

Answers are scored in one pass over prompt and answer: greedy decoding writes an answer exactly if each of its tokens
is the likeliest one after the true tokens before it, so `exact` is the accuracy of greedy generation. Single digits are
scored in the same pass, that is, after the true digits in front of them.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from hinny.data import synthetic
from hinny.errors import ConfigError
from hinny.evals.intervals import wilson
from hinny.evals.options import EvalOptions
from hinny.infer.engine import Engine
from hinny.run import row

logger = logging.getLogger(__name__)
TOKENS_AT_ONCE = 8192
DEPTHS = (0, 17, 33, 50, 67, 83, 100)
"""Where the asked entry of a phone book stands, in percent of its entries."""

FORMS: tuple[Literal["standard", "reversed"], ...] = ("standard", "reversed")


def phonebook(engine: Engine, options: EvalOptions) -> list[dict[str, Any]]:
    """Exact numbers and single digits, both forms, by length; chance is the score against another prompt's number.

    A length too short for a form's smallest book has no row, aloud; ConfigError if that is all of them.
    """
    sizes = options.sizes()
    trained = engine.run.recipe.data.synthetic
    digits = trained.phonebook_digits if trained else 10
    rows = []
    for form in FORMS:
        least = synthetic.phonebook_min_length(engine.tokenizer, digits=digits, form=form)
        if not (lengths := [length for length in sizes.lengths if length >= least]):
            raise ConfigError(f"lengths are {', '.join(map(str, sizes.lengths))}; the smallest {form} phone book of "
                              f"{digits}-digit numbers takes {least} tokens of this tokenizer.")
        if short := [str(length) for length in sizes.lengths if length < least]:
            logger.warning("eval: phonebook: no %s form at %s tokens: its smallest book takes %d of this tokenizer",
                           form, ", ".join(short), least)
        for length in lengths:
            rng = np.random.default_rng([sizes.seed, length, form == "reversed"])
            examples = [synthetic.phonebook(rng, engine.tokenizer, length=length, digits=digits, form=form)
                        for _ in range(sizes.samples)]
            rows += _phonebook_rows(engine, examples, f"form={form} length={length} digits={digits}")
    return rows


def _phonebook_rows(engine: Engine, examples: list[synthetic.Example], shape: str) -> list[dict[str, Any]]:
    truth, guess = _answers(engine, examples)
    is_digit = [np.array([engine.tokenizer.decode([int(t)]).strip().isdigit() for t in answer]) for answer in truth]
    numbers = [t[d] for t, d in zip(truth, is_digit, strict=True)]
    guesses = [g[d] for g, d in zip(guess, is_digit, strict=True)]
    exact = [bool((g == t).all()) for g, t in zip(guess, truth, strict=True)]
    digits = np.concatenate([g == t for g, t in zip(guesses, numbers, strict=True)])
    shifted = np.concatenate([g == t for g, t in zip(guesses, [*numbers[1:], numbers[0]], strict=True)])
    return [_share("phonebook.exact", engine, np.array(exact), shape),
            _share("phonebook.digits", engine, digits, shape),
            _share("phonebook.chance_digits", engine, shifted, shape)]


def phonebook_depths(engine: Engine, options: EvalOptions) -> list[dict[str, Any]]:
    """Exact numbers of the standard form by length and by where in the book the asked entry stands.

    `depth` in a row's shape is in percent of the book: 0 the first entry, 100 the last. `samples` books at each of
    DEPTHS; lengths too short for the smallest book are left out, aloud, as in `phonebook`.
    """
    sizes, trained = options.sizes(), engine.run.recipe.data.synthetic
    digits = trained.phonebook_digits if trained else 10
    least = synthetic.phonebook_min_length(engine.tokenizer, digits=digits, form="standard")
    lengths = options.lengths or (engine.run.recipe.train.seq_len,)
    if short := [str(length) for length in lengths if length < least]:
        if len(short) == len(lengths):
            raise ConfigError(f"lengths are {', '.join(short)}; the smallest phone book of {digits}-digit numbers "
                              f"takes {least} tokens of this tokenizer.")
        logger.warning("eval: phonebook-depth: none at %s tokens: the smallest book takes %d of this tokenizer",
                       ", ".join(short), least)
    rows = []
    for length in (length for length in lengths if length >= least):
        for depth in DEPTHS:
            rng = np.random.default_rng([sizes.seed, length, depth, 17])
            examples = [synthetic.phonebook(rng, engine.tokenizer, length=length, digits=digits, form="standard",
                                            depth=depth / 100) for _ in range(sizes.samples)]
            truth, guess = _answers(engine, examples)
            right = np.array([bool((g == t).all()) for g, t in zip(guess, truth, strict=True)])
            shape = f"length={length} depth={depth} digits={digits}"
            rows.append(_share("phonebook_depth.exact", engine, right, shape))
    return rows


def mqar(engine: Engine, options: EvalOptions) -> list[dict[str, Any]]:
    """Share of queried keys whose value is recalled, by number of pairs."""
    rows, sizes = [], options.sizes()
    for pairs in sizes.pairs:
        rng = np.random.default_rng([sizes.seed, pairs, 7])
        examples = [synthetic.mqar(rng, engine.tokenizer, pairs=pairs) for _ in range(sizes.samples)]
        rows.append(_accuracy("mqar.accuracy", engine, examples, f"pairs={pairs} length={len(examples[0].tokens)}"))
    return rows


def copying(engine: Engine, options: EvalOptions) -> list[dict[str, Any]]:
    """Share of the tokens of a random string that are repeated rightly, by the length of prompt and copy."""
    rows, sizes = [], options.sizes()
    for length in sizes.lengths:
        rng = np.random.default_rng([sizes.seed, length, 11])
        examples = [synthetic.copy(rng, engine.tokenizer, length=length) for _ in range(sizes.samples)]
        rows.append(_accuracy("copy.accuracy", engine, examples, f"length={length}"))
    return rows


def _accuracy(what: str, engine: Engine, examples: list[synthetic.Example], shape: str) -> dict[str, Any]:
    """The row of the share of answer tokens, over all examples, that are the likeliest at their place."""
    truth, guess = _answers(engine, examples)
    return _share(what, engine, np.concatenate(guess) == np.concatenate(truth), shape)


def _answers(engine: Engine, examples: list[synthetic.Example]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """True answer tokens of each example, and the likeliest token at each of their places."""
    longest = max(len(example.tokens) for example in examples)
    at_once = max(1, TOKENS_AT_ONCE // longest)
    truth, guess = [], []
    for start in range(0, len(examples), at_once):
        group = examples[start:start + at_once]
        tokens = torch.full((len(group), longest), engine.tokenizer.eod)
        for i, example in enumerate(group):
            # padding lies behind the answers and layers are causal: it cannot change a score
            tokens[i, :len(example.tokens)] = torch.tensor(example.tokens)
        best = engine.logits(tokens).argmax(dim=-1).cpu().numpy()
        for i, example in enumerate(group):
            places = np.flatnonzero(example.answers)
            truth.append(np.asarray(example.tokens)[places])
            guess.append(best[i, places - 1])
    return truth, guess


def _share(what: str, engine: Engine, right: np.ndarray, shape: str) -> dict[str, Any]:
    low, high = wilson(int(right.sum()), right.size)
    return row(what, engine.run.recipe.name, float(right.mean()), "share", shape=shape, low=low, high=high)
