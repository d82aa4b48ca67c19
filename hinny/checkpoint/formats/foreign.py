"""What a format says of a checkpoint that it has opened; nothing of it is in memory yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig

LONGEST = "longest sequence"
"""The fact that says how long the sequences were, in digits."""


class Info(NamedTuple):
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Tensors(ABC):
    """Tensors by name, read one at a time: what is asked for, not the file, is in memory."""

    @property
    @abstractmethod
    def infos(self) -> Mapping[str, Info]:
        """Name → shape and type of everything that is there, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. It may be a view of a mapped file: valid while this object is."""

    @abstractmethod
    def largest_file(self) -> int:
        """Bytes of the largest file that it reads from."""


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint, opened and understood.

    format      which, for a person: "Megatron, as released in June 2024", "Hugging Face nemotron_h"
    model       the architecture in our terms
    tensors     what is stored, with tensor- and pipeline-parallel shards already merged by name
    rows        the whole name table for `model`: every stored tensor must be in it, and everything in it stored
    ignored     stored names that hold no weights, and why they do not
    tokenizer   its files: one of tokenizer.json and *.model
    facts       what else is worth keeping, printed and stored with the run: counts, settings that our recipe lacks
    variants    other layouts of this format → a name that only they have: to say which one a misfit looks like
    """

    format: str
    model: ModelConfig
    tensors: Tensors
    rows: list[Row]
    ignored: Mapping[str, str] = field(default_factory=dict)
    tokenizer: tuple[Path, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, str] = field(default_factory=dict)
