"""Megatron's order of text, index by index (core/datasets: GPTDataset, BlendedDataset and their C++ helpers).

A source's sequences are laid out in a shuffled order of documents, which stays the same over all epochs of the run or
is drawn apart for a last epoch that is used by less than 80 %. Sample i begins in that layout at token i · T and holds
T + 1; a second shuffle orders the samples. A blend takes the next sample of the source that lags its weight most.
Every draw is numpy.random.RandomState's, in Megatron's order of calls, and the arrays have Megatron's types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hinny.data.folder import DataFolder
from hinny.data.windows import Row
from hinny.errors import DataError

LAST_EPOCH = 0.80
"""A last epoch that is used by less than this is drawn apart."""

SURPLUS = 0.005
"""Samples asked of each source of a blend beyond its weight."""


@dataclass(frozen=True)
class Indices:
    """The order of one source.

    document_index: (e · documents) int32, numbers of sequences of the shard. sample_index: (N + 1, 2), the place in
    document_index and the token there at which each sample begins; int64 where int32 cannot hold them.
    shuffle_index: (N), uint32 or int64, the row of sample_index that is read as sample i. epochs: e.
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray
    epochs: int


def indices(lengths: np.ndarray, sequences: range, *, samples: int, seq_len: int, seed: int) -> Indices:
    """The order of the `sequences` of a shard with sequence `lengths`, for a run that takes `samples` samples of it.

    DataError if there are no tokens.
    """
    ids = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    tokens = int(lengths[sequences.start:sequences.stop].sum(dtype=np.int64))
    if not tokens:
        raise DataError(f"there are no tokens in sequences {sequences.start} to {sequences.stop} of the shard.")
    epochs = max(-(-(samples * seq_len + 1) // tokens), 1)
    before = ((epochs - 1) * tokens - 1) // seq_len
    apart = epochs > 1 and samples - before < int(LAST_EPOCH * ((tokens - 1) // seq_len))
    draws = np.random.RandomState(seed)
    if apart:
        first, last = np.tile(ids, epochs - 1), ids.copy()
        draws.shuffle(first)
        draws.shuffle(last)
        documents = np.concatenate([first, last])
    else:
        documents = np.tile(ids, epochs)
        draws.shuffle(documents)
    n = (epochs * tokens - 1) // seq_len
    starts = sample_starts(lengths, documents, n, seq_len)
    shuffled = np.arange(n, dtype=np.uint32 if n < np.iinfo(np.uint32).max - 1 else np.int64)
    draws.shuffle(shuffled[:before] if apart else shuffled)
    if apart and before != n:
        draws.shuffle(shuffled[before:])
    return Indices(documents, starts, shuffled, epochs)


def sample_starts(lengths: np.ndarray, documents: np.ndarray, samples: int, seq_len: int) -> np.ndarray:
    """(samples + 1, 2) place in `documents` and token there of the tokens 0, T, 2T, …

    Empty documents are passed over, but for the first, where Megatron's walk begins.
    """
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    tokens = np.arange(samples + 1, dtype=np.int64) * seq_len
    place = np.searchsorted(ends, tokens, side="right")
    place[0] = 0
    offset = tokens - np.concatenate([[0], ends])[place]
    widest = max(len(documents), int(lengths.max()))
    kind = np.int32 if widest <= np.iinfo(np.int32).max else np.int64
    return np.stack([place, offset], axis=1).astype(kind)


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights over their sum, in float64."""
    array = np.array(weights, dtype=np.float64)
    return [float(weight) for weight in array / np.sum(array)]


def requested(samples: int, share: float, order: str) -> int:
    """Samples asked of a source of a blend for a run of `samples`: by Megatron Core or, megatron-ssm, that branch."""
    if order == "megatron-ssm":
        return math.ceil(samples * share * 1.005)
    return math.ceil(math.ceil(samples * share) * (1 + SURPLUS))


def blend_indices(shares: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(samples) int16 source of each sample, and (samples) int64 its number within the source.

    Greedy: the source that lags its share most comes next, the first of them if several do. Shares such as 0.7 and 0.3
    give a pattern that repeats, so a stretch that was stepped through is guessed to come again, and the guess is kept
    as far as the rule itself confirms it: the same result, several times sooner.
    """
    sources = np.zeros(samples, np.int16)
    counts = np.zeros(len(shares), np.int64)
    period = min(math.lcm(*(Fraction(share).limit_denominator(100).denominator for share in shares)), 1000)
    done, reach = 0, period
    while done < samples:
        stop = min(done + period, samples)
        _step(shares, sources, counts, done, stop)
        guess = np.resize(sources[done:stop], min(reach, samples - stop))
        right = _confirmed(shares, guess, counts, stop)
        sources[stop:stop + right] = guess[:right]
        counts += np.bincount(guess[:right], minlength=len(shares))
        done = stop + right
        reach = min(2 * reach, 1_000_000) if right == len(guess) else max(right, period)
    numbers = np.zeros(samples, np.int64)
    for source, count in enumerate(counts.tolist()):
        numbers[sources == source] = np.arange(count)
    return sources, numbers


def _step(shares: Sequence[float], sources: np.ndarray, counts: np.ndarray, start: int, stop: int) -> None:
    """Fill `sources` [start, stop) by the rule and bring `counts` up to date, both in place."""
    now = counts.tolist()
    for i in range(start, stop):
        lag = [share * max(i, 1) - count for share, count in zip(shares, now, strict=True)]
        chosen = lag.index(max(lag))
        sources[i] = chosen
        now[chosen] += 1
    counts[:] = now


def _confirmed(shares: Sequence[float], guess: np.ndarray, counts: np.ndarray, start: int) -> int:
    """How many of the guessed sources of the samples from `start` on are right, before the first that is not."""
    places = np.arange(start, start + len(guess))
    best, chosen = np.full(len(guess), -np.inf), np.zeros(len(guess), np.int16)
    for source, share in enumerate(shares):
        own = guess == source
        lag = share * places - (counts[source] + np.cumsum(own) - own)
        chosen[lag > best] = source
        best = np.maximum(lag, best)
    wrong = np.flatnonzero(chosen != guess)
    return int(wrong[0]) if len(wrong) else len(guess)


class Source:
    """Sample i of one folder's train split, in Megatron's order."""

    def __init__(self, folder: DataFolder, samples: int, seq_len: int, seed: int) -> None:
        self.folder = folder
        self._shard, sequences = folder.sequences("train")
        try:
            self.indices = indices(self._shard.lengths, sequences, samples=samples, seq_len=seq_len, seed=seed)
        except DataError as fault:
            raise DataError(f"{folder.path}: {fault}") from None

    def row(self, sample: int) -> Row:
        """The pieces of documents from the sample's beginning to the first token of the next one, that included."""
        if sample >= len(self.indices.shuffle_index):
            raise DataError(f"{self.folder.path}: sample {sample} of {len(self.indices.shuffle_index)}: the run is "
                            "longer than its indices.")
        number = int(self.indices.shuffle_index[sample])
        (first, begin), (last, end) = self.indices.sample_index[number:number + 2].tolist()
        pieces = []
        for place in range(first, last + 1):
            document = self._shard[int(self.indices.document_index[place])]
            pieces.append(document[begin if place == first else 0:end + 1 if place == last else None])
        lengths = [len(piece) for piece in pieces]
        return Row(np.concatenate(pieces), np.repeat(np.arange(len(pieces)), lengths), f"Megatron's sample {number}")

    def epochs(self, samples: int) -> list[float]:
        """How often the run shows the source."""
        n = len(self.indices.shuffle_index) / self.indices.epochs
        return [samples / n]


class Blended:
    """Several folders in Megatron's blend; `samples` is the length of the run."""

    def __init__(self, folders: Sequence[DataFolder], weights: Sequence[float], order: str, *, samples: int,
                 seq_len: int, seed: int) -> None:
        shares = normalized(weights)
        self._sources = [Source(folder, requested(samples, share, order), seq_len, seed)
                         for folder, share in zip(folders, shares, strict=True)]
        # twice, as Megatron does: the second sum need not be 1 to the last bit
        self._source, self._number = blend_indices(normalized(shares), samples)

    def row(self, sample: int) -> Row:
        """Sample `sample` of the blend."""
        source = self._sources[self._source[sample]]
        row = source.row(int(self._number[sample]))
        return Row(row.tokens, row.documents, f"{row.name} of {source.folder.path}")

    def epochs(self, samples: int) -> list[float]:
        """How often the first `samples` samples show each source."""
        counts = np.bincount(self._source[:samples], minlength=len(self._sources)).tolist()
        return [source.epochs(count)[0] for source, count in zip(self._sources, counts, strict=True)]
