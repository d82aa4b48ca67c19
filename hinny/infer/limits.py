"""What an engine may use and take on."""

from __future__ import annotations

from dataclasses import dataclass

from hinny.errors import ConfigError

PAGE = 64
"""Tokens whose keys and values lie together, of one sequence."""


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine, from which its memory follows; no answer depends on them. ConfigError for a bad one."""

    sequences: int = 32
    """Continuations at work at the same time; more wait."""
    context: int = 4096
    """Tokens of a prompt and its continuation; a longer request is refused."""
    memory: int | None = None
    """Bytes for states, keys and snapshots; None: what `sequences` of `context` tokens need, or what is free."""
    snapshots: int | None = None
    """States kept for prompts that begin alike; None: as many as sequences; 0: no prefix cache."""
    step_tokens: int = 2048
    """Of one forward pass: what decoding leaves of them is for reading prompts, which are cut accordingly."""
    drafts: int = 0
    """Tokens guessed from the text so far and checked in one pass; greedy requests alone, whose answers do not change.
    """
    page: int = PAGE

    def __post_init__(self) -> None:
        for name in ("sequences", "context", "step_tokens", "page"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("snapshots", "drafts", "memory"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.step_tokens < self.sequences * (1 + self.drafts):
            raise ConfigError(f"step_tokens is {self.step_tokens}; at least sequences * (1 + drafts) is needed, "
                              f"{self.sequences * (1 + self.drafts)}: each sequence at work has its share of a step.")
