"""The training stream, a pure function of (seed, step): sequences of real text, a share of synthetic recall mixed in.

Sample i of the run is row i % batch_size of step i // batch_size. It is synthetic where floor((i + 1) · share) is one
more than floor(i · share), so the synthetic samples are spread evenly and the number of text samples before i is known
without counting. Which text a text sample is, hinny.data.windows says, or hinny.data.megatron.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from hinny.config import DataConfig, SyntheticConfig
from hinny.data import megatron
from hinny.data.folder import DataFolder, open_folders
from hinny.data.layout import check_layout, shown
from hinny.data.lengths import Lengths, document_lengths
from hinny.data.synthetic import TRAINING, check_room
from hinny.data.windows import Blend, Windows, taken
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
    """Batches of a run of `steps` steps. Raises DataError where the data do not fit the run."""

    def __init__(self, config: DataConfig, *, seq_len: int, batch_size: int, seed: int, vocab_size: int,
                 steps: int) -> None:
        self.arguments: dict[str, Any] = dict(config=config, seq_len=seq_len, batch_size=batch_size, seed=seed,
                                              vocab_size=vocab_size, steps=steps)
        """What makes the same stream elsewhere."""
        folders = open_folders(config, vocab_size)
        self._tokenizer = folders[0].tokenizer
        if config.synthetic:
            check_room(self._tokenizer, config.synthetic, seq_len + 1)
        self._config = config
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._share = Fraction(str(config.synthetic.share)) if config.synthetic else Fraction(0)
        samples = steps * batch_size
        check_layout(config, folders)
        self.order = _text_order(config, folders, samples=samples, seq_len=seq_len, seed=seed)
        self.fingerprint = _fingerprint(config, folders, seq_len=seq_len, batch_size=batch_size, seed=seed,
                                        samples=samples)
        self.epochs = dict(zip(config.folders, self.order.epochs(samples - taken(samples, self._share)), strict=True))
        """Folder → how often the run shows its train split."""
        self._folders = folders

    @property
    def practises(self) -> bool:
        """Whether some of its samples are written, not read."""
        return self._share > 0

    def lengths(self) -> Lengths:
        """Of the documents of all folders, each as often as the run shows it beside the others."""
        found = [document_lengths(folder.shard("train")) for folder in self._folders]
        times = []
        for lengths, weight in zip(found, self._config.folders.values(), strict=True):
            copies = shown(lengths, self._config.long).astype(float)
            # a folder's weight is its share of the tokens
            times.append(copies * (weight / float((copies * lengths).sum())) if len(found) > 1 else copies)
        return Lengths.of(np.concatenate(found), np.concatenate(times))

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """The batch of optimiser step `step`, counted from 0; `rows`: these of its rows alone."""
        rows = range(self._batch_size) if rows is None else rows
        first = step * self._batch_size
        shape = (len(rows), self._seq_len + 1)
        tokens, segments, counted = np.zeros(shape, np.int64), np.zeros(shape, np.int32), np.zeros(shape, bool)
        names = []
        for r, i in enumerate(range(first + rows.start, first + rows.stop)):
            synthetic = taken(i, self._share)
            if taken(i + 1, self._share) > synthetic:
                assert self._config.synthetic is not None
                task, tokens[r], segments[r], counted[r] = synthetic_row(
                    np.random.default_rng([self._seed, i, 1]), self._tokenizer, self._config.synthetic, shape[1])
                names.append(f"sample {i}: synthetic {task}")
            else:
                row = self.order.row(i - synthetic)
                tokens[r], segments[r], counted[r] = row.tokens, row.documents, True
                names.append(f"sample {i}: {row.name}")
        return _batch(tokens, segments, counted, names, self._config, self._tokenizer.eod)


def _text_order(config: DataConfig, folders: list[DataFolder], *, samples: int, seq_len: int,
                seed: int) -> Windows | Blend | megatron.Source | megatron.Blended:
    weights = list(config.folders.values())
    if config.order != "windows":
        if config.blend is None:
            return megatron.Source(folders[0], samples, seq_len, seed)
        return megatron.Blended(folders, weights, config.order, samples=samples, seq_len=seq_len, seed=seed)
    if config.blend is None:
        return Windows(folders[0], config, seq_len, seed)
    # a third number from 2 on: 1 is that of synthetic sequences
    return Blend([Windows(folder, config, seq_len, seed, (k + 2,)) for k, folder in enumerate(folders)], weights)


def _fingerprint(config: DataConfig, folders: list[DataFolder], *, seq_len: int, batch_size: int, seed: int,
                 samples: int) -> str:
    """Hash of all that changes the stream; where the folders lie does not."""
    data: Any = folders[0].fingerprint
    if config.blend is not None:
        data = [[folder.fingerprint, weight] for folder, weight in zip(folders, config.blend.values(), strict=True)]
    settings = {"boundaries": config.boundaries, "seq_len": seq_len, "batch_size": batch_size, "seed": seed,
                "data": data, "synthetic": config.model_dump(mode="json")["synthetic"]}
    if config.order != "windows":
        settings |= {"order": config.order, "samples": samples}
    if config.eod_mask_loss:
        settings["eod_mask_loss"] = True
    if config.join != "order":
        settings["join"] = config.join
    if config.long is not None:
        settings["long"] = config.long.model_dump(mode="json")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
           config: DataConfig, eod: int) -> Batch:
    """Inputs and targets from rows of T + 1 tokens; `counted` are the tokens that may count as targets."""
    inputs, targets, mask = tokens[:, :-1].copy(), tokens[:, 1:].copy(), counted[:, 1:].copy()
    if config.eod_mask_loss:
        mask &= inputs != eod
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
        yield _batch(tokens, segments, counted, [f"held-out window {number}" for number in numbers], config,
                     folder.tokenizer.eod)
