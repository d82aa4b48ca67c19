"""JSON lines, plain or compressed: a document per line, under one field of its object.

A plain file is read from the middle by whoever has the piece. A compressed one can only be read from its start, so its
pieces carry their lines, and one process decompresses for all.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from hinny.data.pieces import Document, Piece, Source, decode, stat_of, unreadable
from hinny.errors import DataError

BLOCK = 1 << 20
"""Bytes read at a time of a compressed file."""


@dataclass(frozen=True)
class LineRange(Piece):
    """The lines of a plain file that begin in the `size` bytes from `start` on; places are bytes of the file."""

    path: Path
    field: str
    start: int
    size: int
    source_field: str | None = None

    def documents(self) -> Iterator[Document]:
        stop = self.start + self.size
        try:
            with open(self.path, "rb") as file:
                offset = 0
                if self.start:
                    # a line that begins at `start` has its predecessor's end just before it
                    file.seek(self.start - 1)
                    offset = self.start - 1 + len(file.readline())
                while offset < stop and (line := file.readline()):
                    if line.strip():
                        where = partial(self.name, offset)
                        data, source = fields_of_line(line, self.field, self.source_field, where)
                        yield Document(data, self, offset, source)
                    offset += len(line)
        except OSError as fault:
            raise unreadable(self.path, fault) from None

    def name(self, place: int) -> str:
        with open(self.path, "rb") as file:
            return f"{self.path} line {_count_lines(file, place) + 1}"


@dataclass(frozen=True)
class Lines(Piece):
    """Lines of a compressed file; places are line numbers."""

    path: Path
    field: str
    first: int
    data: bytes
    size: int
    source_field: str | None = None

    def documents(self) -> Iterator[Document]:
        for number, line in enumerate(io.BytesIO(self.data), self.first):
            if line.strip():
                where = partial(self.name, number)
                data, source = fields_of_line(line, self.field, self.source_field, where)
                yield Document(data, self, number, source)

    def name(self, place: int) -> str:
        return f"{self.path} line {place}"


class JSONLines(Source):
    """One document per line: the text under `field` of the line's JSON object, and where it is from under
    `source_field`, if that is given; blank lines are passed over."""

    def __init__(self, paths: Sequence[Path], field: str, source_field: str | None = None) -> None:
        self.paths = paths
        self.field = field
        self.source_field = source_field
        for path in paths:
            if path.suffix in READERS:
                READERS[path.suffix].check(path)

    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        for path in self.paths:
            if path.suffix in READERS:
                yield from self._compressed(path, piece_bytes)
            else:
                size, _ = stat_of(path)
                for start in range(0, size, piece_bytes):
                    yield LineRange(path, self.field, start, min(piece_bytes, size - start), self.source_field)

    def _compressed(self, path: Path, piece_bytes: int) -> Iterator[Lines]:
        """Pieces of whole lines, of about `piece_bytes` before compression; their sizes add up to the file's."""
        held: list[bytes] = []
        length, first, told = 0, 1, 0
        try:
            with open(path, "rb") as file:
                for block in READERS[path.suffix].blocks(file, path):
                    held.append(block)
                    length += len(block)
                    if length < piece_bytes or (cut := block.rfind(b"\n") + 1) == 0:
                        continue
                    held[-1] = block[:cut]
                    data, held = b"".join(held), [block[cut:]]
                    yield Lines(path, self.field, first, data, file.tell() - told, self.source_field)
                    first, length, told = first + data.count(b"\n"), len(held[0]), file.tell()
                if data := b"".join(held):
                    yield Lines(path, self.field, first, data, file.tell() - told, self.source_field)
        except OSError as fault:
            raise unreadable(path, fault) from None

    def size(self) -> int:
        return sum(stat_of(path)[0] for path in self.paths)

    def description(self) -> dict[str, Any]:
        return {"kind": "jsonl", "paths": [str(p) for p in self.paths], "field": self.field}

    def inputs(self) -> dict[str, Any]:
        found: dict[str, Any] = {"jsonl": [str(path) for path in self.paths], "field": self.field}
        for path in self.paths:
            size, changed = stat_of(path)
            found |= {f"{path}: bytes": size, f"{path}: changed at (ns)": changed}
        return found


def fields_of_line(line: bytes, field: str, source_field: str | None,
                   where: Callable[[], str]) -> tuple[bytes, str | None]:
    """Text and source of one line, as `fields_of`; DataError, with the line's name, if it is no JSON object."""
    text = decode(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as fault:  # also numbers too long and nesting too deep for Python
        raise DataError(f"{where()}: not JSON: {fault}. Each line must be one JSON object.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where()}: a JSON {type(record).__name__}, expected an object with field {field!r}.")
    return fields_of(record, field, source_field, where)


def fields_of(record: dict[str, Any], field: str, source_field: str | None,
              where: Callable[[], str]) -> tuple[bytes, str | None]:
    """Text (as UTF-8) and source of a record; DataError, with the record's name, if one of them is no text."""
    source = None if source_field is None else text_of_record(record, source_field, where).decode()
    return text_of_record(record, field, where), source


def text_of_record(record: dict[str, Any], field: str, where: Callable[[], str]) -> bytes:
    """The text under `field`, as UTF-8; DataError, with the record's name, if it is no text."""
    if field not in record:
        raise DataError(f"{where()}: no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}.")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where()}: field {field!r} is a {type(text).__name__}, expected text.")
    if "\0" in text:
        raise DataError(f"{where()}: field {field!r} has a NUL character at {text.index(chr(0))}: not text.")
    try:
        return text.encode()
    except UnicodeEncodeError as fault:
        raise DataError(f"{where()}: field {field!r} has half a surrogate pair at character {fault.start}: "
                        "not valid text.") from None


class _Gzip:
    """Python's own."""

    def check(self, path: Path) -> None:
        """Nothing is needed."""

    def blocks(self, file: IO[bytes], path: Path) -> Iterator[bytes]:
        try:
            with gzip.GzipFile(fileobj=file) as plain:
                while block := plain.read(BLOCK):
                    yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
            raise DataError(f"{path}: not a whole gzip file: {fault}.") from None


class _Zstandard:
    """The package zstandard, where it is installed."""

    def check(self, path: Path) -> None:
        """DataError without the package."""
        self._package(path)

    def blocks(self, file: IO[bytes], path: Path) -> Iterator[bytes]:
        zstandard = self._package(path)
        # frame by frame: the package's own stream readers end without a word where a file was cut off
        frame: Any = None
        rest = b""
        try:
            while rest or (rest := file.read(BLOCK)):
                if frame is None:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                if block := frame.decompress(rest):
                    yield block
                rest = b""
                if frame.eof:
                    frame, rest = None, frame.unused_data
        except zstandard.ZstdError as fault:
            raise DataError(f"{path}: not a zstd file: {fault}.") from None
        if frame is not None:
            raise DataError(f"{path}: not a whole zstd file: it ends within a frame.")

    def _package(self, path: Path) -> Any:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: reading .zst needs the package zstandard: pip install zstandard, or give the "
                            "file as .gz or plain.") from None
        return zstandard


READERS: dict[str, _Gzip | _Zstandard] = {".gz": _Gzip(), ".zst": _Zstandard()}
"""Ending of a compressed file → how it is read."""


def _count_lines(file: IO[bytes], stop: int) -> int:
    found = 0
    while stop > 0 and (block := file.read(min(stop, BLOCK))):
        found += block.count(b"\n")
        stop -= len(block)
    return found
