"""What a task is: samples made for a tokenizer and a setting, and a score for each answer.

A sample is one of three kinds. `Written`: the model writes an answer to a text. `Chosen`: the likeliest of some texts.
`Marked`: the likeliest token at marked places of a list of tokens, after the true ones in front of it.
A task draws the sample of index i from a seed of its own (`Setting.rng`), so that a sample depends on nothing else that
is run, and the first samples of a longer run are those of a shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hinny.infer.reading.requests import Generated, Scored
from hinny.tokenizer import Tokenizer


@dataclass(frozen=True)
class Written:
    """The model continues `prompt` greedily; its text is held against `references`."""

    id: str
    prompt: str
    references: tuple[str, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is saved with the sample and may group the scores: depth, entries, …"""
    document: tuple[int, int] | None = None
    """Characters of the prompt that may be cut where the prompt is too long: all but the instructions and question."""


@dataclass(frozen=True)
class Chosen:
    """Which of `choices`, put behind `prompt`, is the likeliest; `right` is its index."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    right: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    document: tuple[int, int] | None = None
    """As in `Written`."""


@dataclass(frozen=True)
class Marked:
    """`tokens`, of which those marked in `answers` are to be said; at least the first is not marked."""

    id: str
    tokens: tuple[int, ...]
    answers: tuple[bool, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


Sample = Written | Chosen | Marked
Answer = Generated | list[Scored]
"""To a `Written`; to a `Chosen` one Scored a choice; to a `Marked` one Scored, from the second token to the last."""


@dataclass(frozen=True)
class Setting:
    """What a task's samples depend on, besides the task."""

    tokenizer: Tokenizer
    samples: int
    """How many; a task of files takes the first of them, or all if there are fewer."""
    length: int | None = None
    """Tokens of prompt and answer together, for tasks that are made at a length."""
    seed: int = 1_000_003
    data: Path | None = None
    """The folder of data sets, laid out as the Hub's ids."""
    haystack: Path | None = None
    """A text file or folder for haystacks of prose; None: the stand-in."""
    ruler_version: str = "head"

    def rng(self, task: str, index: int) -> np.random.Generator:
        """The source of randomness of one sample: of task, length, seed and index alone."""
        name = f"{task}/{self.length}/{self.seed}/{index}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:16], "little"))


@runtime_checkable
class Task(Protocol):
    """One row of a results table. Implementations are frozen dataclasses; a registry lists them by name."""

    @property
    def name(self) -> str:
        """What a user types, and the name of its results."""

    @property
    def version(self) -> str:
        """Changes whenever a prompt, a sample or a score does."""

    @property
    def shots(self) -> int:
        """Solved examples in front of the question."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `score` gives, each from 0 to 1; the first is the task's headline."""

    @property
    def sized(self) -> bool:
        """Whether it is made at lengths (`Setting.length`)."""

    def missing(self, setting: Setting) -> list[str]:
        """What it needs that is not there, each with the command that fetches it; nothing for most."""

    def least(self, setting: Setting) -> int:
        """Tokens of the shortest sample that can be made; 0 for tasks without lengths."""

    def samples(self, setting: Setting) -> Iterable[Sample]:
        """The samples, `setting.samples` at most, always the same."""

    def settled(self, sample: Written, text: str) -> bool:
        """Whether the score of every text that begins with `text` is known to be that of `text`."""

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """metric → score of one answer; a metric may be left out where it does not apply."""
