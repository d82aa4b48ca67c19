"""How fast training goes: tokens a second since the last record, and the time that is left."""

from __future__ import annotations

from collections import deque

RECENT = 20
"""Steps whose mean time gives the time left: enough to be steady, few enough to follow a change."""


class Meter:
    """Adds up the seconds of training steps; saving and held-out losses are not counted."""

    def __init__(self, *, tokens_per_step: int, steps: int, seconds: float = 0.0) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps = steps
        self.seconds = seconds
        """Seconds in steps since the run's first, over all its sessions."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._since_record: list[float] = []

    def add(self, seconds: float) -> None:
        """Count one step that took `seconds`."""
        self.seconds += seconds
        self._recent.append(seconds)
        self._since_record.append(seconds)

    @property
    def tokens_per_s(self) -> float:
        """Of the recent steps."""
        return self.tokens_per_step * len(self._recent) / sum(self._recent)

    def seconds_left(self, step: int) -> float:
        """Estimate when `step` steps are done."""
        return (self.steps - step) * sum(self._recent) / len(self._recent)

    def record(self) -> dict[str, float]:
        """tokens_per_s since the last record, and seconds in all; begins a new window."""
        window, self._since_record = self._since_record, []
        return {"tokens_per_s": self.tokens_per_step * len(window) / sum(window), "seconds": self.seconds}
