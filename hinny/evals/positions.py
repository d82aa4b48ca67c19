"""Loss by position over one long context: the state goes from piece to piece, so one pass gives every length.

Three texts: held-out documents joined without a break, a file of the user's, and chains of known entropy. Rows have the
shapes of `loss_by_position` in hinny.evals.perplexity: position p predicts a token from the p + 1 before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hinny.data.folder import DataFolder
from hinny.data.pieces import read_text
from hinny.data.sources import TextFiles
from hinny.errors import ConfigError
from hinny.evals.chain import Chain
from hinny.evals.options import SEED, EvalOptions
from hinny.evals.perplexity import check_data, of_folder
from hinny.evals.synthetic.tokens import alphabet
from hinny.infer.engine import Engine
from hinny.infer.reading.losses import TOKENS_AT_ONCE, losses
from hinny.infer.reading.requests import Progress
from hinny.run import row

SEQUENCES = 16
"""Sequences at most, where the options say nothing."""

Rows = list[dict[str, Any]]


def joined(engine: Engine, options: EvalOptions, progress: Progress | None = None) -> Rows:
    """Loss by position on the run's held-out documents, joined in their order with nothing reset between them.

    `lengths`: sequences of the longest (by default, the training length) are read; the others are edges of the rows
    besides the powers of two. `samples`: sequences at most, each following the one before; the shapes say how many
    there were. For each folder of a blend by itself, as in `held_out`.
    ConfigError if the documents are shorter than one sequence, DataError as in `held_out`.
    """
    folders = list(engine.run.recipe.data.folders)
    if not folders:
        raise ConfigError(f"{engine.run.path}: its recipe names no data.path, so there is no held-out text.")
    rows: Rows = []
    for place, path in enumerate(folders):
        check_data(engine, path, place)
        shard = DataFolder(path, engine.run.recipe.model.vocab_size).shard("heldout")
        most = min(shard.n_tokens, _sequences(options) * _length(engine, options) + 1)
        suffix = of_folder(path, folders)
        rows += _text_rows(engine, options, "joined", f"the held-out split of {path}", shard.tokens(0, most), suffix,
                           progress)
    return rows


def own_text(engine: Engine, options: EvalOptions, progress: Progress | None = None) -> Rows:
    """As `joined`, on the text file or folder `haystack`; each file ends in the end-of-document token.

    ConfigError without one, DataError for a file that cannot be read.
    """
    if options.haystack is None:
        raise ConfigError("there is no text to read: give a file or a folder of them, --haystack FILE.")
    tokens: list[int] = []
    for file in TextFiles([options.haystack]).files:
        tokens += [*engine.tokenizer.encode(read_text(file).decode()), engine.tokenizer.eod]
    return _text_rows(engine, options, "text", str(options.haystack), np.array(tokens), "", progress)


def chains(engine: Engine, options: EvalOptions, progress: Progress | None = None) -> Rows:
    """Excess of the loss over the entropy, by position, on Markov chains that only the context can teach.

    Each sequence is of a chain of its own (hinny.evals.chain). `chain_excess`: mean of the loss minus that of the true
    table on the same words, in bits; its bound is that of the best learner. `chain_loss`: the mean of all; its bound is
    the mean of the chains' entropy rates. Lengths and samples as in `joined`; sequence i depends on seed and i alone.
    """
    length, n = _length(engine, options), _sequences(options)
    if length < 4:
        raise ConfigError(f"lengths: {length} tokens are too few for chains; give 4 or more.")
    words = alphabet(engine.tokenizer, 8).letters
    made = []
    for i in range(n):
        rng = np.random.default_rng([SEED if options.seed is None else options.seed, i, 13])
        chain = Chain.draw(rng)
        made.append((chain, chain.write(rng, length + 1)))
    # the first words of a chain, which its order leaves without a context, are not scored
    skip = made[0][0].order - 1
    loss = losses(engine.model, words[np.stack([text for _, text in made])], _at_once(options), progress)[:, skip:]
    true = np.stack([chain.losses(text) for chain, text in made])
    best = np.stack([chain.learner_losses(text) for chain, text in made])
    shape, bits = f"length={length} sequences={n}", 1 / math.log(2)
    entropy = float(np.mean([chain.entropy_rate() for chain, _ in made]))
    rows = [loss_row(engine, "chain_loss", loss * bits, "bits/token", shape, bound=entropy * bits)]
    for first, end in _buckets(length, options):
        first = max(first, skip)
        if first < end:
            inside = slice(first - skip, end - skip)
            rows.append(loss_row(engine, "chain_excess", (loss - true)[:, inside] * bits, "bits/token",
                             f"position={first}-{end - 1} {shape}",
                             bound=float((best - true)[:, inside].mean()) * bits))
    return rows


def _text_rows(engine: Engine, options: EvalOptions, what: str, source: str, tokens: np.ndarray, suffix: str,
               progress: Progress | None) -> Rows:
    """Rows `{what}_loss` by position, and the whole as `{what}_loss` and `{what}_bits_per_byte`."""
    length = _length(engine, options)
    n = min(_sequences(options), (len(tokens) - 1) // length)
    if n < 1:
        raise ConfigError(f"{source} has {len(tokens)} tokens, and a sequence of {length} needs one more than that; "
                          f"give --lengths {max(len(tokens) - 1, 1)} or less, or more text.")
    # a sequence's last target is the first token of the next one
    texts = np.stack([tokens[i * length:(i + 1) * length + 1] for i in range(n)])
    loss = losses(engine.model, texts, _at_once(options), progress)
    shape = f"length={length} sequences={n}{suffix}"
    n_bytes = sum(engine.tokenizer.n_bytes(text[1:].tolist()) for text in texts)
    per_byte = float(loss.sum()) / math.log(2) / n_bytes
    return [loss_row(engine, f"{what}_loss", loss, "nats/token", shape),
            row(f"{what}_bits_per_byte", engine.run.recipe.name, per_byte, "bits/byte", shape=shape),
            *(loss_row(engine, f"{what}_loss_by_position", loss[:, first:end], "nats/token",
                   f"position={first}-{end - 1} {shape}") for first, end in _buckets(length, options))]


def loss_row(engine: Engine, what: str, values: np.ndarray, unit: str, shape: str,
             bound: float | None = None) -> dict[str, Any]:
    """The mean of values (sequences, positions); the interval is 95 % over sequences, and there is none for one."""
    mean, low, high = float(values.mean()), None, None
    if len(values) > 1:
        half = 1.96 * float(values.mean(axis=1).std(ddof=1)) / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return row(what, engine.run.recipe.name, mean, unit, shape=shape, low=low, high=high, bound=bound)


def _buckets(length: int, options: EvalOptions) -> Iterator[tuple[int, int]]:
    """First position and one past the last of each row."""
    powers = [2**i for i in range(2, 63) if 2**i < length]
    return itertools.pairwise(sorted({0, length, *powers, *(options.lengths or ())}))


def _length(engine: Engine, options: EvalOptions) -> int:
    return max(options.lengths) if options.lengths else engine.run.recipe.train.seq_len


def _sequences(options: EvalOptions) -> int:
    return options.samples or SEQUENCES


def _at_once(options: EvalOptions) -> int:
    return options.batch_tokens or TOKENS_AT_ONCE
