"""The points of `hinny bench generate --recipe`, one after another: rows after each, saved at once, so that a command
that is killed keeps what it found and goes on there; a point that the memory does not hold is said and recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from hinny import counts
from hinny.bench.clock import median_range
from hinny.bench.generation_rows import DECODE, SKIPPED, Point, done, key
from hinny.bench.kernel_cases.case import shape_text
from hinny.bench.kernel_table import Row, merge_rows, read_rows
from hinny.config import Recipe
from hinny.predict import device_called
from hinny.run import commit, machine, row

ROUNDS = 2
"""Times that a prompt is read, and that requests are answered, behind one time that is not timed."""


class Side(Protocol):
    """Who is timed; seconds of each step, prompt or answer."""

    def decode(self, batch: int, context: int, tokens: int) -> list[float]:
        """Of `tokens` steps of `batch` sequences of about `context` tokens."""

    def prefill(self, length: int, repeats: int) -> list[float]:
        """From a prompt of `length` tokens to the first token behind it."""

    def answer(self, batch: int, length: int, tokens: int, repeats: int) -> list[float]:
        """From `batch` requests of `length` tokens to the last of the `tokens` that each gets."""

    def free(self) -> None:
        """Give back what the points before held."""


class Peer(Protocol):
    """Who is timed beside it: seconds of each step."""

    name: str

    def decode(self, batch: int, context: int, tokens: int) -> list[float]:
        """As of a `Side`."""

    def context(self, asked: int) -> int:
        """The context that it is timed at where a point asks for `asked`."""


@dataclass(frozen=True)
class Where:
    """The machine of a sweep."""

    device: torch.device
    name: str | None
    """What PyTorch calls the GPU; None for a CPU."""
    processes: int
    """That the model is cut over, each on a GPU of its own where there are any."""
    copy_rate: float
    """Bytes/s that memory was found to move."""
    first: bool
    """Whether this process is the one that saves."""
    room: int | None
    """Bytes of a GPU's memory; None: points are tried, whatever they need."""

    def peak(self) -> int:
        """Most bytes that PyTorch's allocator held since the last point; 0 on a CPU, where nobody counts."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


class Sweep:
    """What is measured of one model on one machine, and the file that it goes to."""

    def __init__(self, recipe: Recipe, ours: Side, where: Where, *, precision: str, state: str, tokens: int, piece: int,
                 peer: Peer | None = None, save: Path | None = None) -> None:
        """recipe: its name is the rows' variant; save: a JSON file of rows, or None."""
        self.recipe, self.ours, self.where, self.peer, self.save = recipe, ours, where, peer, save
        self.precision, self.state, self.tokens, self.piece = precision, state, tokens, piece
        self.rows: list[Row] = [] if save is None else read_rows(save)
        self.made: list[Row] = []

    def decode(self, batch: int, context: int) -> None:
        """Rows of one batch at one context."""
        point = Point(self.recipe.model, batch, context, self.precision, self.state, self.where.processes,
                      None if self.where.name is None else device_called(self.where.name))
        shape = self._shape(context=context, batch=batch, steps=self.tokens, filled="random")
        if self._there(shape, DECODE, SKIPPED):
            return
        needed = point.memory(self.tokens)
        if self.where.room is not None and needed > self.where.room:
            self._skip(shape, needed, "it is not tried")
            return
        seconds = self._tried(lambda: self.ours.decode(batch, context, self.tokens), shape, needed)
        if seconds is not None:
            peak = self.where.peak()
            self._add(self._decoded(point, shape, seconds, self._beside(batch, context), needed, peak))

    def prefill(self, length: int) -> None:
        """Rows of one prompt of `length` tokens, alone."""
        shape = self._shape(length=length, batch=1, piece=self.piece)
        if self._there(shape, "prefill", "prefill.skipped"):
            return
        seconds = self._tried(lambda: self.ours.prefill(length, ROUNDS), shape, None, "prefill.skipped")
        if seconds is None:
            return
        found = [self._row("prefill", shape, [length / s for s in seconds], "tokens/s")]
        hardware = None if self.where.name is None else device_called(self.where.name)
        rate = None if hardware is None else hardware.flops_fp32 if self.precision == "fp32" else hardware.flops
        if rate is not None:
            model = self.recipe.model
            flops = length * (counts.forward_flops(model, length) - counts.head_flops(model)) + counts.head_flops(model)
            found.append(self._row("prefill.mfu", shape, [flops / s / (rate * self.where.processes) for s in seconds],
                                   "of peak"))
        self._add(found)

    def answer(self, length: int, batch: int) -> None:
        """Rows of `batch` requests of `length` tokens, answered by the whole engine with as many tokens as a decode
        point has steps.
        """
        shape = self._shape(prompt=length, batch=batch, written=self.tokens)
        if self._there(shape, "answer", "answer.skipped"):
            return
        seconds = self._tried(lambda: self.ours.answer(batch, length, self.tokens, ROUNDS), shape, None,
                              "answer.skipped")
        if seconds is not None:
            self._add([self._row("answer", shape, [batch * self.tokens / s for s in seconds], "tokens/s")])

    def _decoded(self, point: Point, shape: str, seconds: list[float], beside: dict[str, Any], needed: int,
                 peak: int) -> list[Row]:
        floor = point.batch * self.where.copy_rate / point.bytes
        speeds = [point.batch / s for s in seconds]
        value = median_range(speeds)[0]
        ratio = {"ratio": value / beside["peer_value"]} if beside else {}
        rows = [self._row(DECODE, shape, speeds, "tokens/s", bound=floor, **beside, **ratio),
                self._row("decode.floor_share", shape, [speed / floor for speed in speeds], "of floor"),
                self._row("decode.bytes", shape, [point.bytes], "B"),
                self._row("decode.copy_rate", shape, [self.where.copy_rate / 1e12], "TB/s")]
        if (predicted := point.predicted()) is not None:
            basis = "data sheet" if point.calibration is None else "calibrated"
            rows.append(self._row("decode.error", shape, [predicted / value - 1], "of measured",
                                  peer=f"hinny show, {basis}", peer_value=predicted))
        if peak and self.peer is None:  # whose twin is in memory too
            rows.append(self._row("decode.peak_memory", shape, [peak / 1e9], "GB", bound=needed / 1e9))
        return rows

    def _beside(self, batch: int, context: int) -> dict[str, Any]:
        """The peer's tokens/s, if there is a peer and it has room."""
        if self.peer is None:
            return {}
        at = self.peer.context(context)
        self.ours.free()
        try:
            seconds = self.peer.decode(batch, at, self.tokens)
        except torch.OutOfMemoryError as fault:
            _say(f"{self.peer.name} at batch {batch}, context {at}: out of memory ({_first_line(fault)}).")
            return {}
        name = self.peer.name if at == context else f"{self.peer.name}, context {at}"
        return {"peer": name, "peer_value": median_range([batch / s for s in seconds])[0]}

    def _tried(self, work: Callable[[], list[float]], shape: str, needed: int | None,
               what: str = SKIPPED) -> list[float] | None:
        """What `work` gives, or None, recorded, where memory ran out."""
        try:
            return work()
        except torch.OutOfMemoryError as fault:
            if self.where.processes > 1:
                raise  # the other processes wait in a sum: what is saved is kept
            said = _first_line(fault)
        self._skip(shape, needed or 0, f"out of memory: {said}", what)
        return None

    def _skip(self, shape: str, needed: int, why: str, what: str = SKIPPED) -> None:
        self.ours.free()
        _say(f"skipped {shape}: {needed / 1e9:.1f} GB predicted; {why}.")
        self._add([self._row(what, shape, [needed / 1e9], "GB",
                             bound=None if self.where.room is None else self.where.room / 1e9)])

    def _there(self, shape: str, *whats: str) -> bool:
        """Whether the point is in the file; then its rows are among this command's too."""
        rows = [one for one in self.rows if one["what"] != DECODE or one["peer"] or self.peer is None]
        if not done(rows, self.recipe.name, shape, whats=whats, commit=commit(), machine=machine(self.where.name)):
            return False
        self.made += [one for one in self.rows if (one["variant"], one["shape"]) == (self.recipe.name, shape)]
        _say(f"{shape}: measured before at this commit, kept.")
        return True

    def _add(self, rows: list[Row]) -> None:
        self.made += rows
        if self.save is not None and self.where.first:
            merge_rows(self.save, rows, key)

    def _row(self, what: str, shape: str, values: list[float], unit: str, **more: Any) -> Row:
        value, low, high = median_range(values)
        one = len(values) == 1
        return row(what, self.recipe.name, value, unit, shape=shape, device=self.where.name,
                   low=None if one else low, high=None if one else high, **more)

    def _shape(self, **sizes: Any) -> str:
        where = {"gpus": self.where.processes} if self.where.name else {"threads": torch.get_num_threads()}
        cut = {"tensor": self.where.processes} if self.where.processes > 1 else {}
        return shape_text(**sizes, precision=self.precision, state=self.state, weights="random",
                          **cut, **where)


def _say(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _first_line(fault: Exception) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
