"""Kernels, timed: each checked first, then replayed beside a peer, beside what the GPU at hand could do at best.

The best is the larger of two times: bytes that must be moved over the speed of memory, which is that of the fastest of
several plain ways to use it, and operations over the speed of a matrix product, both measured in the same run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from hinny.bench.gpu_clock import BUFFERS, Call, Roofs, Timing, measure_roofs, time_in_turn
from hinny.bench.kernel_cases import Case, all_cases
from hinny.bench.kernel_cases.case import Draw, Inputs, size
from hinny.bench.kernel_check import check, work_of
from hinny.bench.kernel_peers import MambaSSM, find_peer
from hinny.bench.kernel_table import merge_rows, read_rows, render_table
from hinny.errors import BackendError, ConfigError
from hinny.ops import use_backend
from hinny.run import row, write_atomically

ROTATED = 150e6
"""Bytes of inputs that the timed calls go through in turn, at least; three times the 50 MB of cache of an H100."""

logger = logging.getLogger(__name__)


def bench_kernels(*, against: str | None = None, only: Sequence[str] = (), save: Path | None = None,
                  markdown: Path | None = None) -> list[dict[str, Any]]:
    """Times the ops' kernels on this machine's GPU; rows in ms (less is better) or TB/s, medians, lows and highs.

    against    "mamba_ssm": its Triton kernels, in turn with ours on the same inputs
    only       patterns such as "ssd.*" or "*t=32768*", compared with a case's name and with its name and shape
    save       a JSON file: these rows take the place of rows of the same name and shape in it, the others stay
    markdown   a Markdown file: the table of the rows of `save`, or of these
    Raises ConfigError for a `save` that holds something else; BackendError without a GPU, for a peer that is not
    there, and, after all other cases are timed, for kernels whose results are wrong.
    """
    cases = _chosen(only)
    if save is not None:
        # refused now, and not when the first case is timed
        read_rows(save)
    if not torch.cuda.is_available():
        raise BackendError("bench kernels needs a GPU that PyTorch sees, and this machine has none. "
                           "Kernels are tested without one by `make test`.")
    peer = None if against is None else find_peer(against)
    device = torch.device("cuda", torch.cuda.current_device())
    # graphs cannot be captured on the default stream
    with torch.cuda.stream(torch.cuda.Stream(device)):
        rows, red = time_cases(cases, peer, measure_roofs(device), device, save)
    if markdown is not None:
        write_atomically(markdown, render_table(read_rows(save) if save is not None else rows))
    if red:
        raise BackendError("\n  ".join([f"{len(red)} of {len(cases)} cases were not timed:", *red]))
    return rows


def time_cases(
    cases: Sequence[Case], peer: MambaSSM | None, roofs: Roofs, device: torch.device, save: Path | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the roofs and of all cases that are right, saved as they come, and what is wrong with the others."""
    rows, red = _roof_rows(roofs, device), []
    for number, case in enumerate(cases, start=1):
        logger.info("%d of %d: %s", number, len(cases), case.name)
        try:
            # before a case, not behind it: what a fault has kept alive is free by now
            torch.cuda.empty_cache()
            rows += _case_rows(case, peer, roofs, device)
        except BackendError as fault:
            red.append(str(fault))
            logger.error("  %s", fault)
        except faults() as fault:
            red.append(f"{case.name}: {type(fault).__name__} {str(fault).partition(chr(10))[0]}")
            logger.exception("  %s", case.name)
        if save is not None:
            merge_rows(save, rows)
    return rows, red


def faults() -> tuple[type[Exception], ...]:
    """What is raised for a kernel that cannot be compiled, or that this GPU cannot hold."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    return (RuntimeError, importlib.import_module("triton.runtime.errors").TritonError)


def _chosen(only: Sequence[str]) -> list[Case]:
    cases = all_cases()
    idle = [pattern for pattern in only if not any(_fits(case, pattern) for case in cases)]
    if idle:
        names = "\n  ".join(case.name for case in cases)
        raise ConfigError(f"--only {idle[0]!r} fits no case. A pattern is compared with names such as ssd.forward, and "
                          f"with these:\n  {names}")
    return [case for case in cases if not only or any(_fits(case, pattern) for pattern in only)]


def _fits(case: Case, pattern: str) -> bool:
    return fnmatchcase(case.what, pattern) or fnmatchcase(case.name, pattern)


def _roof_rows(roofs: Roofs, device: torch.device) -> list[dict[str, Any]]:
    """The two roofs; the slowest sample gives the lowest speed."""
    return [row(what, "torch", rate / 1e12, unit, shape=shape, low=rate * timing.median / timing.high / 1e12,
                high=rate * timing.median / timing.low / 1e12, device=_gpu(device))
            for what, rate, unit, shape, timing in (
                ("roof.memory", roofs.bytes_per_s, "TB/s", f"way={roofs.way} buffers={BUFFERS} bytes=256MiB",
                 roofs.memory),
                ("roof.matmul", roofs.flops_per_s, "TFLOP/s", "m=8192 n=8192 k=8192 dtype=bf16", roofs.matmul))]


def _case_rows(case: Case, peer: MambaSSM | None, roofs: Roofs, device: torch.device) -> list[dict[str, Any]]:
    """The case's speed and its error, each beside the peer's, if that is right."""
    compared = peer if case.peer is not None else None
    error, peer_error = check(case, compared, device)
    if compared is not None and peer_error is not None and not peer_error <= case.tolerance:
        logger.warning("  %s differs from the plain form by %.1e, more than %.1e: ours is timed alone", compared.name,
                       peer_error, case.tolerance)
        compared = peer_error = None
    with use_backend("triton"):
        sides = _sides(case, compared, device)
        logger.info("  right (error %.1e, at most %.1e); warming up, %d sets of inputs", error, case.tolerance,
                    len(sides[0]))
        for side in sides:
            # compiles, and lets the peer tune; each set equally often, so that replayed ones stay at different tokens
            for call in side:
                call()
        timings = time_in_turn(sides)
    name = None if compared is None else compared.name + (f" without {case.peer_lacks}" if case.peer_lacks else "")
    (value, low, high), *theirs = (_figures(case, timing) for timing in timings)
    peer_value = theirs[0][0] if theirs else None
    least = max(case.moved / roofs.bytes_per_s, case.flops / roofs.flops_per_s)
    theirs_text = "" if peer_value is None else f"; {name} {peer_value:.4g}"
    logger.info("  %.4g %s%s (%s)", value, case.unit, theirs_text, timings[0].clock)
    better = None if peer_value is None else (peer_value / value if case.unit == "ms" else value / peer_value)
    return [row(case.what, "triton", value, case.unit, shape=f"{case.shape} clock={timings[0].clock}", low=low,
                high=high, bound=_figures(case, Timing(least, least, least, ""))[0], peer=name, peer_value=peer_value,
                ratio=better, device=_gpu(device)),
            row(f"{case.what}.error", "triton", error, "relative", shape=case.shape, bound=case.tolerance,
                peer=name if peer_error else None, peer_value=peer_error, device=_gpu(device),
                ratio=peer_error / error if peer_error and error else None)]


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _figures(case: Case, timing: Timing) -> tuple[float, float, float]:
    """Value, low and high in the case's unit; the slowest sample gives the lowest speed."""
    if case.unit == "ms":
        return timing.median * 1e3, timing.low * 1e3, timing.high * 1e3
    return case.moved / timing.median / 1e12, case.moved / timing.high / 1e12, case.moved / timing.low / 1e12


def _sides(case: Case, peer: MambaSSM | None, device: torch.device) -> list[list[Call]]:
    """Our calls and the peer's, each list over the same sets of inputs."""
    sets = draw_sets(case, device)
    sides: list[list[Call]] = [[work_of(case, case.ours, inputs) for inputs in sets]]
    if peer is not None:
        sides.append([work_of(case, case.of_peer(peer), inputs, lacking=bool(case.peer_lacks)) for inputs in sets])
    return sides


def draw_sets(case: Case, device: torch.device) -> list[Inputs]:
    """As many sets of inputs as the cache cannot hold."""
    draw = Draw(device, 2)
    sets = [case.inputs(draw)]
    while len(sets) < max(case.sets, math.ceil(ROTATED / size(sets[0]))):
        draw.number = len(sets)
        sets.append(case.inputs(draw))
    return sets
