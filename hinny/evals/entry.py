"""One row of the table of tasks, whatever kind of task it is: what it needs, its lengths, what it finds."""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hinny.config import Recipe
from hinny.errors import BackendError
from hinny.evals.options import EvalOptions
from hinny.evals.truncation import Limit
from hinny.infer.reading.requests import Generate, Generated, Progress, Reader, Score, Scored, Usage
from hinny.run import Run
from hinny.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hinny.infer.engine import Engine

Rows = list[dict[str, Any]]
Length = int | None
logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What one task found at one length."""

    rows: Rows
    facts: dict[str, Any] = field(default_factory=dict)
    """What the figures depend on besides the record's key: counts, lengths, tokens read, …"""
    samples: list[str] = field(default_factory=list)
    """Every sample with its length, answer and scores as a line of JSON, if they are to be saved."""


@dataclass
class Subject:
    """What is evaluated: a run, and the options; its model is loaded when it is first asked for."""

    run: Run
    options: EvalOptions
    tokenizer: Tokenizer
    given: Reader | None = None
    """A reader in place of the run's model."""
    samples: dict[str, int] = field(default_factory=dict)
    """Task → samples of the unit at hand, counted with its fingerprint."""
    loading: float = 0.0
    """Seconds that it took to load the model."""

    @cached_property
    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        return self.run.recipe

    @cached_property
    def limit(self) -> Limit:
        """Tokens that a sample may take: those told; else, of a model with positions, those that attention was trained
        at: a segment's, where train.segment_len cut the sequences.
        """
        attention = self.recipe.model.attention
        trained = self.recipe.train.pass_len if attention is not None and attention.positions == "rope" else None
        return Limit(self.options.max_length or trained, self.options.truncate or "error")

    @cached_property
    def device(self) -> str:
        """Where the model runs: the device told, or the GPU where there is one."""
        import torch

        device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendError(f"device is {device}, and torch sees no GPU here; give --device cpu.")
        if self.options.device is None:
            logger.info("eval: the model runs on %s", device)
        return device

    @property
    def accelerator(self) -> str | None:
        """The GPU's name, if the model runs on one."""
        if not self.device.startswith("cuda"):
            return None
        import torch

        return torch.cuda.get_device_name(self.device)

    @cached_property
    def engine(self) -> Engine:
        """The run's model."""
        from hinny.infer.engine import Engine

        begun = time.monotonic()
        engine = Engine(self.run.path, self.device, None if self.precision == "fp32" else self.precision)
        self.loading = time.monotonic() - begun
        engine.run = self.run
        return engine

    @cached_property
    def precision(self) -> Literal["fp32", "bf16", "stored"]:
        """Of the weights: as told, or bf16 on a GPU and fp32 on a CPU."""
        told = self.options.precision
        if told is None:
            return "bf16" if self.device.startswith("cuda") else "fp32"
        return cast(Literal["fp32", "bf16", "stored"], told)

    def usage(self) -> dict[str, int]:
        """Tokens that went through the reader; it is not opened for this."""
        return asdict(self.reader.usage if "reader" in self.__dict__ else Usage())

    @cached_property
    def reader(self) -> Reader:
        """Who answers: the reader that was given, or the run's model."""
        if self.given is not None:
            return self.given
        from hinny.infer.reading.reader import ModelReader

        chosen = {} if self.options.batch_tokens is None else {"tokens": self.options.batch_tokens}
        return ModelReader(self.engine.model, self.tokenizer, **chosen)


class LateReader:
    """The subject's reader, opened when it is first asked something: what else can fail is found before."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.tokenizer = subject, subject.tokenizer
        self.sizes: list[int] = []
        """Tokens of every prompt and context."""

    @property
    def usage(self) -> Usage:
        """As of the reader."""
        return self.subject.reader.usage

    def score(self, requests: Sequence[Score], progress: Progress | None = None) -> list[Scored]:
        """As of the reader."""
        self.sizes += [len(request.context) for request in requests]
        return self.subject.reader.score(requests, progress)

    def generate(self, requests: Sequence[Generate], progress: Progress | None = None) -> list[Generated]:
        """As of the reader."""
        self.sizes += [len(request.prompt) for request in requests]
        return self.subject.reader.generate(requests, progress)


class Entry(ABC):
    """A task as the runner and the table of tasks see it. `name` is what is typed and what its files are called."""

    name: str
    version: str
    shots: int
    metrics: tuple[str, ...]
    uses: frozenset[str]
    """Options that act on it, besides those that always do."""

    @abstractmethod
    def missing(self, subject: Subject) -> list[str]:
        """What it needs that is not there, each with what makes it; found without loading the model."""

    @abstractmethod
    def needs(self) -> list[str]:
        """As `missing`, where nothing at all is there."""

    @abstractmethod
    def lengths(self, subject: Subject) -> tuple[list[Length], list[str]]:
        """The lengths at which it runs, each by itself, and why others that were chosen are left out.

        None stands for a task without lengths. ConfigError if all lengths are left out.
        """

    @abstractmethod
    def check(self, subject: Subject, lengths: Sequence[Length]) -> None:
        """Find out, without the model, whether its samples at `lengths` are too long; raises ConfigError then."""

    @abstractmethod
    def key(self, subject: Subject) -> dict[str, Any]:
        """What its figures depend on besides run, weights, tokenizer, precision and length."""

    @abstractmethod
    def fingerprint(self, subject: Subject, length: Length) -> str:
        """What its samples of one length are; another one where they have changed under the same key."""

    @abstractmethod
    def measure(self, subject: Subject, length: Length, progress: Progress) -> Outcome:
        """Run it at one of its lengths."""


def work_done(before: dict[str, int], after: dict[str, int], sizes: Sequence[int]) -> dict[str, Any]:
    """What is noted of every task that goes through a reader: tokens, and how large the prompts were."""
    usage = {name: count - before[name] for name, count in after.items()}
    return {"prompt_tokens": {"min": min(sizes), "mean": sum(sizes) / len(sizes), "max": max(sizes)}, "usage": usage,
            "asked_per_prefilled": usage["asked"] / usage["prefilled"] if usage["prefilled"] else None}


def contents(path: Path) -> str:
    """Fingerprint of a file, or of the files in a folder and their names; hidden ones, a downloader's notes, aside."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            digest.update(str(inside).encode() + b"\0")
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


Report = Callable[[str, float], None]
"""Called with what is under way and the share of it that is done."""
