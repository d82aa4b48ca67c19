"""From logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hinny.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy and takes no other option."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise RequestError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k is {self.top_k}; it must be 1 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        idle = [n for n in ("top_k", "top_p", "seed") if getattr(self, n) is not None]
        if self.temperature == 0 and idle:
            raise RequestError(f"{idle[0]} has no effect with temperature 0 (greedy); raise temperature or drop it.")

    def generator(self) -> torch.Generator | None:
        """The source of randomness: seeded if a seed was given, None for greedy."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Next tokens (b,) from logits (b v)."""
    if generator is None:
        return logits.argmax(dim=-1)
    logits = logits.float().cpu() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p is not None:
        ordered, index = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # a token stays while the mass in front of it is under top_p: the first always does
        drop = (ordered.cumsum(dim=-1) - ordered) >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
