"""Our order of text: windows of T + 1 tokens that overlap by one, each once an epoch, from one folder or a blend.

A source's sample j is window j % n of epoch j // n, in that epoch's own seeded order. Windows cut the shard as it lies,
or documents that hinny.data.layout puts next to each other in another way. In a blend, sample j belongs to
the first source k for which floor((j + 1) · s) is one more than floor(j · s), where s is its share of the weights from
k on; the samples that are left are counted anew for the sources behind it. So weights are kept exactly and evenly, and
source and place follow from j alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hinny.config import DataConfig
from hinny.data.folder import DataFolder
from hinny.data.layout import layout
from hinny.data.shards import Shard
from hinny.errors import DataError


@dataclass(frozen=True)
class Row:
    """One sequence of text: tokens (t + 1), the number of each token's document in the row (t + 1), what it is."""

    tokens: np.ndarray
    documents: np.ndarray
    name: str


class Windows:
    """The train split of one folder, by data.join and data.long of `config`.

    `key` makes the seed of its own among those of a blend.
    """

    def __init__(self, folder: DataFolder, config: DataConfig, seq_len: int, seed: int,
                 key: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self._shard = folder.shard("train")
        self._layout = layout(folder, config, seed, key)
        self._seq_len = seq_len
        self._seed = seed
        self._key = key
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        n_tokens = self._shard.n_tokens if self._layout is None else self._layout.n_tokens
        self.n_windows = (n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise DataError(f"{folder.path}: the train split has {n_tokens} tokens, but one sequence of "
                            f"seq_len {seq_len} needs {seq_len + 1}; prepare more text or set a smaller train.seq_len.")

    def row(self, sample: int) -> Row:
        """Sample `sample` of this source, counted from 0 over all epochs; the last used epoch's order is kept."""
        epoch, place = divmod(sample, self.n_windows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch, *self._key]).permutation(self.n_windows)
            self._epoch = epoch
        window = int(self._order[place])
        start, length = window * self._seq_len, self._seq_len + 1
        found = (read_window(self._shard, start, length) if self._layout is None
                 else self._layout.read(epoch, start, length))
        return Row(*found, f"train window {window} of epoch {epoch}")

    def epochs(self, samples: int) -> list[float]:
        """How often `samples` samples show the source."""
        return [samples / self.n_windows]


class Blend:
    """Several sources, in proportion to their weights, in the order in which the recipe names them."""

    def __init__(self, sources: Sequence[Windows], weights: Sequence[float]) -> None:
        # as they are written: 0.7 is seven tenths
        exact = [Fraction(str(weight)) for weight in weights]
        self._sources = sources
        self._shares = [weight / sum(exact[k:]) for k, weight in enumerate(exact)]

    def place(self, sample: int) -> tuple[int, int]:
        """Source of sample `sample` and how many of the earlier samples are from it."""
        for k, share in enumerate(self._shares):
            before = taken(sample, share)
            if taken(sample + 1, share) > before:
                return k, before
            sample -= before
        raise AssertionError("the last source takes all that is left")

    def row(self, sample: int) -> Row:
        """Sample `sample` of the blend."""
        k, place = self.place(sample)
        row = self._sources[k].row(place)
        return Row(row.tokens, row.documents, f"{row.name} of {self._sources[k].folder.path}")

    def epochs(self, samples: int) -> list[float]:
        """How often `samples` samples show each source."""
        found = []
        for source, share in zip(self._sources, self._shares, strict=True):
            count = taken(samples, share)
            found += source.epochs(count)
            samples -= count
        return found


def taken(samples: int, share: Fraction) -> int:
    """How many of the first `samples` an even spread of `share` takes; exact, as floating point would not be."""
    return samples * share.numerator // share.denominator


def read_window(shard: Shard, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`length` tokens from `start`, and the number of each token's document within them."""
    documents = shard.documents_of(start, start + length)
    return shard.tokens(start, start + length), documents - documents[0]
