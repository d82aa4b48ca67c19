"""Where documents come from: the running Python's standard library, text files and folders, and what else is named."""

from __future__ import annotations

import importlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hinny.data.hub import HubOptions, open_hub
from hinny.data.lines import JSONLines
from hinny.data.pieces import Document, Piece, Source, file_pieces, listing, read_text, stat_of, unreadable
from hinny.errors import ConfigError, DataError

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".org", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".java", ".js",
            ".ts", ".go", ".rs", ".sh", ".toml", ".yaml", ".yml")
"""Endings of the files that are taken from a folder; a file that is named itself may have any."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
"""Folders of the standard library that are no text of its own: installed packages, tests and their data, tables of
character codes, and the help topics, which are taken one by one instead."""


@dataclass(frozen=True)
class Topics(Piece):
    """Texts that are no files, by their names."""

    texts: list[tuple[str, str]]
    size: int

    def documents(self) -> Iterator[Document]:
        for place, (_, text) in enumerate(self.texts):
            yield Document(text.encode(), self, place)

    def name(self, place: int) -> str:
        return f"pydoc topic {self.texts[place][0]}"


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
        self._sizes = [stat_of(path)[0] for path in self.files]

    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        yield from file_pieces(self.files, self._sizes, piece_bytes, self.root)
        yield Topics(sorted(self.topics.items()), sum(map(len, self.topics.values())))

    def size(self) -> int:
        return sum(self._sizes) + sum(map(len, self.topics.values()))

    def description(self) -> dict[str, Any]:
        return {"kind": "standard library", "python": platform.python_version(), "files": len(self.files),
                "topics": len(self.topics)}

    def inputs(self) -> dict[str, Any]:
        return {**self.description(), **listing(self.files)}


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
        self._sizes = [stat_of(path)[0] for path in self.files]

    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        return file_pieces(self.files, self._sizes, piece_bytes, None)

    def size(self) -> int:
        return sum(self._sizes)

    def description(self) -> dict[str, Any]:
        return {"kind": "text", "paths": [str(p) for p in self.paths], "files": len(self.files)}

    def inputs(self) -> dict[str, Any]:
        return {"text": [str(p) for p in self.paths], **listing(self.files)}


def open_source(text: Sequence[str | Path] | None, jsonl: Sequence[str | Path] | None, field: str | None,
                hub: HubOptions | None = None, source_field: str | None = None) -> Source:
    """The source that the arguments of `prepare` name."""
    named = [name for name, value in (("text", text), ("jsonl", jsonl), ("hf", hub)) if value is not None]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are both given; choose one of them.")
    if source_field is not None and source_field == (field or "text"):
        raise ConfigError(f"source_field {source_field!r} is the field of the text itself; name the one that says "
                          "where a text is from.")
    if hub is not None:
        return open_hub(hub, field or "text", source_field)
    if jsonl is not None:
        if field is None:
            raise ConfigError("jsonl needs field, the key of the text in each line, for instance --field text.")
        return JSONLines([Path(p) for p in jsonl], field, source_field)
    if source_field is not None:
        raise ConfigError(f"source_field {source_field!r} has no effect without jsonl or hf: text files have no "
                          "fields. Write the texts as JSON lines, with their source beside them, or remove it.")
    if field is not None:
        raise ConfigError(f"field {field!r} has no effect without jsonl or hf; remove it.")
    return StandardLibrary() if text is None else TextFiles([Path(p) for p in text])


def _walk(root: Path, left_out: set[str]) -> list[Path]:
    """Files below `root`, sorted; an unreadable folder is an error, not a gap."""

    def refuse(fault: OSError) -> None:
        raise unreadable(root, fault)

    found = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder) / name for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)
