"""What a user may choose about an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from hinny.errors import ConfigError


@dataclass(frozen=True)
class EvalOptions:
    """Sizes and the seed of the evaluations; the same options give the same examples to every model."""

    samples: int = 64
    """Examples at each length, form or number of pairs."""
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    """Prompt lengths in tokens of the phonebook and of copying."""
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of key-value pairs of multi-query recall."""
    windows: int = 128
    """Held-out windows of the training length, from the start of the held-out documents."""
    seed: int = 1_000_003
    """Of the examples. The training stream draws from other seed sequences, so none is seen in training."""

    def __post_init__(self) -> None:
        for name in ("samples", "windows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("lengths", "pairs"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give one or more positive numbers.")
