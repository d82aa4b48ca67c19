"""How long documents are: in the train split of a folder, or in what a run sees of its folders.

Lengths are in tokens, each document's end-of-document token among them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hinny.data.shards import Shard
from hinny.data.work import put
from hinny.errors import DataError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
STEPS = tuple(2**k for k in range(10, 18))
"""1K to 128K tokens: the lengths whose shares are told."""

PLOT = "lengths.svg"
LONG_SHARE = 0.1
"""Less than this share of the tokens in documents of half a sequence or more is told at the start of an extension."""

log = logging.getLogger("hinny.train")


@dataclass(frozen=True)
class Lengths:
    """lengths (documents,) int64 tokens, rising; times (documents,) float64, how often each is shown beside the others.
    """

    lengths: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, times: np.ndarray | None = None) -> Lengths:
        """In any order; each once without `times`."""
        order = np.argsort(lengths, kind="stable")
        times = np.ones(len(lengths)) if times is None else np.asarray(times, np.float64)
        return cls(np.asarray(lengths, np.int64)[order], times[order])

    @property
    def documents(self) -> int:
        """How many there are, each counted once."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths[-1])

    def quantile(self, share: float) -> int:
        """The least length that `share` of the documents do not exceed."""
        behind = np.cumsum(self.times)
        place = int(np.searchsorted(behind, share * behind[-1] * (1 - 1e-12)))
        return int(self.lengths[min(place, self.documents - 1)])

    def at_least(self, tokens: float) -> tuple[float, float]:
        """Share of the documents that have so many tokens or more, and share of the tokens that lie in these."""
        first = int(np.searchsorted(self.lengths, tokens))
        weighed = self.times * self.lengths
        return (float(self.times[first:].sum() / self.times.sum()),
                float(weighed[first:].sum() / max(weighed.sum(), 1.0)))

    def table(self) -> dict[str, Any]:
        """What data.json has: `quantiles` by share of the documents, `at_least` by tokens: shares of both."""
        shares = {str(step): self.at_least(step) for step in STEPS}
        return {"documents": self.documents, "tokens": int(self.lengths.sum()), "shortest": int(self.lengths[0]),
                "longest": self.longest, "quantiles": {str(share): self.quantile(share) for share in QUANTILES},
                "at_least": {step: {"documents": documents, "tokens": tokens}
                             for step, (documents, tokens) in shares.items()}}

    def drawn(self, seq_len: int | None) -> str:
        """The plot, as SVG: shares of documents and of tokens by length; `seq_len` is marked."""
        # drawing is wanted once a folder and once a run, and its library is slow to load
        from hinny.draw.bars import Bars, Mark, binary, draw_bars

        powers = np.log2(np.maximum(self.lengths, 1)).astype(np.int64)
        first, last = int(powers[0]), int(powers[-1])
        weighed = self.times * self.lengths
        counts = [np.bincount(powers - first, weights=one, minlength=last - first + 1) / max(one.sum(), 1e-300)
                  for one in (self.times, weighed)]
        mark = None
        if seq_len is not None:
            share = per_cent(self.at_least(seq_len)[1])
            mark = Mark(seq_len, f"{binary(seq_len)}: {share} of the tokens are in documents at least that long")
        return draw_bars([2.0**k for k in range(first, last + 2)],
                         [Bars("of documents", counts[0].tolist()), Bars("of tokens", counts[1].tolist())],
                         title="Length of documents", x="tokens of a document", y="share of all", mark=mark)


def per_cent(share: float) -> str:
    """0.123 is "12.3 %"."""
    return f"{100 * share:.1f} %"


def document_lengths(shard: Shard) -> np.ndarray:
    """(documents,) int64 tokens of each document."""
    return np.diff(shard.document_ends, prepend=0)


def write_plot(folder: Path, lengths: Lengths, seq_len: int | None) -> None:
    """Draw `lengths` into the folder; a plot that is there with the same content is left alone."""
    content = lengths.drawn(seq_len).encode()
    file = folder / PLOT
    try:
        if file.is_file() and file.read_bytes() == content:
            return
        put(folder, PLOT, lambda out: out.write(content))
    except OSError as fault:
        raise DataError(f"{file}: cannot be written: {fault.strerror}.") from None


def long_share(lengths: Lengths, seq_len: int) -> float:
    """The share of the tokens that lie in documents of at least half a sequence of `seq_len` tokens."""
    return lengths.at_least(seq_len / 2)[1]


def check_long(lengths: Lengths, *, base_len: int, seq_len: int, folders: Sequence[str]) -> None:
    """Whether a run can learn from `lengths`, of its `folders`, what its base, trained on `base_len`, has not seen.

    Nothing to check where `seq_len` is not above `base_len`. DataError where no document is longer than `base_len`; a
    warning to the logger "hinny.train" where less than LONG_SHARE of the tokens lie in documents of half a sequence.
    """
    if seq_len <= base_len:
        return
    share = long_share(lengths, seq_len)
    found = (f"{', '.join(folders)}: {lengths.documents} train documents, the longest of {lengths.longest} tokens, the "
             f"median of {lengths.quantile(0.5)}; {per_cent(share)} of the tokens are in documents of at least half of "
             f"train.seq_len ({seq_len})")
    if lengths.longest <= base_len:
        raise DataError(f"{found}. No document is longer than the {base_len} tokens that the base was trained on: "
                        "longer sequences of them would teach nothing about longer texts. Prepare longer documents "
                        f"(hinny prepare --min-tokens {base_len + 1}), or keep train.seq_len={base_len}.")
    if share < LONG_SHARE:
        log.warning("%s. Most sequences will be packed with short, unrelated documents; prepare longer ones (hinny "
                    "prepare --min-tokens), show long ones more often (data.long), or put those of one source next to "
                    "each other (data.join).", found)
