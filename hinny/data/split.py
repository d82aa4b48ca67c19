"""Which documents of a source are used, and which of them are kept from training.

Both choices go in the order of a seeded hash of the text: spread over the whole source, the same every time, and equal
documents never stand on both sides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hinny.data.sources import Document, Source, decode
from hinny.errors import DataError

REPORT_BYTES = 1_000_000
"""Text between two reports of progress."""

Report = Callable[[float], None]
"""Called with the share of the source that was read."""


@dataclass
class Entry:
    """A document of the source: its place there, size, seeded hash, and how much of it goes where.

    Bytes [0, train_stop) go to train, [train_stop, stop) to the held-out split; both are moved back to a line's end.
    """

    number: int
    size: int
    key: bytes
    train_stop: int = field(init=False)
    stop: int = field(init=False)

    def __post_init__(self) -> None:
        self.train_stop = self.stop = self.size


@dataclass(frozen=True)
class Plan:
    """The documents chosen, in the source's order, and the hash that stands for them and all options."""

    source: Source
    salt: bytes
    entries: list[Entry]
    found: int
    empty: int
    request: str

    @property
    def n_bytes(self) -> int:
        """Bytes chosen, before cuts are moved to the ends of lines."""
        return sum(entry.stop for entry in self.entries)

    def pieces(self, report: Report | None = None) -> Iterator[tuple[str, str]]:
        """("train" or "heldout", text) of every chosen document, in the source's order."""
        wanted = {entry.number: entry for entry in self.entries}
        seen = 0
        for number, document in enumerate(_read(self.source, report)):
            if (entry := wanted.get(number)) is None:
                continue
            if _key(self.salt, document.data) != entry.key:
                raise DataError(f"{document.name} changed while it was read; try again when the texts are at rest.")
            seen += 1
            train_stop, stop = (line_end(document.data, limit) for limit in (entry.train_stop, entry.stop))
            for split, data in (("train", document.data[:train_stop]), ("heldout", document.data[train_stop:stop])):
                if data:
                    yield split, decode(data, document.name)
        if seen < len(wanted):
            raise DataError(f"{len(wanted) - seen} documents went missing while they were read; try again.")

    def sample(self, n_bytes: int, report: Report | None = None) -> list[str]:
        """Train texts of about `n_bytes`, spread over the source."""
        chosen, left = [], n_bytes
        for entry in by_key(self.entries):
            if entry.train_stop and left > 0:
                chosen.append(entry)
                left -= entry.train_stop
        part = Plan(self.source, self.salt, chosen, self.found, self.empty, self.request)
        return [text for split, text in part.pieces(report) if split == "train"]


def _key(salt: bytes, data: bytes) -> bytes:
    return hashlib.sha256(salt + data).digest()


def by_key(entries: list[Entry]) -> list[Entry]:
    """Entries in the order of their hashes."""
    return sorted(entries, key=lambda e: (e.key, e.number))


def _read(source: Source, report: Report | None) -> Iterator[Document]:
    """The documents of `source`; `report` hears of every REPORT_BYTES on the way."""
    if report is None:
        yield from source.documents()
        return
    total, done, told = max(source.size(), 1), 0, 0
    for document in source.documents():
        yield document
        done += len(document.data)
        if done - told >= REPORT_BYTES:
            told = done
            report(min(done / total, 1.0))


def plan(source: Source, options: dict[str, Any], report: Report | None = None) -> Plan:
    """Read all documents once, choose among them and divide them; `options` has seed, max_bytes and held_out."""
    entries, empty = [], 0
    salt = f"hinny {options['seed']} ".encode()
    for number, document in enumerate(_read(source, report)):
        if document.data.strip():
            entries.append(Entry(number, len(document.data), _key(salt, document.data)))
        else:
            empty += 1
    if not entries:
        raise DataError(f"there is no text: {source.description()} has {empty} documents, all empty.")
    chosen = choose(entries, options["max_bytes"])
    hold_out(chosen, options["held_out"])
    fingerprint = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for entry in chosen:
        fingerprint.update(entry.key + f"{entry.train_stop} {entry.stop};".encode())
    return Plan(source, salt, chosen, len(entries), empty, fingerprint.hexdigest())


def choose(entries: list[Entry], max_bytes: int | None) -> list[Entry]:
    """Documents in hash order while they fit; the last is cut short."""
    if max_bytes is None:
        return entries
    left, chosen = max_bytes, []
    for entry in by_key(entries):
        if left:
            entry.stop = entry.train_stop = min(entry.size, left)
            left -= entry.stop
            chosen.append(entry)
    return sorted(chosen, key=lambda e: e.number)


def hold_out(entries: list[Entry], share: float) -> None:
    """Set `train_stop`: 0 for held-out documents, `share` of the bytes in all. Equal texts go together.

    Where no document is that short, as in a single book, the end of the longest is held out.
    """
    groups: dict[bytes, list[Entry]] = {}
    for entry in by_key(entries):
        groups.setdefault(entry.key, []).append(entry)
    budget = left = int(share * sum(e.stop for e in entries))
    for group in groups.values():
        # near enough: going on would fill the rest with the shortest documents only
        if left < 0.1 * budget:
            break
        if (size := sum(e.stop for e in group)) <= left:
            left -= size
            for entry in group:
                entry.train_stop = 0
    if left == budget:
        for entry in max(groups.values(), key=lambda group: group[0].stop):
            entry.train_stop = max(entry.stop - budget, 0)


def line_end(data: bytes, limit: int) -> int:
    """The last place in UTF-8 `data`, at most `limit`, after a line's end or else between two characters."""
    if limit >= len(data):
        return len(data)
    if (newline := data.rfind(b"\n", limit // 2, limit)) >= 0:
        return newline + 1
    while limit and data[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit
