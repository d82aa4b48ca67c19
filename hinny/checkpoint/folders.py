"""A folder that appears whole or not at all: written under another name beside it, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hinny.checkpoint.disk import PARTIAL, sync
from hinny.errors import CheckpointError


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end of the block, or is removed where the block fails.

    Raises CheckpointError if `target` is there and not an empty folder, if another process is writing it, and if it
    cannot be written. What a killed process left is cleared away.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is not empty; name a folder that is not there yet.")
    # "." has no name
    target = Path(os.path.abspath(target))
    partial = target.with_name(PARTIAL + target.name)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # what it holds is cleared away: never that of a folder elsewhere, to which a link leads
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as fault:
        raise CheckpointError(f"{target} cannot be written: {fault.strerror}.") from None
    try:
        _take(partial, handle, target)
        try:
            _clear(partial)
            yield partial
            sync(partial)
            partial.rename(target)
            sync(target.parent)
        except OSError as fault:
            raise CheckpointError(f"{target} cannot be written: {fault.strerror or fault}. Make room or give write "
                                  "permission, then run the same command again.") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(handle)


def need_room(folder: Path, size: int, target: Path) -> None:
    """CheckpointError if the disk of `folder` has no room for `size` bytes, before any of them is written."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise CheckpointError(f"{target} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on its disk. "
                              "Make room, or name a folder on another disk.")


def _take(partial: Path, handle: int, target: Path) -> None:
    """Hold `partial` for this process. The folder that was opened may meanwhile have got its name: look again."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = partial.exists() and os.path.samestat(os.stat(partial), os.fstat(handle))
    except BlockingIOError:
        mine = False
    if not mine:
        raise CheckpointError(f"{target} is being written by another process; wait for it, or name another folder.")


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
