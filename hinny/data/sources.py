"""Where documents come from: the running Python's standard library, text files and folders, JSON lines.

A source can be walked more than once and yields the same documents in the same order each time.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hinny.errors import ConfigError, DataError

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".org", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".java", ".js",
            ".ts", ".go", ".rs", ".sh", ".toml", ".yaml", ".yml")
"""Endings of the files that are taken from a folder; a file that is named itself may have any."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
"""Folders of the standard library that are no text of its own: installed packages, tests and their data, tables of
character codes, and the help topics, which are taken one by one instead."""


@dataclass(frozen=True)
class Document:
    """One text, as UTF-8, and what to call it in a message."""

    name: str
    data: bytes


class Source(ABC):
    """Documents in a fixed order."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, empty ones included."""

    @abstractmethod
    def size(self) -> int:
        """About how many bytes the documents have, without reading them."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What a reader must know to get the same documents again."""


class StandardLibrary(Source):
    """Python's own modules, then its help topics, which are prose. They differ from one Python version to the next."""

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = [
            path for path in _walk(self.root, LEFT_OUT)
            # build settings of this very machine are no text
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")]
        if not self.files:
            raise DataError(f"{self.root} holds no sources of the Python standard library; name texts of your own.")
        try:
            self.topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ModuleNotFoundError:
            self.topics = {}

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            yield Document(str(path.relative_to(self.root)), read_text(path))
        for name, topic in sorted(self.topics.items()):
            yield Document(f"pydoc topic {name}", topic.encode())

    def size(self) -> int:
        return _size(self.files) + sum(map(len, self.topics.values()))

    def description(self) -> dict[str, Any]:
        return {"kind": "standard library", "python": platform.python_version(), "files": len(self.files),
                "topics": len(self.topics)}


class TextFiles(Source):
    """One document per file; of a folder the files with a known ending, hidden ones and links to folders left out."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.files = []
        for path in paths:
            if path.is_dir():
                found = [p for p in _walk(path, set()) if p.suffix.lower() in SUFFIXES]
                if not found:
                    raise DataError(f"{path}: no text in this folder; files ending in {' '.join(SUFFIXES)} are taken.")
                self.files += found
            elif path.exists():
                if not read_text(path).strip():
                    raise DataError(f"{path} is empty: there is no text to learn from.")
                self.files.append(path)
            else:
                raise DataError(f"{path} does not exist; name a text file or a folder of them.")

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            yield Document(str(path), read_text(path))

    def size(self) -> int:
        return _size(self.files)

    def description(self) -> dict[str, Any]:
        return {"kind": "text", "paths": [str(p) for p in self.paths], "files": len(self.files)}


class JSONLines(Source):
    """One document per line: the text under `field` of the line's JSON object; blank lines are passed over."""

    def __init__(self, paths: Sequence[Path], field: str) -> None:
        self.paths = paths
        self.field = field

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            try:
                with open(path, "rb") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield Document(f"{path} line {number}", self._text(line, f"{path} line {number}"))
            except OSError as fault:
                raise _unreadable(path, fault) from None

    def _text(self, line: bytes, where: str) -> bytes:
        try:
            record = json.loads(decode(line, where))
        except json.JSONDecodeError as fault:
            raise DataError(f"{where}: not JSON: {fault}. Each line must be one JSON object.") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON {type(record).__name__}, expected an object with field {self.field!r}.")
        if self.field not in record:
            raise DataError(f"{where}: no field {self.field!r}; the line has {', '.join(map(repr, record)) or 'none'}.")
        text = record[self.field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {self.field!r} is a {type(text).__name__}, expected text.")
        if "\0" in text:
            raise DataError(f"{where}: field {self.field!r} has a NUL character at {text.index(chr(0))}: not text.")
        try:
            return text.encode()
        except UnicodeEncodeError as fault:
            raise DataError(f"{where}: field {self.field!r} has half a surrogate pair at character {fault.start}: "
                            "not valid text.") from None

    def size(self) -> int:
        return _size(self.paths)

    def description(self) -> dict[str, Any]:
        return {"kind": "jsonl", "paths": [str(p) for p in self.paths], "field": self.field}


def open_source(text: Sequence[str | Path] | None, jsonl: Sequence[str | Path] | None, field: str | None) -> Source:
    """The source that the arguments of `prepare` name."""
    if text is not None and jsonl is not None:
        raise ConfigError("text and jsonl are both given; choose one of them.")
    if jsonl is not None:
        if field is None:
            raise ConfigError("jsonl needs field, the key of the text in each line, for instance --field text.")
        return JSONLines([Path(p) for p in jsonl], field)
    if field is not None:
        raise ConfigError(f"field {field!r} has no effect without jsonl; remove it.")
    return StandardLibrary() if text is None else TextFiles([Path(p) for p in text])


def read_text(path: Path) -> bytes:
    """The UTF-8 text of a file without byte-order mark; DataError names file and offset if it is not text."""
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise _unreadable(path, fault) from None
    decode(data, str(path))
    return data.removeprefix(b"\xef\xbb\xbf")


def decode(data: bytes, where: str) -> str:
    """`data` as text; DataError names `where` and the offset of a NUL byte or of bytes that are not UTF-8."""
    if (nul := data.find(b"\0")) >= 0:
        raise DataError(f"{where}: NUL byte at offset {nul}: binary, not text.")
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        raise DataError(f"{where}: byte {data[fault.start]:#04x} at offset {fault.start} is not UTF-8; "
                        "convert the text to UTF-8 first.") from None


def _size(files: Sequence[Path]) -> int:
    try:
        return sum(path.stat().st_size for path in files)
    except OSError as fault:
        raise _unreadable(Path(), fault) from None


def _unreadable(path: Path, fault: OSError) -> DataError:
    return DataError(f"{fault.filename or path}: cannot be read: {fault.strerror}.")


def _walk(root: Path, left_out: set[str]) -> list[Path]:
    """Files below `root`, sorted; an unreadable folder is an error, not a gap."""

    def refuse(fault: OSError) -> None:
        raise _unreadable(root, fault)

    found = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder) / name for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)
