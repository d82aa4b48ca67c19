"""What is known of released checkpoints, to tell whether a file is the one, is read rightly and behaves.

Checksums, greedy continuations in bfloat16 and PIQA are those that github.com/beingamanforever/Mixing-Matters observed,
having loaded the two 4K releases with Megatron-LM's commit df61e60. Counts follow from the models' settings; those of
mamba2-8b-3t-4k were observed there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hinny.checkpoint.disk import sha256
from hinny.errors import CheckpointError, ConfigError

FILE = "release/mp_rank_00/model_optim_rng.pt"
"""Where NVIDIA's releases hold their weights."""

TOKENS = 16
"""Tokens of each greedy continuation."""

PIQA_NEAR = 0.006
"""Distance from a known accuracy that counts as the same: the paper's figure and its repetition are 0.0055 apart."""

PIQA_EXAMPLES = 1838

MAMBA2_GREEDY = (
    ("The capital of France is", " Paris.\n\nThe capital of France is Paris.\n\nThe capital of"),
    ("Water is made of hydrogen and",
     " oxygen. Hydrogen is the most abundant element in the universe. It is the most"),
    ("The first president of the United States was",
     " George Washington.\n\nThe first president of the United States was George Washington."),
    ("Two plus two equals", " four.\n\nThe second is the fact that the world is not a static"),
    ("The opposite of hot is", " cold.\n\nThe opposite of hot is cold. The opposite of hot is"),
    ("The largest planet in the solar system is",
     " Jupiter. It is the fifth planet from the sun. It is the largest planet"),
)


@dataclass(frozen=True)
class Release:
    """A released checkpoint. What is None, or empty, nobody has reported.

    hub          its repository
    parameters   numbers in its weights
    tensors      how many tensors its file holds, as stored
    sha256       of FILE, or of the file named
    greedy       (prompt, its greedy continuation of TOKENS tokens)
    piqa         zero-shot accuracy, by summed log-likelihood
    """

    hub: str
    parameters: int
    tensors: int | None = None
    sha256: str | None = None
    file: str = FILE
    greedy: tuple[tuple[str, str], ...] = ()
    piqa: float | None = None


RELEASES = {
    "mamba2-8b-3t-4k": Release(
        "nvidia/mamba2-8b-3t-4k", 8_236_999_680, 507,
        "47c2766f6aad89d73beafbeaecb334aab902d7370906d081764a90bb7a8bbbcb", greedy=MAMBA2_GREEDY, piqa=0.7927),
    "mamba2-hybrid-8b-3t-4k": Release(
        "nvidia/mamba2-hybrid-8b-3t-4k", 8_654_517_248, 315,
        "480964a9dca70e3dcbf348bbf812ed2388476c2b2968cb903cca666d08547399", piqa=0.7965),
    "mamba2-hybrid-8b-3t-32k": Release("nvidia/mamba2-hybrid-8b-3t-32k", 8_654_517_248, 315),
    "mamba2-hybrid-8b-3t-128k": Release("nvidia/mamba2-hybrid-8b-3t-128k", 8_654_517_248, 315),
    "gpt3-8b-multi-3.5t-base": Release("nvidia/gpt3-8b-multi-3.5t-base", 8_540_135_424, 260),
}
"""Name → what is known."""


def find(name: str) -> Release:
    """The release of that name. Raises ConfigError for an unknown one."""
    if name not in RELEASES:
        raise ConfigError(f"verify is {name!r}; known releases: {', '.join(RELEASES)}.")
    return RELEASES[name]


def item(what: str, expected: Any, found: Any, passed: bool | None = None) -> dict[str, Any]:
    """One thing that was verified, as data; equal is passed unless it is said."""
    passed = found == expected if passed is None else passed
    return {"what": what, "expected": expected, "found": found, "passed": passed}


def check(release: Release, folder: Path, tensors: int, parameters: int,
          progress: Callable[[float], None] | None = None) -> list[dict[str, Any]]:
    """The checksum of the release's file in `folder`, where it is known, and the counts of what was opened."""
    items = []
    if release.sha256 is not None:
        file = folder / release.file
        if not file.is_file():
            raise CheckpointError(f"{folder} is not {release.hub}: it has no {release.file}.")
        size, done = max(1, file.stat().st_size), 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(min(1.0, done / size))

        items.append(item(f"sha256 of {release.file}", release.sha256, sha256(file, add)))
    if release.tensors is not None:
        items.append(item("tensors", release.tensors, tensors))
    return [*items, item("parameters", release.parameters, parameters)]
