"""What a task of the harness gives: figures with intervals, and all that a reader needs to believe them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hinny.evals.intervals import Z, wilson


@dataclass(frozen=True)
class Figure:
    """A mean over documents, from 0 to 1."""

    value: float
    n: int
    """Documents it is a mean over."""
    stderr: float | None
    """Standard error of the mean; None where it is not known: of one document, or a figure that is no mean."""
    low: float | None
    """95 % interval: Wilson's for right or wrong, the normal one, cut to [0, 1], for shares."""
    high: float | None


@dataclass(frozen=True)
class Outcome:
    """The result of one task."""

    task: str
    version: str
    """Of lm-eval or hinny, and of the task's definition: changes whenever a prompt or a score does."""
    shots: int
    seed: int
    """Of the worked examples, where a task draws them at random."""
    headline: str
    """The metric that a table shows."""
    metrics: Mapping[str, Figure]
    parts: Mapping[str, Mapping[str, Figure]]
    """Figures of each subject, of a task that has subjects."""
    documents: int
    requests: int
    """Continuations scored and texts written."""
    truncated: int
    """Requests whose prompt was cut."""
    fingerprint: str
    """SHA-256 over the documents evaluated, in their order."""
    samples: tuple[Mapping[str, Any], ...] | None = field(default=None, repr=False)
    """Every document's prompts, answers, right answer and scores, if asked for."""


def mean(scores: Sequence[float]) -> Figure:
    """The mean of one or more scores of 0 to 1, and how well it is known."""
    n = len(scores)
    value = math.fsum(scores) / n
    stderr = math.sqrt(math.fsum((score - value) ** 2 for score in scores) / (n - 1) / n) if n > 1 else None
    if all(score in (0, 1) for score in scores):
        return Figure(value, n, stderr, *wilson(math.fsum(scores), n))
    if stderr is None:
        return Figure(value, n, None, None, None)
    return Figure(value, n, stderr, max(0.0, value - Z * stderr), min(1.0, value + Z * stderr))
