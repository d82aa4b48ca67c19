"""Timing of work on a GPU: replayed CUDA graphs, sides in turn, inputs that the cache cannot hold.

A side is a list of calls that do the same on different inputs, one after another. Where every side can be captured, a
replay of all its calls is timed, so that launches cost the host nothing; else all sides are timed call by call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from hinny.bench.clock import median_range

Call = Callable[[], object]

SAMPLE_S = 2e-3
"""A sample lasts at least this long: an event tells time to half a microsecond."""

SIDE_S = 0.3
"""Seconds spent on the samples of one side, within the limits of `SAMPLES`."""

SAMPLES = (11, 101)

BUFFERS = 9
"""Buffers that the memory's roof is measured in, gone through in turn."""


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
    """What the GPU at hand reaches: bytes/s of memory, read and written bytes counted; FLOP/s of a bf16 product.

    `way` names the PyTorch call that memory was fastest in, `memory` is the timing of one such call.
    """

    memory: Timing
    matmul: Timing
    bytes_per_s: float
    flops_per_s: float
    way: str


def measure_roofs(device: torch.device, *, buffer: int = 2 ** 28, width: int = 8192) -> Roofs:
    """Measures both roofs: plain ways to move buffers of `buffer` bytes, a product of two (width width) matrices."""
    ways = _memory_ways(list(torch.randn(BUFFERS, buffer // 4, device=device)))
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    sides: list[list[Call]] = [[lambda: torch.mm(a, b, out=c)], *(calls for _, calls in ways.values())]
    for side in sides:
        for call in side:
            call()
    matmul, *timings = time_in_turn(sides)
    rates = {way: (passes * buffer / timing.median, timing)
             for (way, (passes, _)), timing in zip(ways.items(), timings, strict=True)}
    way = max(rates, key=lambda name: rates[name][0])
    rate, memory = rates[way]
    return Roofs(memory, matmul, rate, 2 * width ** 3 / matmul.median, way)


def _memory_ways(buffers: Sequence[torch.Tensor]) -> dict[str, tuple[int, list[Call]]]:
    """Way → how many buffers one call reads and writes, and its calls; a call never takes a buffer of the one before.

    A copy alone is no roof: kernels that read more than they write, or write where they read, move more a second.
    """
    inputs, outputs = buffers[:6], buffers[6:]
    pairs = [(source, outputs[i % 3]) for i, source in enumerate(inputs)]
    triples = list(zip(inputs[:3], inputs[3:], outputs, strict=True))
    # inputs only ever change their sign, so that no value grows
    return {"copy": (2, [partial(target.copy_, source) for source, target in pairs]),
            "neg": (2, [partial(torch.neg, source, out=target) for source, target in pairs]),
            "neg_in_place": (2, [buffer.neg_ for buffer in buffers]),
            "add": (3, [partial(torch.add, a, b, out=c) for a, b, c in triples]),
            "sum": (1, [partial(torch.sum, buffer) for buffer in buffers])}
