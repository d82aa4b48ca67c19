"""Holds a foreign checkpoint against our model: every name, shape and type, before a single number is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hinny.checkpoint.formats.foreign import Foreign, Info
from hinny.checkpoint.formats.table import Row
from hinny.checkpoint.sharded import blocks
from hinny.config import ModelConfig
from hinny.errors import CheckpointError
from hinny.model import Model

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights. Narrower ones are quantised: their scales are elsewhere."""

SHOWN = 8
"""Kinds of names that each part of an error lists."""

WIDENED = ("A_log", "D", "dt_bias")
"""Weights of ours, by their last part, that become float32: they are exponents, where rounding is amplified."""


@dataclass(frozen=True)
class Match:
    """What a foreign checkpoint holds for which weights of ours, and everything that is wrong with it.

    mapping    (row, what is stored under its name), for every row that is stored
    infos      our weights → shape, and the type in which they will be kept
    problems   heading → what is wrong, one line a name
    """

    foreign: Foreign
    mapping: list[tuple[Row, Info]]
    infos: dict[str, Info]
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Numbers in our weights."""
        return sum(torch.Size(info.shape).numel() for info in self.infos.values())

    @property
    def likeness(self) -> list[str]:
        """Other layouts of the format that have names which are stored."""
        stored = self.foreign.tensors.infos
        return [variant for variant, name in self.foreign.variants.items() if name in stored]

    def require(self, source: str) -> None:
        """CheckpointError with all problems, grouped, if there are any."""
        if not self.problems:
            return
        lines = [f"  {heading}: {summary(names)}" for heading, names in self.problems.items()]
        if self.likeness:
            lines.append(f"  It looks like {' or '.join(self.likeness)}.")
        raise CheckpointError(f"{source} is not a whole {self.foreign.format} checkpoint of the model that it "
                              "describes. Nothing was converted.\n" + "\n".join(lines))


def shapes(model: ModelConfig) -> dict[str, Tensor]:
    """Our weights by name, on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return Model(model).state_dict()


def match(foreign: Foreign) -> Match:
    """Compare names, shapes and types of `foreign` with its name table and our model."""
    ours = shapes(foreign.model)
    stored = foreign.tensors.infos
    problems: dict[str, list[str]] = {}

    def found(heading: str, line: str) -> None:
        problems.setdefault(heading, []).append(line)

    mapping: list[tuple[Row, Info]] = []
    dtypes: dict[str, torch.dtype] = {}
    for row in foreign.rows:
        if row.theirs not in stored:
            found("missing", row.theirs)
            continue
        info = stored[row.theirs]
        mapping.append((row, info))
        if info.dtype not in FLOATS:
            found("not floating point", f"{row.theirs} is {_word(info.dtype)}")
        if wrong := _misfit(row, info, ours):
            found("wrong shape", f"{row.theirs} is {wrong}")
        dtypes |= {name: _kept(name, info.dtype) for name in row.ours}
    named = {row.theirs for row in foreign.rows}
    for name in stored:
        if name not in named and name not in foreign.ignored:
            found("left over", name)
    _count_ours(foreign.rows, ours, found)
    infos = {name: Info(tuple(value.shape), dtypes[name]) for name, value in ours.items() if name in dtypes}
    return Match(foreign, mapping, infos, problems)


class Reader:
    """Our weights of a matched checkpoint, one at a time, found to be finite."""

    def __init__(self, matched: Match) -> None:
        self._match = matched
        self._shapes = {name: torch.Size(info.shape) for name, info in matched.infos.items()}
        self._rows = {name: row for row, _ in matched.mapping for name in row.ours}
        self._last: tuple[Row, dict[str, Tensor]] | None = None

    def __call__(self, name: str) -> Tensor:
        """Our weight `name`, in the type of its plan. Raises CheckpointError for a value that is not finite."""
        row = self._rows[name]
        if self._last is None or self._last[0] is not row:
            # parts of one tensor are asked for one after the other: it is read once
            self._last = None
            self._last = (row, self._split(row))
        return self._last[1][name].to(self._match.infos[name].dtype)

    def _split(self, row: Row) -> dict[str, Tensor]:
        theirs = self._match.foreign.tensors.read(row.theirs)
        wanted = row.layout.join([torch.empty(self._shapes[name], device="meta") for name in row.ours]).shape
        if row.padded:
            theirs = theirs[:wanted[0]]
        if bad := not_finite(theirs):
            raise CheckpointError(f"{row.theirs} has {bad:,} of {theirs.numel():,} values that are not finite; "
                                  f"it holds {', '.join(row.ours)}. Nothing was converted. Copy the checkpoint again, "
                                  "and ask its makers if it stays.")
        return dict(zip(row.ours, row.layout.split(theirs, [self._shapes[n] for n in row.ours]), strict=True))


def not_finite(value: Tensor) -> int:
    """How many values are infinite or not numbers, without a copy of `value`."""
    return sum(int((~block.isfinite()).sum()) for block in blocks(value) if not _all_finite(block))


def summary(names: Iterable[str]) -> str:
    """Names for an error: layers that differ in their number alone as one, the first kinds of them, and counts."""
    names = list(names)
    kinds = Counter(re.sub(r"\d+", "*", name, count=1) for name in names)
    first = {re.sub(r"\d+", "*", name, count=1): name for name in reversed(names)}
    lines = [first[kind] if count == 1 else f"{first[kind]} and {count - 1:,} like it" for kind, count in kinds.items()]
    more = f"; and {len(lines) - SHOWN:,} more kinds" if len(lines) > SHOWN else ""
    return f"{len(names):,} ({'; '.join(lines[:SHOWN])}{more})"


def entry(row: Row, info: Info) -> dict[str, Any]:
    """A line of the mapping as data: their name, shape and type, and our names."""
    return {"theirs": row.theirs, "shape": list(info.shape), "dtype": _word(info.dtype), "ours": list(row.ours)}


def _all_finite(block: Tensor) -> bool:
    """One pass without a mask: NaN and infinity both show in the extremes."""
    if block.numel() == 0:
        return True
    low, high = block.aminmax()
    return bool(low.isfinite() & high.isfinite())


def _kept(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which our weight `name` is kept, if `dtype` is that of the tensor that holds it."""
    if name.rpartition(".")[2] in WIDENED and dtype in FLOATS:
        return torch.float32
    return dtype


def _misfit(row: Row, info: Info, ours: dict[str, Tensor]) -> str:
    """What is wrong with the shape of a stored tensor, or nothing."""
    if any(name not in ours for name in row.ours):
        return ""
    wanted = tuple(row.layout.join([ours[name] for name in row.ours]).shape)
    if row.padded and len(info.shape) == len(wanted) and info.shape[0] >= wanted[0] and info.shape[1:] == wanted[1:]:
        return ""
    least = "at least " if row.padded else ""
    return "" if info.shape == wanted else f"{_by(info.shape)}, not {least}{_by(wanted)}"


def _count_ours(rows: list[Row], ours: dict[str, Tensor], found: Callable[[str, str], None]) -> None:
    times = Counter(name for row in rows for name in row.ours)
    for name in ours:
        if times[name] == 0:
            found("held by nothing", name)
        elif times[name] > 1:
            found("held more than once", name)
    for name in times:
        if name not in ours:
            found("no weight of this model", name)
    for theirs, count in Counter(row.theirs for row in rows).items():
        if count > 1:
            found("named more than once by the table", theirs)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
