"""Timing of short repeated work: medians and the spread around them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def median_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest value."""
    return statistics.median(values), min(values), max(values)


def in_turn(works: Sequence[Callable[[], object]], repeats: int, warmup: int = 1) -> list[list[float]]:
    """Seconds of each work, `repeats` times, taken in turn so that a change of the machine's speed meets all alike."""
    for work in works:
        for _ in range(warmup):
            work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for found, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return seconds
