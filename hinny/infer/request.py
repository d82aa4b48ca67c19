"""What is asked of the engine, and what it delivers piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field

from hinny.errors import RequestError
from hinny.infer.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """Continue `prompt` by up to `max_tokens` tokens, `n` times. RequestError for what cannot be done."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings, which is never delivered."""
    n: int = 1
    """Continuations of the one prompt, which is read once; of a seeded sampling each has draws of its own."""
    logprobs: int | None = None
    """With each token its log-probability and those of so many likeliest ones; None: without."""
    ignore_eod: bool = False
    """The end-of-document token does not end a continuation: for timing."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty; give at least one token.")
        for name, least in (("max_tokens", 1), ("n", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise RequestError(f"logprobs is {self.logprobs}; it must be 0 to {MOST_LOGPROBS}.")
        if any(not word for word in self.stop):
            raise RequestError("a stop string is empty; it would end every text at once. Leave it out.")


MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Choice:
    """A token that was chosen, and how likely it was."""

    token: int
    logprob: float | None = None
    """Of the model's own distribution, before temperature, penalties and filters; in nats. None if not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class Delivery:
    """The next piece of one continuation of a request."""

    request: int
    """The number that `Core.add` gave."""
    index: int
    """Which of the request's n continuations."""
    text: str
    """What became certain: no unfinished character, nothing that may be part of a stop string."""
    choices: tuple[Choice, ...]
    """The tokens chosen since the last delivery, those of a stop string and the end of the document included."""
    ended: str | None = None
    """With the last piece: "stop" (a stop string, or the document's end), "length", "cancelled" or "failed"."""
    message: str = ""
    """With "failed": why."""
    cached: int = 0
    """Tokens of the prompt that were not read again, from the prefix cache."""
