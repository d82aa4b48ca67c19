"""Whether a checkpoint is what was saved: the checksum of each file, and the names of its weights.

Ranks share the work: each reads some of the files, and all of them learn what was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hinny.checkpoint import weights as weight_files
from hinny.checkpoint.disk import sha256
from hinny.checkpoint.ranks import Ranks
from hinny.errors import CheckpointError
from hinny.run import Run


def verify(run: Run, folder: Path, meta: dict[str, Any], ranks: Ranks) -> None:
    """Raises CheckpointError, on all ranks, if a file of the checkpoint is absent or not as it was saved."""
    if name := _first_damaged(folder, meta, ranks):
        raise damaged(run, folder, name, "its sha256 is not that in meta.json", ranks)


def damaged(run: Run, folder: Path, name: str, why: str, ranks: Ranks) -> CheckpointError:
    """The error for a damaged file, which names the newest earlier checkpoint that is whole."""
    whole = None
    for older, meta in ranks.first(lambda: _earlier(run, folder)):
        if _first_damaged(run.checkpoints / older, meta, ranks) is None:
            whole = older
            break
    advice = (f"The checkpoint before it, {whole}, is whole: delete {folder} to go on from there." if whole else
              "No earlier checkpoint is whole; start again in another run directory.")
    return CheckpointError(f"{folder / name} is damaged: {why}. {advice}")


def check_names(folder: Path, wanted: set[str], ranks: Ranks) -> None:
    """Raises CheckpointError unless the weights in `folder` are those that the ranks, each with its own, want."""
    together = set().union(*ranks.each(lambda: wanted))
    if (stored := set(weight_files.stored(folder).infos)) != together:
        odd = sorted(stored ^ together)
        raise CheckpointError(f"{folder} is not a checkpoint of this model: {len(odd)} weights are on one side only, "
                              f"for instance {odd[0]}.")


def _first_damaged(folder: Path, meta: dict[str, Any], ranks: Ranks) -> str | None:
    """The first file of the checkpoint, in the order of their names, that is absent or has another checksum."""
    # each rank its share: a large checkpoint takes minutes to read
    share = sorted(meta["files"])[ranks.rank::ranks.size]
    odd = (name for name in share if not _is_whole(folder / name, meta["files"][name]))
    found = ranks.each(lambda: next(odd, None))
    return min((name for name in found if name is not None), default=None)


def _is_whole(file: Path, expected: str) -> bool:
    return file.is_file() and sha256(file) == expected


def _earlier(run: Run, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and meta.json of the checkpoints before `folder` that have a readable one, newest first."""
    found = []
    for older in reversed([f for f in run.checkpoint_folders() if f.name < folder.name]):
        try:
            found.append((older.name, json.loads((older / "meta.json").read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue
    return found
