"""Which documents of a source are used, and which of them are kept from training.

Both choices go in the order of a seeded hash of the text: spread over the whole source, the same every time, and equal
documents never stand on both sides.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KEY_BYTES = 32


@dataclass(frozen=True)
class Scan:
    """What was found of all documents of a source, in its order.

    sizes (documents,) int64 bytes; keys (documents, 32) uint8, the seeded hash of each; blank (documents,) bool;
    starts (pieces + 1,) int64, the first document of each piece; piece_sizes (pieces,) int64 bytes of the source;
    origins (documents,) uint32, the number in `names` of what each document is from, None where that is not asked for.
    """

    sizes: np.ndarray
    keys: np.ndarray
    blank: np.ndarray
    starts: np.ndarray
    piece_sizes: np.ndarray
    origins: np.ndarray | None = None
    names: list[str] = field(default_factory=list)

    @property
    def pieces(self) -> int:
        """How many pieces the source has."""
        return len(self.piece_sizes)


@dataclass(frozen=True)
class Plan:
    """How much of each document goes where: the bytes [0, train_stops) to train, [train_stops, stops) to the held-out
    split, both (documents,) int64, 0 and 0 where it is not used; the encoder moves them back to a line's end.
    """

    scan: Scan
    train_stops: np.ndarray
    stops: np.ndarray
    request: str
    """The hash that stands for the documents chosen and all options."""

    @property
    def n_bytes(self) -> int:
        """Bytes chosen, before cuts are moved to the ends of lines."""
        return int(self.stops.sum())

    def of(self, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, train_stops and stops of the documents of one piece."""
        documents = slice(int(self.scan.starts[piece]), int(self.scan.starts[piece + 1]))
        return self.scan.keys[documents], self.train_stops[documents], self.stops[documents]

    def sample(self, n_bytes: int) -> Plan:
        """Train texts alone, of about `n_bytes`, spread over the source."""
        used = np.flatnonzero(self.train_stops)
        used = used[by_key(self.scan.keys[used])]
        sizes = self.train_stops[used]
        used = used[np.cumsum(sizes) - sizes < n_bytes]
        stops = np.zeros_like(self.stops)
        stops[used] = self.train_stops[used]
        return Plan(self.scan, stops, stops, self.request)


def salt(seed: int) -> bytes:
    """What is put before a text when its key is made."""
    return f"hinny {seed} ".encode()


def key(salt: bytes, data: bytes) -> bytes:
    """A text's place in the order of choice."""
    return hashlib.sha256(salt + data).digest()


def by_key(keys: np.ndarray) -> np.ndarray:
    """The order of keys (documents, 32), equal ones in the source's order; (documents,) int64."""
    words = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return np.lexsort([words[:, column] for column in reversed(range(words.shape[1]))])


def plan(scan: Scan, options: dict[str, Any]) -> Plan:
    """Choose among the documents and divide them; `options` has max_bytes and held_out. One must not be blank."""
    stops = np.zeros_like(scan.sizes)
    train_stops = np.zeros_like(scan.sizes)
    texts = np.flatnonzero(~scan.blank)
    texts = texts[by_key(scan.keys[texts])]
    chosen = choose(scan.sizes[texts], options["max_bytes"])
    texts = texts[:len(chosen)]
    stops[texts] = chosen
    train_stops[texts] = hold_out(scan.keys[texts], chosen, options["held_out"])
    request = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for number in np.flatnonzero(stops):
        request.update(scan.keys[number].tobytes() + f"{train_stops[number]} {stops[number]};".encode())
        if scan.origins is not None:
            request.update(json.dumps(scan.names[scan.origins[number]]).encode())
    return Plan(scan, train_stops, stops, request.hexdigest())


def choose(sizes: np.ndarray, max_bytes: int | None) -> np.ndarray:
    """Bytes used of each of the documents that are chosen: those that come first, while they fit; the last is cut."""
    if max_bytes is None:
        return sizes
    before = np.cumsum(sizes) - sizes
    first = sizes[before < max_bytes]
    return np.minimum(first, max_bytes - before[:len(first)])


def hold_out(keys: np.ndarray, stops: np.ndarray, share: float) -> np.ndarray:
    """Bytes for training of each document, in the order of keys: 0 for held-out ones, `share` of the bytes in all.

    Equal texts go together. Where no document is that short, as in a single book, the end of the longest is held out.
    """
    train = stops.copy()
    firsts = np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)]))
    ends = np.append(firsts[1:], len(keys))
    sizes = np.add.reduceat(stops, firsts)
    budget = left = int(share * int(stops.sum()))
    for group, size in enumerate(sizes):
        # near enough: going on would fill the rest with the shortest documents only
        if left < 0.1 * budget:
            break
        if size <= left:
            left -= int(size)
            train[firsts[group]:ends[group]] = 0
    if left == budget:
        longest = int(np.argmax(stops[firsts]))
        equal = slice(firsts[longest], ends[longest])
        train[equal] = np.maximum(stops[equal] - budget, 0)
    return train


def line_end(data: bytes, limit: int) -> int:
    """The last place in UTF-8 `data`, at most `limit`, after a line's end or else between two characters."""
    if limit >= len(data):
        return len(data)
    if (newline := data.rfind(b"\n", limit // 2, limit)) >= 0:
        return newline + 1
    while limit and data[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit
