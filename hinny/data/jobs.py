"""What is done with each piece of a source: its texts are hashed, sampled for a tokenizer, encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hinny import tokenizer as tokenizers
from hinny.data.origins import Names
from hinny.data.pieces import Document, Piece, decode
from hinny.data.shards import token_dtype
from hinny.data.split import KEY_BYTES, Scan, key, line_end
from hinny.data.work import damaged, load_arrays, save_arrays
from hinny.data.workers import Job, Tick
from hinny.errors import DataError

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class ScanJob(Job):
    """Size, key and, if it has one, source of each document, written as the part scan-NUMBER."""

    number: int
    piece: Piece
    folder: Path
    salt: bytes

    def run(self, tick: Tick, batch: int) -> None:
        sizes, keys, blank, sources = [], [], [], []
        names = Names()
        for document in self.piece.documents():
            sizes.append(len(document.data))
            keys.append(key(self.salt, document.data))
            blank.append(not document.data.strip())
            if document.source is not None:
                sources.append(names.number(document.source))
            tick(len(document.data))
        save_arrays(self.folder, scan_name(self.number), {
            "sizes": np.array(sizes, np.int64), "blank": np.array(blank, bool),
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "piece_size": np.array(self.piece.size), "sources": np.array(sources, np.uint32),
            "names": np.frombuffer(json.dumps(names.listed).encode(), np.uint8)})


class Chosen(NamedTuple):
    """Text that was chosen: of the document at `place` of its piece, for a split."""

    split: str
    text: str
    place: int


@dataclass(frozen=True)
class ChosenJob(Job):
    """Work on the documents that were chosen of a piece; keys, train_stops and stops are the Plan's."""

    number: int
    piece: Piece
    salt: bytes
    keys: np.ndarray
    train_stops: np.ndarray
    stops: np.ndarray

    def texts(self, tick: Tick) -> Iterator[Chosen]:
        """Every chosen document; DataError if it is not what it was."""
        found = 0
        for place, document in enumerate(self.piece.documents()):
            found += 1
            if place < len(self.stops) and self.stops[place]:
                yield from self._parts(document, place)
            tick(len(document.data))
        if found != len(self.stops):
            raise DataError(f"the texts changed while they were read: {found} documents where there were "
                            f"{len(self.stops)}; try again when they are at rest.")

    def _parts(self, document: Document, place: int) -> Iterator[Chosen]:
        data = document.data
        if key(self.salt, data) != self.keys[place].tobytes():
            raise DataError(f"{document.name} changed while it was read; try again when the texts are at rest.")
        train_stop, stop = (line_end(data, int(limit)) for limit in (self.train_stops[place], self.stops[place]))
        for split, part in zip(SPLITS, (data[:train_stop], data[train_stop:stop]), strict=True):
            if part:
                yield Chosen(split, decode(part, lambda: document.name), place)


@dataclass(frozen=True)
class ExcerptJob(ChosenJob):
    """The train texts, as a list."""

    def run(self, tick: Tick, batch: int) -> list[str]:
        return [chosen.text for chosen in self.texts(tick) if chosen.split == "train"]


@dataclass(frozen=True)
class EncodeJob(ChosenJob):
    """The tokens of both splits, written as the part tokens-NUMBER; `folder` also has the tokenizer.

    Of documents of fewer than `min_tokens` tokens only the lengths are written.
    """

    folder: Path
    tokenizer: str
    """Its file's name in `folder`."""
    min_tokens: int

    def run(self, tick: Tick, batch: int) -> None:
        tokenizer = _load(self.folder / self.tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        n_bytes = dict.fromkeys(SPLITS, 0)
        places: dict[str, list[int]] = {split: [] for split in SPLITS}
        short: dict[str, list[int]] = {split: [] for split in SPLITS}
        for texts in _batches(self.texts(tick), batch):
            encoded = tokenizer.encode_many([chosen.text for chosen in texts])
            for (split, text, place), ids in zip(texts, encoded, strict=True):
                if len(ids) + 1 < self.min_tokens:
                    short[split].append(len(ids) + 1)
                    continue
                tokens[split].append(_stored([*ids, tokenizer.eod], dtype))
                n_bytes[split] += len(text.encode())
                places[split].append(place)
        arrays: dict[str, Any] = {}
        for split, documents in tokens.items():
            arrays |= {f"{split}.tokens": np.concatenate([np.zeros(0, dtype), *documents]),
                       f"{split}.lengths": np.array([len(document) for document in documents], np.int64),
                       f"{split}.bytes": np.array(n_bytes[split]),
                       f"{split}.places": np.array(places[split], np.int64),
                       f"{split}.short": np.array(short[split], np.int64)}
        save_arrays(self.folder, tokens_name(self.number), arrays)


def scan_name(number: int) -> str:
    """The file of one piece's ScanJob."""
    return f"scan-{number:06d}.npz"


def tokens_name(number: int) -> str:
    """The file of one piece's EncodeJob."""
    return f"tokens-{number:06d}.npz"


def load_scan(folder: Path, pieces: int, with_sources: bool) -> Scan:
    """What the ScanJobs of all pieces found; with_sources: also where documents are from."""
    keys = ("sizes", "keys", "blank", "piece_size")
    parts = [load_arrays(folder, scan_name(number), keys) for number in range(pieces)]
    sizes, digests, blank = (np.concatenate([part[column] for part in parts]) for column in range(3))
    starts = np.cumsum([0] + [len(part[0]) for part in parts])
    sizes_of_pieces = np.array([int(part[3]) for part in parts], np.int64)
    if not with_sources:
        return Scan(sizes, digests, blank, starts, sizes_of_pieces)
    names = Names()
    found = []
    for number in range(pieces):
        sources, listed = load_arrays(folder, scan_name(number), ("sources", "names"))
        found.append(names.numbers(json.loads(listed.tobytes()), sources))
    return Scan(sizes, digests, blank, starts, sizes_of_pieces, np.concatenate(found), names.listed)


def load_tokens(folder: Path, number: int, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of one split of a piece, lengths of its documents, bytes of their text."""
    tokens, lengths, n_bytes = load_arrays(folder, tokens_name(number),
                                           [f"{split}.{what}" for what in ("tokens", "lengths", "bytes")])
    return tokens, lengths, int(n_bytes)


def load_aside(folder: Path, number: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Of one split of a piece: the places of its documents in the piece, the lengths of those that were too short."""
    places, short = load_arrays(folder, tokens_name(number), [f"{split}.{what}" for what in ("places", "short")])
    return places, short


def _batches(texts: Iterator[Chosen], characters: int) -> Iterator[list[Chosen]]:
    batch: list[Chosen] = []
    size = 0
    for chosen in texts:
        batch.append(chosen)
        size += len(chosen.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stored(ids: list[int], dtype: np.dtype) -> np.ndarray:
    tokens = np.array(ids, np.int64)
    stored = tokens.astype(dtype)
    assert np.array_equal(stored, tokens), f"tokens {tokens.min()} to {tokens.max()} exceed {dtype.name}"
    return stored


@lru_cache(maxsize=1)
def _load_once(path: Path, changed: int) -> tokenizers.Tokenizer:
    return tokenizers.load(path)


def _load(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a part; a worker reads it once for all its jobs."""
    try:
        return _load_once(path, path.stat().st_mtime_ns)
    except (DataError, FileNotFoundError) as fault:
        raise damaged(path, fault) from None
