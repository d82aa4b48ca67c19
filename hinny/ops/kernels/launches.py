"""How kernels are launched: tile sizes, warps and pipeline stages, measured once per GPU generation, shipped as data.

The files `launch/sm90/*.json` and the like hold, per kernel, rules in order; the first whose `when` fits the call
gives `use`:

    {"ssd_forward": [{"when": {"n": 128, "p": [64, 128]}, "use": {"Q": 64, "num_warps": 4, "num_stages": 2}},
                     {"when": {}, "use": {"Q": 32, "num_warps": 4, "num_stages": 1}}]}

A value in `when` is the number that must match, or the smallest and largest of a range. Nothing is tuned at first call.
`hinny tune` writes such files for the GPU at hand into `measured_folder()`, from where they are taken before the
shipped ones. A kernel that a table leaves out is launched by the table "default".
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hinny.errors import BackendError

FALLBACK = "default"
Rules = dict[str, list[dict[str, Any]]]
Use = Mapping[str, int]

_known: dict[tuple[Any, ...], Use] = {}
_trial: tuple[Mapping[str, Use], set[tuple[str, int]]] | None = None


def launch(kernel: str, device: torch.device, **call: int) -> dict[str, int]:
    """Constants and num_warps, num_stages for `kernel` on `device`, for a call with these sizes."""
    if _trial is not None:
        uses, seen = _trial
        number = matching(in_use(generation(device))[kernel], kernel, call)
        seen.add((kernel, number))
        return dict(uses.get(kernel) or in_use(generation(device))[kernel][number]["use"])
    key = (kernel, device, *call.items())
    use = _known.get(key)
    if use is None:
        table = in_use(generation(device))[kernel]
        use = _known[key] = table[matching(table, kernel, call)]["use"]
    return dict(use)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch on `device` can begin before the one that it depends on has ended."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def find(name: str, kernel: str, **call: int) -> dict[str, int]:
    """The `use` that the shipped table `name` has for a call of `kernel` with these sizes."""
    table = rules(name)[kernel]
    return dict(table[matching(table, kernel, call)]["use"])


def matching(table: list[dict[str, Any]], kernel: str, call: Mapping[str, int]) -> int:
    """The number of the first of a kernel's rules that fits a call."""
    for number, rule in enumerate(table):
        if all(_fits(call[key], wanted) for key, wanted in rule["when"].items()):
            return number
    raise AssertionError(f"no launch rule of {kernel} fits {dict(call)}: end its list with an empty 'when'")


def _fits(value: int, wanted: int | list[int]) -> bool:
    return value == wanted if isinstance(wanted, int) else wanted[0] <= value <= wanted[1]


@contextmanager
def trial(uses: Mapping[str, Use] | None = None) -> Iterator[set[tuple[str, int]]]:
    """Inside, the kernels named in `uses` are launched with these; gives (kernel, number of its rule) of every launch.

    For measuring alone: it holds for the whole process, because a backward runs on threads of its own.
    """
    global _trial
    assert _trial is None, "one trial at a time"
    seen: set[tuple[str, int]] = set()
    _trial = (uses or {}, seen)
    try:
        yield seen
    finally:
        _trial = None


@cache
def rules(name: str) -> Rules:
    """The shipped table of one GPU generation: kernel → its rules, from all files of the table's folder."""
    return {kernel: found for table in subjects(name).values() for kernel, found in table.items()}


@cache
def subjects(name: str) -> dict[str, Rules]:
    """The shipped table of one GPU generation file by file: the name of each without .json → what it holds."""
    folder = files("hinny.ops.kernels").joinpath("launch", name)
    found: dict[str, Rules] = {file.name.removesuffix(".json"): json.loads(file.read_text())
                               for file in sorted(folder.iterdir(), key=lambda file: file.name)}
    kernels = [kernel for table in found.values() for kernel in table]
    assert len(kernels) == len(set(kernels)), f"a kernel is in two files of {folder}"
    return found


@cache
def in_use(name: str) -> Rules:
    """Kernel → the rules it is launched by on a generation: measured on this machine, else shipped, else the default.

    Raises BackendError for a measured file that is damaged or of another version of the kernels.
    """
    if name == FALLBACK:
        return rules(FALLBACK)
    shipped = rules(FALLBACK) | (rules(name) if name in tables() else {})
    measured: Rules = {}
    for file in sorted((measured_folder() / name).glob("*.json")):
        measured |= _read(file, shipped)
    if measured:
        logging.getLogger(__name__).info("launch tables: %s measured on this machine, from %s",
                                         ", ".join(sorted(measured)), measured_folder() / name)
    return shipped | measured


def _read(file: Path, shipped: Rules) -> Rules:
    """A file that `hinny tune` wrote, if its kernels take what this version's kernels take."""
    again = "Delete it, or run `hinny tune` again."
    try:
        found: Rules = json.loads(file.read_text())
        for kernel, table in found.items():
            constants = set(shipped[kernel][0]["use"])
            sizes = {key for rule in shipped[kernel] for key in rule["when"]}
            if any(set(rule["use"]) != constants or not set(rule["when"]) <= sizes for rule in table):
                raise BackendError(f"{file} was measured for another version of the kernel {kernel}. {again}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
        raise BackendError(f"{file} is no launch table of this version: {type(fault).__name__} {fault}. {again}") \
            from None
    return found


def measured_folder() -> Path:
    """Where `hinny tune` puts what it measured, and `launch` looks for it: hinny/launch in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hinny" / "launch"


@cache
def generation(device: torch.device) -> str:
    """The table for a device: sm90 for a Hopper GPU; "default", said once, for a GPU that nobody measured."""
    if device.type != "cuda":
        return FALLBACK
    name = architecture(device)
    if name in tables() or (measured_folder() / name).is_dir():
        return name
    logging.getLogger(__name__).info("no launch table was measured for %s: kernels use careful defaults; "
                                     "`hinny tune` measures one", name)
    return FALLBACK


def architecture(device: torch.device) -> str:
    """The name of a GPU's generation: sm90, gfx942 and the like."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache
def tables() -> tuple[str, ...]:
    """The names of the shipped tables."""
    folder = files("hinny.ops.kernels").joinpath("launch")
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def forget() -> None:
    """Tables are read again, and rules looked up again, at the next launch."""
    _known.clear()
    for remembered in (rules, subjects, in_use, generation, tables):
        remembered.cache_clear()
