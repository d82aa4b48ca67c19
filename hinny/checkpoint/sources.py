"""Where a checkpoint to convert comes from: a folder, or a repository of the Hugging Face Hub that is downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hinny.errors import CheckpointError

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")

PLAIN = ("*.json", "*.model", "latest_checkpointed_iteration.txt")
"""Files beside the weights that a format may read."""

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model_optim_rng.pt")
"""Kinds of weight files, the best first: only the first kind that a repository has is downloaded."""

DISTRIBUTED = (".distcp", "/.metadata", "/common.pt", "/metadata.json")
"""How the names of a Megatron distributed checkpoint's files end: one kind more, the last."""


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, and the Hub repository and commit that it was downloaded from, if it was."""

    folder: Path
    hub: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.hub is None else f"{self.hub}@{self.revision}"


def locate(source: str | Path) -> Source:
    """The folder that `source` names, downloaded if it is a Hub id such as owner/name or owner/name@revision.

    Raises CheckpointError for what is neither, and where it cannot be downloaded, with the way to do it by hand.
    """
    folder = Path(source)
    if folder.is_dir():
        return Source(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that it lies in.")
    found = HUB_ID.fullmatch(str(source))
    if found is None:
        raise CheckpointError(f"{source} is no folder, and no Hub id, which is owner/name or owner/name@revision.")
    return _download(found["id"], found["revision"])


def chosen(files: list[str]) -> list[str]:
    """Of a repository's files, those that make up its checkpoint: one kind of weights, and what describes them."""
    def fits(file: str, patterns: tuple[str, ...]) -> bool:
        return any(PurePosixPath(file).match(pattern) for pattern in patterns)

    # weights of the repository's top or of Megatron's folders; others repeat them for another program
    inside = [f for f in files if re.fullmatch(r"([^/]+|(release|iter_\d{7})/.+)", f)]
    kinds = [[f for f in inside if fits(f, (kind,))] for kind in WEIGHTS]
    distributed = [f for f in inside if f.endswith(DISTRIBUTED)]
    weights: list[str] = next((kind for kind in [*kinds, distributed] if kind), [])
    plain = [f for f in inside if "/" not in f and fits(f, PLAIN)]
    return list(dict.fromkeys([*plain, *weights]))


def _download(name: str, revision: str | None) -> Source:
    at = f" --revision {revision}" if revision else ""
    by_hand = (f"Or download it yourself, `hf download {name}{at} --local-dir {name.split('/')[1]}`, and give that "
               "folder.")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"there is no folder {name}, and to download it from the Hub huggingface-hub is needed: "
                              f"pip install 'hinny[hub]'. {by_hand}") from None
    try:
        info: Any = huggingface_hub.HfApi().model_info(name, revision=revision)
        files = chosen([sibling.rfilename for sibling in info.siblings])
        folder = huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=files)
    # what its HTTP library raises: which library, and so which errors, differs between versions of huggingface-hub
    except Exception as fault:
        first = str(fault).strip().splitlines()
        raise CheckpointError(f"there is no folder {name}, and it cannot be downloaded from the Hub: "
                              f"{first[0] if first else type(fault).__name__}. {by_hand}") from None
    return Source(Path(folder), name, info.sha)
