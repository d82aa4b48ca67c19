"""The training stream, a pure function of (seed, step): windows of real text, a share of synthetic recall mixed in.

Sample i of the run is row i % batch_size of step i // batch_size. It is synthetic where floor((i + 1) · share) is one
more than floor(i · share), so the synthetic samples are spread evenly and the number of text samples before i is known
without counting. Text is cut into windows of T + 1 tokens that overlap by one, so that every token is predicted once an
epoch; each epoch has its own seeded order of all windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hinny.config import DataConfig, SyntheticConfig
from hinny.data.folder import DataFolder
from hinny.data.shards import Shard
from hinny.data.synthetic import TRAINING
from hinny.errors import DataError
from hinny.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """Sequences to train on or to score; targets[:, t] is the token after tokens[:, t].

    tokens, targets: (b t) int64. mask: (b t) bool, the targets that count. segments: (b t) int32, the number of the
    token's document within its row; None where documents may see each other. names: what each row is.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    segments: np.ndarray | None
    names: tuple[str, ...]

    def describe(self) -> str:
        """Which windows and synthetic samples these are."""
        return "; ".join(self.names)


class Stream:
    """Batches of a run. Raises DataError where the data folder does not fit the run."""

    def __init__(self, config: DataConfig, *, seq_len: int, batch_size: int, seed: int, vocab_size: int) -> None:
        self._folder = DataFolder(config.path, vocab_size)
        self._shard = self._folder.shard("train")
        self._config = config
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._share = Fraction(str(config.synthetic.share)) if config.synthetic else Fraction(0)
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        self.n_windows = (self._shard.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise DataError(f"{config.path}: the train split has {self._shard.n_tokens} tokens, but one sequence of "
                            f"seq_len {seq_len} needs {seq_len + 1}; prepare more text or set a smaller train.seq_len.")
        settings = config.model_dump(mode="json", exclude={"path"}) | {
            "seq_len": seq_len, "batch_size": batch_size, "seed": seed, "data": self._folder.fingerprint}
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step `step`, counted from 0."""
        samples = range(step * self._batch_size, (step + 1) * self._batch_size)
        synthetic = [i for i in samples if self._n_synthetic(i + 1) > self._n_synthetic(i)]
        shape = (self._batch_size, self._seq_len + 1)
        tokens, segments, counted = np.zeros(shape, np.int64), np.zeros(shape, np.int32), np.zeros(shape, bool)
        names = [""] * self._batch_size
        text_rows = [i - samples[0] for i in samples if i not in synthetic]
        if text_rows:
            places = [self._window(samples[r] - self._n_synthetic(samples[r])) for r in text_rows]
            starts = np.array([window for _, window in places]) * self._seq_len
            tokens[text_rows], segments[text_rows] = read_windows(self._shard, starts, self._seq_len + 1)
            counted[text_rows] = True
            for r, (epoch, window) in zip(text_rows, places, strict=True):
                names[r] = f"sample {samples[r]}: train window {window} of epoch {epoch}"
        for i in synthetic:
            r = i - samples[0]
            assert self._config.synthetic is not None
            task, tokens[r], segments[r], counted[r] = synthetic_row(
                np.random.default_rng([self._seed, i, 1]), self._folder.tokenizer, self._config.synthetic, shape[1])
            names[r] = f"sample {i}: synthetic {task}"
        return _batch(tokens, segments, counted, names, self._config)

    def _n_synthetic(self, i: int) -> int:
        """Synthetic samples among the first i; exact, as floating point would not be."""
        return i * self._share.numerator // self._share.denominator

    def _window(self, text_sample: int) -> tuple[int, int]:
        """Epoch and window of a text sample, by the epoch's own permutation; the last used one is kept."""
        epoch, place = divmod(text_sample, self.n_windows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.n_windows)
            self._epoch = epoch
        return epoch, int(self._order[place])


def read_windows(shard: Shard, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (b length) from each of `starts`, and the number of each token's document within its row."""
    tokens = np.stack([shard.tokens(start, start + length) for start in starts.tolist()])
    documents = np.stack([shard.documents_of(start, start + length) for start in starts.tolist()])
    return tokens, documents - documents[:, :1]


def synthetic_row(rng: np.random.Generator, tokenizer: Tokenizer, config: SyntheticConfig,
                  length: int) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """A task drawn by weight, and `length` tokens of its documents, their numbers, and which tokens are answers.

    Each document ends in eod; the last one is cut.
    """
    # in the order of names, so that the order in the recipe does not matter
    tasks = sorted(config.tasks)
    weights = np.array([config.tasks[task] for task in tasks])
    task = tasks[int(rng.choice(len(tasks), p=weights / weights.sum()))]
    tokens: list[int] = []
    answers: list[bool] = []
    segments: list[int] = []
    n = 0
    while len(tokens) < length:
        example = TRAINING[task](rng, tokenizer, length - len(tokens) - 1, config)
        tokens += [*example.tokens, tokenizer.eod]
        answers += [*example.answers, False]
        segments += [n] * (len(example.tokens) + 1)
        n += 1
    return task, np.array(tokens[:length]), np.array(segments[:length], np.int32), np.array(answers[:length])


def _batch(tokens: np.ndarray, segments: np.ndarray, counted: np.ndarray, names: list[str],
           config: DataConfig) -> Batch:
    """Inputs and targets from rows of T + 1 tokens; `counted` are the tokens that may count as targets."""
    inputs, targets, mask = tokens[:, :-1].copy(), tokens[:, 1:].copy(), counted[:, 1:].copy()
    if config.boundaries == "leak":
        return Batch(inputs, targets, mask, None, tuple(names))
    # nothing in a document tells how the next one begins
    mask &= segments[:, 1:] == segments[:, :-1]
    return Batch(inputs, targets, mask, segments[:, :-1].copy(), tuple(names))


def heldout_batches(config: DataConfig, *, seq_len: int, batch_size: int, vocab_size: int | None = None,
                    windows: int | None = None) -> Iterator[Batch]:
    """The held-out split in its own order, `batch_size` windows at a time, each token predicted once.

    The last window is filled up with eod that does not count. `windows`: only the first so many. `vocab_size`: as in
    DataFolder.
    """
    folder = DataFolder(config.path, vocab_size)
    shard = folder.shard("heldout")
    if shard.n_tokens < 2:
        raise DataError(f"{config.path}: the held-out split has {shard.n_tokens} tokens; prepare more text.")
    n_windows = -(-(shard.n_tokens - 1) // seq_len)
    n_windows = n_windows if windows is None else min(windows, n_windows)
    for first in range(0, n_windows, batch_size):
        numbers = range(first, min(first + batch_size, n_windows))
        shape = (len(numbers), seq_len + 1)
        tokens, segments = np.full(shape, folder.tokenizer.eod), np.zeros(shape, np.int32)
        counted = np.zeros(shape, bool)
        for r, number in enumerate(numbers):
            start, stop = number * seq_len, min((number + 1) * seq_len + 1, shard.n_tokens)
            tokens[r, :stop - start] = shard.tokens(start, stop)
            documents = shard.documents_of(start, stop)
            segments[r, :stop - start] = documents - documents[0]
            segments[r, stop - start:] = documents[-1] - documents[0] + 1
            counted[r, :stop - start] = True
        yield _batch(tokens, segments, counted, [f"held-out window {number}" for number in numbers], config)
