"""How documents are put next to each other in an epoch of the order "windows", where not as the shard has them.

An epoch lays documents end to end. Without data.long it has each of them once; with it, number k of the long ones, in
the shard's order, comes floor((k + 1) · W) − floor(k · W) times, W being their weight, so n of them come floor(n · W)
times. The epoch then has as many rounds as any document has copies, and no round has two of one: documents that come
once are shared out over the rounds in equal parts, and the copies of the others lie as many rounds apart as they can.
Within a round data.join says the order: the shard's own; by source, sources in a seeded order that stays the same; or
drawn anew for each epoch.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from hinny.config import DataConfig, LongConfig
from hinny.data.folder import DataFolder
from hinny.data.lengths import document_lengths
from hinny.data.shards import Shard
from hinny.errors import DataError


class Layout:
    """The tokens of an epoch of one shard, `n_tokens` in each.

    times (documents,): how often an epoch has each document. groups (documents,) or None: what is adjacent. shuffled:
    a random order anew each epoch. seed: words of a seed that nothing else has.
    """

    def __init__(self, shard: Shard, times: np.ndarray, groups: np.ndarray | None, shuffled: bool,
                 seed: tuple[int, ...]) -> None:
        self._shard = shard
        self._lengths = document_lengths(shard)
        self._starts = shard.document_ends - self._lengths
        self._shuffled = shuffled
        self._seed = seed
        self._times = times
        self._order = np.arange(len(times))
        if groups is not None:
            # the last word tells this draw from those of epochs
            ranks = np.random.default_rng([seed[0], 0, *seed[1:], 2]).permutation(int(groups.max(initial=0)) + 1)
            self._order = np.argsort(ranks[groups], kind="stable")
        self.n_tokens = int((times * self._lengths).sum())
        self._epoch = -1
        self._lay(0)

    def _lay(self, epoch: int) -> None:
        """Make `documents` and `ends` those of an epoch; the last one's are kept."""
        if self._epoch >= 0 and (epoch == self._epoch or not self._shuffled):
            return
        if self._shuffled:
            draws = np.random.default_rng([self._seed[0], epoch, *self._seed[1:], 1])
            self._documents = laid_out(draws.permutation(self._order), self._times, draws)
        else:
            self._documents = laid_out(self._order, self._times)
        self._ends = np.cumsum(self._lengths[self._documents], dtype=np.int64)
        self._epoch = epoch

    def read(self, epoch: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens of an epoch from `start`, and the number of each token's document within them."""
        self._lay(epoch)
        places = np.searchsorted(self._ends, np.arange(start, start + length), side="right")
        tokens = np.empty(length, self._shard.dtype)
        done = 0
        for place in range(int(places[0]), int(places[-1]) + 1):
            document = self._documents[place]
            # tokens of the document before the window, and where the window leaves it
            before = max(0, start - int(self._ends[place] - self._lengths[document]))
            stop = min(int(self._lengths[document]), before + length - done)
            first = int(self._starts[document])
            tokens[done:done + stop - before] = self._shard.tokens(first + before, first + stop)
            done += stop - before
        return tokens, places - places[0]


def laid_out(order: np.ndarray, times: np.ndarray, draws: np.random.Generator | None = None) -> np.ndarray:
    """The documents of an epoch, round by round.

    order (documents,): all of them, as they stand within a round, unless `draws` says it for each round anew.
    times (documents,): how often the epoch has each.
    """
    n = int(times.max(initial=1))
    once, often = order[times[order] == 1], order[times[order] > 1]
    # of a document that comes t times, copy j is j · n / t rounds behind the first, and first ones are shared out too
    copies = times[often]
    copy = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
    later = (np.repeat(np.arange(len(often)), copies) + copy * n // np.repeat(copies, copies)) % n
    documents = np.concatenate([once, np.repeat(often, copies)])
    rounds = np.concatenate([np.arange(len(once)) * n // max(1, len(once)), later])
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    found = np.lexsort((places[documents] if draws is None else draws.random(len(documents)), rounds))
    documents, rounds = documents[found], rounds[found]
    # the last of a round may be the first of the next
    for at in np.flatnonzero(np.diff(rounds)) + 1:
        if documents[at - 1] == documents[at] and at + 1 < len(rounds) and rounds[at + 1] == rounds[at]:
            documents[[at, at + 1]] = documents[[at + 1, at]]
    return documents


def shown(lengths: np.ndarray, long: LongConfig | None) -> np.ndarray:
    """(documents,) int64: how often an epoch shows documents of these lengths."""
    times = np.ones(len(lengths), np.int64)
    if long is not None:
        places = np.flatnonzero(lengths >= long.min_tokens)
        # as it is written: 1.1 is eleven tenths
        weight = Fraction(str(long.weight))
        times[places] = [(k + 1) * weight.numerator // weight.denominator - k * weight.numerator // weight.denominator
                         for k in range(len(places))]
    return times


def layout(folder: DataFolder, config: DataConfig, seed: int, key: tuple[int, ...]) -> Layout | None:
    """The layout of a folder's train split; None where the shard is read as it is."""
    if config.join == "order" and config.long is None:
        return None
    shard = folder.shard("train")
    groups = folder.origins("train") if config.join == "source" else None
    # a single folder has no key; 0 is none of a blend's
    return Layout(shard, shown(document_lengths(shard), config.long), groups, config.join == "random",
                  (seed, *(key or (0,))))


def check_layout(config: DataConfig, folders: list[DataFolder]) -> None:
    """DataError where data.long would show no document of these folders more often."""
    if config.long is None:
        return
    found = {folder.path: document_lengths(folder.shard("train")) for folder in folders}
    if not any((lengths >= config.long.min_tokens).any() for lengths in found.values()):
        figures = "; ".join(f"{path} has {len(lengths)}, the longest of {lengths.max(initial=0)} tokens"
                            for path, lengths in found.items())
        raise DataError(f"data.long.min_tokens is {config.long.min_tokens}, and no train document is that long: "
                        f"{figures}. Give a smaller one, prepare longer documents, or remove [data.long].")
    if not any((shown(lengths, config.long) > 1).any() for lengths in found.values()):
        most = max(int((lengths >= config.long.min_tokens).sum()) for lengths in found.values())
        raise DataError(f"data.long.weight is {config.long.weight}: no folder has more than {most} documents of "
                        f"{config.long.min_tokens} tokens or more, and floor({most} x {config.long.weight}) = {most} "
                        "shows each of them once. Give a larger weight, or remove [data.long].")
