"""Other people's checkpoints: one file a format, its name table read in both directions."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig
from hinny.errors import CheckpointError

FORMATS = {"megatron": "megatron", "state-spaces": "state_spaces", "mamba": "hf_mamba", "mamba2": "hf_mamba2",
           "nemotron_h": "hf_nemotron_h", "nemotron": "hf_nemotron", "llama": "hf_llama"}
"""Word on the command line → module of this package, imported when it is asked for."""

SELF_WRITTEN = ("megatron", "state-spaces")
"""Formats whose module writes the weights too, by `write_checkpoint`. Of the others safetensors are written through
their rows, with what `write_settings` puts beside."""


class Format(Protocol):
    """What a format's module offers, beside one of these two."""

    NAME: str

    def recognises(self, folder: Path) -> bool:
        """Whether `folder` looks like one of these; cheap, and never raises."""

    def open_checkpoint(self, folder: Path) -> Foreign:
        """The checkpoint in `folder`. Raises CheckpointError with what was found, what is allowed and what to do."""

    def rows(self, model: ModelConfig) -> list[Row]:
        """The name table of `model`."""

    def refusals(self, model: ModelConfig) -> list[str]:
        """Why this format cannot express `model`, each with our key and value; empty if it can.
        Megatron's also takes the layout and the ranks."""


def load(name: str) -> Format:
    """The module of a format, by its word. Raises CheckpointError for an unknown one."""
    if name not in FORMATS:
        raise CheckpointError(f"unknown format {name!r}; known: {', '.join(FORMATS)}.")
    return cast(Format, import_module(f"{__name__}.{FORMATS[name]}"))


def detect(folder: Path, name: str | None = None) -> Format:
    """The format of the checkpoint in `folder`: the one named, or the only one that recognises it."""
    if name is not None:
        return load(name)
    found = [module for module in map(load, FORMATS) if module.recognises(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        words = " and ".join(module.NAME for module in found)
        raise CheckpointError(f"{folder} could be of the formats {words}; say which with --from.")
    raise CheckpointError(f"{folder} is no checkpoint that hinny knows; it holds {_content(folder)}. Known formats: "
                          f"{', '.join(FORMATS)}. Say which with --from to learn why it is not one.")


def _content(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
