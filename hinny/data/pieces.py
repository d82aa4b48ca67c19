"""Sources of documents, cut into pieces: a piece can be sent to another process and read there.

A source yields the same pieces with the same documents in the same order each time.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hinny.data.work import Unfinished
from hinny.errors import DataError

MIN_PIECE_BYTES = 1_000_000
MAX_PIECE_BYTES = 64_000_000
PIECES = 1000
"""A source is cut into about so many pieces: enough to share out, to show progress and to lose little at a stop, and
few enough that their files are no burden. A worker holds a piece in memory."""


@dataclass(frozen=True)
class Document:
    """One text, as UTF-8, of a place in its piece: whatever the piece names its documents by."""

    data: bytes
    piece: Piece
    place: int
    source: str | None = None
    """Where it is from (a book, a repository), if that is asked for."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self.piece.name(self.place)


class Piece(ABC):
    """Some consecutive documents of a source."""

    size: int
    """About how many bytes of the source it takes."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Its documents in order, empty ones included."""

    @abstractmethod
    def name(self, place: int) -> str:
        """What to call the document at `place`."""


class Source(ABC):
    """Documents in a fixed order."""

    @abstractmethod
    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        """All of it, in pieces of about that size."""

    @abstractmethod
    def size(self) -> int:
        """About how many bytes it has, in the unit of its pieces' sizes, without reading them."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What a reader must know to get the same documents again."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """What would differ, by name, if the documents were others; without reading them."""

    def documents(self) -> Iterator[Document]:
        """Every document, empty ones included."""
        for piece in self.pieces(piece_size(self.size())):
            yield from piece.documents()


def piece_size(total: int) -> int:
    """Bytes of a piece of a source of `total` bytes."""
    return min(max(total // PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)


@dataclass(frozen=True)
class Files(Piece):
    """One document per file; with `root` they are named by their place below it."""

    files: list[Path]
    size: int
    root: Path | None = None

    def documents(self) -> Iterator[Document]:
        for place, path in enumerate(self.files):
            yield Document(read_text(path), self, place)

    def name(self, place: int) -> str:
        path = self.files[place]
        return str(path if self.root is None else path.relative_to(self.root))


def file_pieces(files: Sequence[Path], sizes: Sequence[int], piece_bytes: int, root: Path | None) -> Iterator[Files]:
    """Consecutive files together, up to `piece_bytes` or one file that is larger."""
    batch: list[Path] = []
    total = 0
    for path, size in zip(files, sizes, strict=True):
        if batch and total + size > piece_bytes:
            yield Files(batch, total, root)
            batch, total = [], 0
        batch.append(path)
        total += size
    if batch:
        yield Files(batch, total, root)


def listing(files: Sequence[Path]) -> dict[str, Any]:
    """Number, bytes and a hash of names, sizes and times of change."""
    known = hashlib.sha256()
    total = 0
    for path in files:
        size, changed = stat_of(path)
        total += size
        known.update(f"{path}\0{size}\0{changed}\n".encode())
    return {"files": len(files), "bytes": total, "names, sizes and times": known.hexdigest()[:16]}


def stat_of(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it was changed, in ns."""
    try:
        found = path.stat()
    except OSError as fault:
        raise unreadable(path, fault) from None
    return found.st_size, found.st_mtime_ns


def read_text(path: Path) -> bytes:
    """The UTF-8 text of a file without byte-order mark; DataError names file and offset if it is not text."""
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise unreadable(path, fault) from None
    decode(data, lambda: str(path))
    return data.removeprefix(b"\xef\xbb\xbf")


def decode(data: bytes, where: Callable[[], str]) -> str:
    """`data` as text; DataError names `where()` and the offset of a NUL byte or of bytes that are not UTF-8."""
    if (nul := data.find(b"\0")) >= 0:
        raise DataError(f"{where()}: NUL byte at offset {nul}: binary, not text.")
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        raise DataError(f"{where()}: byte {data[fault.start]:#04x} at offset {fault.start} is not UTF-8; "
                        "convert the text to UTF-8 first.") from None


def unreadable(path: Path, fault: OSError) -> Unfinished:
    """The disk's fault, not the text's: the work that is done stays."""
    return Unfinished(f"{fault.filename or path}: cannot be read: {fault.strerror}.")
