"""Timing of work on a GPU: replayed CUDA graphs, sides in turn, inputs that the cache cannot hold.

A side is a list of calls that do the same on different inputs, one after another. Where every side can be captured, a
replay of all its calls is timed, so that launches cost the host nothing; else all sides are timed call by call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hinny.bench.clock import median_range

Call = Callable[[], object]

SAMPLE_S = 2e-3
"""A sample lasts at least this long: an event tells time to half a microsecond."""

SIDE_S = 0.3
"""Seconds spent on the samples of one side, within the limits of `SAMPLES`."""

SAMPLES = (11, 101)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, smallest and largest sample; `clock` is "graph" or "events"."""

    median: float
    low: float
    high: float
    clock: str


def time_in_turn(sides: Sequence[Sequence[Call]]) -> list[Timing]:
    """Times the sides in turn on the current stream; every call must have run before, in full."""
    works, clock = _works(sides)
    once = [min(_sample(work, 1) for _ in range(3)) for work in works]
    repeats = [max(1, math.ceil(SAMPLE_S / seconds)) for seconds in once]
    longest = max(seconds * n for seconds, n in zip(once, repeats, strict=True))
    samples = min(max(SAMPLES[0], int(SIDE_S / longest)), SAMPLES[1])
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(samples):
        for found, work, n in zip(seconds, works, repeats, strict=True):
            found.append(_sample(work, n))
    calls = [[sample / len(side) for sample in found] for found, side in zip(seconds, sides, strict=True)]
    return [Timing(*median_range(found), clock) for found in calls]


def _works(sides: Sequence[Sequence[Call]]) -> tuple[list[Call], str]:
    """One callable a side, that does all its calls; captured, or all of them plain."""
    graphs: list[torch.cuda.CUDAGraph] = []
    for side in sides:
        if (graph := capture(side)) is None:
            return [_in_order(side) for side in sides], "events"
        graphs.append(graph)
    return [graph.replay for graph in graphs], "graph"


def _in_order(side: Sequence[Call]) -> Call:
    def work() -> None:
        for call in side:
            call()

    return work


def capture(side: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    """The calls as one graph on the current stream; None, said in the log, where one of them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    # kept until the end, so that no call writes where another wrote: the cache would serve it
    kept: list[object] = []
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept += [call() for call in side]
    except RuntimeError as fault:
        torch.cuda.synchronize()
        logging.getLogger(__name__).info("no graph, so events: %s", str(fault).splitlines()[0])
        return None
    return graph


def _sample(work: Call, repeats: int) -> float:
    """Seconds of `work` once, of `repeats` in a row."""
    start, end = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


@dataclass(frozen=True)
class Roofs:
    """What the GPU at hand reaches: bytes/s of a copy, read and written bytes counted; FLOP/s of a bf16 product."""

    copy: Timing
    matmul: Timing
    bytes_per_s: float
    flops_per_s: float


def measure_roofs(device: torch.device, *, copied: int = 2 ** 31, width: int = 8192) -> Roofs:
    """Measures both roofs: a copy of `copied` bytes, a product of two (width width) matrices."""
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    sides: list[list[Call]] = [[lambda: target.copy_(source)], [lambda: torch.mm(a, b, out=c)]]
    for (call,) in sides:
        call()
    copy, matmul = time_in_turn(sides)
    return Roofs(copy, matmul, 2 * copied / copy.median, 2 * width ** 3 / matmul.median)
