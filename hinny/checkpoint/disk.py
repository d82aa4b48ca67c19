"""What makes a folder whole or absent: checksums, and writes that have reached the disk before a name says so."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial-"
"""In front of the name of a folder that is still being written."""

BLOCK = 2**24


def sha256(file: Path, progress: Callable[[int], None] | None = None) -> str:
    """The checksum of a file; `progress` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def write_synced(file: Path, text: str) -> None:
    """Write `text` and wait until it is on the disk."""
    with open(file, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
