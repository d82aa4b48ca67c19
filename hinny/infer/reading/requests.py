"""What may be asked of a model in tokens, and what comes back: scoring a continuation, writing one.

A `Reader` answers many requests at once and may share what they have in common; what it answers to one does not depend
on the others, nor on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hinny.errors import RequestError
from hinny.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with requests answered so far and their number."""


@dataclass(frozen=True)
class Score:
    """How likely is `continuation` after `context`? Both have at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise RequestError(f"a score of {len(self.continuation)} tokens after {len(self.context)}; both need at "
                               "least one: begin an empty context with the end-of-document token.")


@dataclass(frozen=True)
class Scored:
    """The answer to a `Score`, one figure for each token of the continuation."""

    log_probabilities: np.ndarray
    """(n,) float64: of each token after all before it, in nats."""
    likeliest: np.ndarray
    """(n,) int64: the likeliest token at each place after the true ones before it."""
    greedy: bool
    """Whether greedy decoding would write the continuation."""

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return float(self.log_probabilities.sum())


@dataclass(frozen=True)
class Generate:
    """Continue `prompt` greedily by up to `max_tokens` tokens, or to the end of the document."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    settled: Callable[[str], bool] | None = None
    """Told the text so far, whether no continuation of it can change the score; decoding may then end early."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty; give at least one token.")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be 1 or more.")


@dataclass(frozen=True)
class Generated:
    """The answer to a `Generate`."""

    tokens: tuple[int, ...]
    """What was decoded, the end-of-document token and those of a stop string included."""
    text: str
    """The text of the tokens, without the stop string and what follows it."""
    ended: str
    """Why it ended: "length", "stop", "eod" or "settled"."""


@dataclass
class Usage:
    """Tokens that were asked for and tokens that went through the model."""

    asked: int = 0
    """Prompt, context and continuation tokens of the requests, each request by itself."""
    prefilled: int = 0
    """Of these, computed."""
    decoded: int = 0
    """Tokens written."""
    padded: int = 0
    """Positions computed that belong to no request: rows of a batch made equally long."""


class Reader(Protocol):
    """Whoever answers requests: a model (`hinny.infer.reading.reader`), or a stand-in for one in a test."""

    tokenizer: Tokenizer
    usage: Usage

    def score(self, requests: Sequence[Score], progress: Progress | None = None) -> list[Scored]:
        """The answer to each request, in their order."""

    def generate(self, requests: Sequence[Generate], progress: Progress | None = None) -> list[Generated]:
        """The answer to each request, in their order."""


