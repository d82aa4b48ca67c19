"""The suite `extension`: what longer sequences did to a run, beside the run that it began with.

Both models are asked the same, at lengths that follow from the length T that the run was trained on and the length B
of its base: loss by position to 4 T, loss by context, phone books and needles by depth and length, recall up to B,
norms of states. What was found goes to RUN/extension.json, from which hinny.study.extension makes a page.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hinny.config import Recipe
from hinny.errors import DataError, HinnyError
from hinny.evals.entry import Entry, Length, Outcome, Rows, Subject
from hinny.evals.options import EvalOptions
from hinny.infer.reading.requests import Progress
from hinny.run import Run, weights_print, write_atomically

logger = logging.getLogger(__name__)

FILE = "extension.json"
SAMPLES = 16
"""Sequences of text, and samples of each length and depth, where the options say nothing."""
NEEDLES = 40
"""Needles of each length, over all depths."""


@dataclass(frozen=True)
class Lengths:
    """What the lengths of a run's tasks follow from: those of its training, and of its base's."""

    trained: int
    base: int

    def table(self) -> dict[str, tuple[int, ...]]:
        """Task → lengths."""
        t, b = self.trained, self.base
        short = tuple(n for n in (b // 2, b) if n > 0)
        # windows of all lengths cover the same text
        windows = tuple(n for n in sorted({b, t, 2 * t, 4 * t}) if 4 * t % n == 0)
        books = tuple(sorted({b, t, 2 * t}))
        return {"position-joined": (4 * t,), "window-loss": windows, "phonebook-depth": books,
                "niah-depth": books, "phonebook": short, "copy": short, "mqar": (), "state-norms": (4 * t,)}


class Fixed(Entry):
    """An entry whose lengths and samples are the suite's where the options choose none."""

    def __init__(self, inner: Entry, lengths: tuple[int, ...]) -> None:
        self.inner = inner
        self.name, self.version, self.shots = inner.name, inner.version, inner.shots
        self.metrics, self.uses = inner.metrics, inner.uses
        samples = {"samples": NEEDLES if inner.name == "niah-depth" else SAMPLES} if "samples" in inner.uses else {}
        self._told: dict[str, Any] = {**({"lengths": lengths} if lengths else {}), **samples}

    @contextmanager
    def _suited(self, subject: Subject) -> Iterator[None]:
        """The subject with the suite's choices in place of what was not chosen."""
        given = subject.options
        told = {key: value for key, value in self._told.items() if getattr(given, key) is None}
        subject.options = replace(given, **told)
        try:
            yield
        finally:
            subject.options = given

    def missing(self, subject: Subject) -> list[str]:
        with self._suited(subject):
            return self.inner.missing(subject)

    def needs(self) -> list[str]:
        return self.inner.needs()

    def lengths(self, subject: Subject) -> tuple[list[Length], list[str]]:
        with self._suited(subject):
            return self.inner.lengths(subject)

    def check(self, subject: Subject, lengths: Sequence[Length]) -> None:
        with self._suited(subject):
            self.inner.check(subject, lengths)

    def key(self, subject: Subject) -> dict[str, Any]:
        with self._suited(subject):
            return self.inner.key(subject)

    def fingerprint(self, subject: Subject, length: Length) -> str:
        with self._suited(subject):
            return self.inner.fingerprint(subject, length)

    def measure(self, subject: Subject, length: Length, progress: Progress) -> Outcome:
        with self._suited(subject):
            return self.inner.measure(subject, length, progress)


def origin(run: Run) -> dict[str, Any] | None:
    """What `run` began with, by its newest checkpoint: from, step, name, seq_len; None if with its own first weights.

    RunError and CheckpointError as of the run.
    """
    from hinny.checkpoint.store import read_meta

    return read_meta(run).get("init")


Ask = Callable[[Run, Lengths, EvalOptions], Rows]
"""Evaluates a run on the suite's tasks at these lengths: the runner's."""


def extension(path: str | Path, options: EvalOptions, ask: Ask) -> Rows:
    """Ask the run and, where it can be asked, its base; write RUN/extension.json; returns the rows of the run.

    The base reads the run's held-out text. It is left out, aloud, where the run has none, or where it is gone or has
    been trained on since.
    """
    run = Run(path)
    began, length = origin(run), run.recipe.train.seq_len
    lengths = Lengths(length, length if began is None else int(began["seq_len"]))
    if 4 * lengths.trained % lengths.base and options.lengths is None:
        logger.warning("eval: extension: the loss in windows of the base's %d tokens is not asked: they do not divide "
                       "4 x %d, so windows of both do not cover the same text.", lengths.base, lengths.trained)
    after = ask(run, lengths, options)
    before: Rows = []
    told = "" if began is not None else f"{run.path} began with its own first weights"
    if began is not None:
        try:
            before = ask(_base(began, run), lengths, options)
        except HinnyError as fault:
            told = str(fault)
    if told:
        logger.warning("eval: extension: nothing to compare with: %s", told)
    content = {"run": run.recipe.name, "trained_length": lengths.trained, "base_length": lengths.base,
               "base": None if began is None else {key: began[key] for key in ("name", "step", "seq_len")},
               "no_base": told, "after": after, "before": before}
    write_atomically(run.path / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return after


def _base(began: dict[str, Any], run: Run) -> Run:
    """The base, to be asked what the run is asked. DataError if it is not what the run began with any more."""
    from hinny.checkpoint.store import read_meta

    base = _OnTextOf(began["from"], run)
    meta = read_meta(base)
    if meta["step"] != began["step"]:
        raise DataError(f"{base.path} is at step {meta['step']}, and the run began with step {began['step']} of it")
    if weights_print(meta) != began["weights"]:
        raise DataError(f"{base.path} has other weights at step {meta['step']} than the run began with")
    return base


class _OnTextOf(Run):
    """A run that is asked what another one is asked: about its held-out text, whose words are its own, and for recall
    as it was practised there."""

    def __init__(self, path: str | Path, other: Run) -> None:
        super().__init__(path)
        self._other = other

    @property
    def recipe(self) -> Recipe:
        own, data = super().recipe, self._other.recipe.data
        taken = {"path": data.path, "blend": data.blend, "synthetic": data.synthetic}
        return own.model_copy(update={"data": own.data.model_copy(update=taken)})

    @property
    def text_home(self) -> Path:
        return self._other.path
