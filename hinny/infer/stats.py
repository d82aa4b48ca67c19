"""What an engine is doing and has done: for a person's page, for metrics, for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Taken between two steps. Sums are since the start."""

    running: int
    """Sequences at work."""
    waiting: int
    """Sequences that wait for a place."""
    pages: int
    pages_used: int
    """By sequences at work and by the prefix cache."""
    pages_cached: int
    """By the prefix cache alone: room for a sequence that needs it."""
    slots: int
    slots_used: int
    slots_cached: int
    bytes: int
    """Of pages and slots in all."""
    bytes_used: int
    read: int
    """Tokens that ran through the model to be read: of prompts; again those of a pre-empted sequence, what it had
    written included, and of each continuation for which there was no room when its prompt had been read."""
    written: int
    """Tokens chosen and delivered."""
    prompts: int
    """Prompts that were begun: one a request, however often it is read."""
    hits: int
    """Prompts of which the prefix cache held a beginning."""
    prompt_tokens: int
    """Of these."""
    cached: int
    """Of these, tokens that the prefix cache held when they were begun."""
    preemptions: int
    drafted: int
    """Tokens guessed."""
    accepted: int
    """Tokens guessed and found right."""
    failed_copies: int
    """Of states, which requests went on without: a snapshot was not kept or not used, a continuation read its prompt
    itself, nothing was guessed."""

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of prompts that were not read."""
        return self.cached / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass
class Tally:
    """What is counted as it happens."""

    read: int = 0
    written: int = 0
    prompts: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    failed_copies: int = 0
