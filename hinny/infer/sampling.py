"""How the next token is drawn: greedy, temperature, top-k, top-p, min-p, penalties, seeds."""

from __future__ import annotations

from dataclasses import dataclass

from hinny.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy and takes no option that could not act. RequestError for a bad value."""

    temperature: float = 0.0
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the likeliest tokens of so much mass, the one that reaches it included."""
    min_p: float | None = None
    """Only tokens at least so likely as this share of the likeliest one."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token written before."""
    frequency_penalty: float = 0.0
    """Taken off it as often as it was written."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or continuation are divided by it, negative ones multiplied."""
    seed: int | None = None
    """The same request with the same seed draws the same numbers, whatever else is being answered."""

    def __post_init__(self) -> None:
        bounds = {"temperature": (0, 100), "top_k": (1, float("inf")), "top_p": (0, 1), "min_p": (0, 1),
                  "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0, 100)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} is {value}; it must be {low} to {high}.")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name} is 0; it must be above 0.")
        idle = [n for n in ("top_k", "top_p", "min_p", "seed") if getattr(self, n) is not None]
        if self.temperature == 0 and idle:
            raise RequestError(f"{idle[0]} has no effect with temperature 0 (greedy); raise temperature or drop it.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as it is: drafts can be checked, and no number is drawn."""
        return (self.temperature == 0 and not self.presence_penalty and not self.frequency_penalty
                and self.repetition_penalty == 1)
