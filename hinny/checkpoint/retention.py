"""Which checkpoints of a run stay: the last ones and those saved for ever. What goes is never seen half removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hinny.checkpoint import weights as weight_files
from hinny.checkpoint.disk import PARTIAL
from hinny.errors import CheckpointError
from hinny.run import Run

KEEP = 2
"""Checkpoints that stay: the last, and the one before it in case the last is damaged on the disk."""


def latest(run: Run) -> Path | None:
    """The folder of the newest checkpoint, or None."""
    return folders[-1] if (folders := run.checkpoint_folders()) else None


def last_good(run: Run) -> str:
    """The name of the newest checkpoint, for an error."""
    return good.name if (good := latest(run)) else "none: none was saved yet"


def prune(run: Run) -> None:
    """Remove all but the last KEEP checkpoints and those that are kept for ever; CheckpointError if one stays."""
    with _removing(run):
        # what was converted is no step of the training: it stays, whatever is trained on from it
        for old in [f for f in run.checkpoint_folders() if not weight_files.are_in(f)][:-KEEP]:
            if not _kept(old):
                _remove(old)


def clean(run: Run) -> None:
    """Remove what an interrupted save or removal left; CheckpointError if it stays. Call it with the run locked."""
    with _removing(run):
        for partial in run.checkpoints.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)


def _kept(folder: Path) -> bool:
    """Whether a checkpoint was saved to stay; one that no longer says so is not ours to throw away either."""
    try:
        return bool(json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("kept", False))
    except (OSError, ValueError):
        return True


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that it is never seen half removed."""
    doomed = folder.with_name(PARTIAL + folder.name)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _removing(run: Run) -> Iterator[None]:
    """What is still there when this fails is old or half removed: the checkpoints in force are whole."""
    try:
        yield
    except OSError as fault:
        raise CheckpointError(
            f"{fault.filename or run.checkpoints} cannot be removed: {fault.strerror}. The last good checkpoint is "
            f"{last_good(run)}. Give write permission or remove it yourself, then "
            "run the same command to go on from there.") from None
