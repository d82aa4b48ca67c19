"""How kernels are best launched on the GPU at hand: their candidates, measured in the cases of `hinny bench kernels`.

A shipped table's rules stay as they are; each rule that a case meets gets the launch that was fastest over its cases.
One kernel's launch is changed at a time, the others' being what they were. What no case meets is left alone. A case
that this GPU cannot hold, or a kernel that cannot be compiled for it, is left out and said in the log.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hinny.bench.gpu_clock import Call, time_in_turn
from hinny.bench.kernel_cases import Case, all_cases
from hinny.bench.kernel_check import check, work_of
from hinny.bench.kernels import draw_sets, faults
from hinny.errors import BackendError, ConfigError
from hinny.ops import use_backend
from hinny.ops.kernels import launches
from hinny.ops.kernels.launches import Rules, Use
from hinny.run import row, write_atomically
from hinny.verb import make_callable

GAIN = 0.02
"""A candidate takes the place of the present launch only if it is faster by this share, more than samples differ by."""

Place = tuple[str, int]
"""A kernel and the number of its rule."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meter:
    """What measuring needs of a machine.

    works    a case → calls that do it on different inputs
    time     such calls → seconds of one of them
    right    whether a case's results are right
    """

    works: Callable[[Case], list[Call]]
    time: Callable[[list[Call]], float]
    right: Callable[[Case], bool]


def tune(kernels: Sequence[str] = (), *, out: Path | None = None) -> list[dict[str, Any]]:
    """Measures launches of `kernels` (all without any) on this machine's GPU and writes tables; minutes of work.

    out: the folder to write GENERATION/SUBJECT.json in; by default the one that launches read first from then on.
    Returns a row for each rule measured: ms with the fastest launch, beside the present one.
    Raises BackendError without a GPU, ConfigError for a kernel that is not known.
    """
    if not torch.cuda.is_available():
        raise BackendError("tune measures on a GPU that PyTorch sees, and this machine has none.")
    from hinny.ops.kernels.compile import kernel_modules

    known = {kernel: uses for module in kernel_modules() for kernel, uses in module.candidates().items()}
    if unknown := sorted(set(kernels) - set(known)):
        raise ConfigError(f"kernel {unknown[0]!r} is not known, or there is one way to launch it; "
                          f"known: {', '.join(sorted(known))}.")
    device = torch.device("cuda", torch.cuda.current_device())
    table = launches.in_use(launches.generation(device))
    candidates = {kernel: uses for kernel, uses in known.items() if kernel in kernels or not kernels}
    with torch.cuda.stream(torch.cuda.Stream(device)), use_backend("triton"):
        tuned, rows = measure(all_cases(), candidates, table, _gpu_meter(device), torch.cuda.get_device_name(device))
    folder = (launches.measured_folder() if out is None else out) / launches.architecture(device)
    changed = {r["variant"] for r in rows}
    for subject, shipped in _subjects(launches.generation(device)).items():
        if changed & shipped:
            file = folder / f"{subject}.json"
            write_atomically(file, table_text({kernel: rules for kernel, rules in tuned.items() if kernel in shipped}))
            logger.info("wrote %s", file)
    launches.forget()
    return rows


def _subjects(generation: str) -> dict[str, set[str]]:
    """The names of shipped files → the kernels that a GPU of this generation takes from them."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in {launches.FALLBACK, generation} & set(launches.tables()):
        for subject, rules in launches.subjects(name).items():
            found[subject] |= set(rules)
    return found


def _gpu_meter(device: torch.device) -> Meter:
    def works(case: Case) -> list[Call]:
        torch.cuda.empty_cache()
        return [work_of(case, case.ours, inputs) for inputs in draw_sets(case, device)]

    def right(case: Case) -> bool:
        try:
            check(case, None, device)
        except BackendError as fault:
            logger.warning("  %s", fault)
            return False
        return True

    return Meter(works, lambda calls: time_in_turn([calls])[0].median, right)


def measure(
    cases: Iterable[Case], candidates: Mapping[str, Sequence[Use]], table: Rules, meter: Meter, device: str,
) -> tuple[Rules, list[dict[str, Any]]]:
    """The table with the fastest right launches of `candidates` in the rules that cases meet, and a row for each."""
    seconds: dict[Place, list[dict[str, float]]] = defaultdict(list)
    met: dict[Place, list[Case]] = defaultdict(list)
    for case in cases:
        try:
            for place, found in _measured(case, candidates, table, meter):
                seconds[place].append(found)
                met[place].append(case)
        except faults() as fault:
            logger.warning("%s: left out from here on: %s %s", case.name, type(fault).__name__, _first_line(fault))
    tuned, rows = copy.deepcopy(table), []
    for (kernel, number), runs in seconds.items():
        rule = tuned[kernel][number]
        before = _key(rule["use"])
        best = _best(kernel, before, runs, met[kernel, number], meter)
        rule["use"] = json.loads(best)
        value, peer_value = (_mean(run[key] for run in runs) * 1e3 for key in (best, before))
        rows.append(row("tune", kernel, value, "ms", shape=f"rule={number} cases={len(runs)} use={best}",
                        peer=f"launched with {before}", peer_value=peer_value, ratio=peer_value / value, device=device))
    return tuned, rows


def _measured(
    case: Case, candidates: Mapping[str, Sequence[Use]], table: Rules, meter: Meter,
) -> Iterator[tuple[Place, dict[str, float]]]:
    """Each place that the case launches, with the seconds of the present launch, which comes first, and the others."""
    calls = meter.works(case)
    for kernel, number in sorted(place for place in _launched(calls) if place[0] in candidates):
        present = table[kernel][number]["use"]
        found = {_key(present): _seconds(calls, kernel, present, meter)}
        found |= {_key(use): _tried(calls, kernel, use, meter) for use in candidates[kernel] if use != present}
        logger.info("%s: %d launches of %s, rule %d", case.name, len(found), kernel, number)
        yield (kernel, number), found


def _launched(calls: Sequence[Call]) -> set[Place]:
    with launches.trial() as seen:
        calls[0]()
    return seen


def _seconds(calls: list[Call], kernel: str, use: Use, meter: Meter) -> float:
    """Seconds of the case with this launch."""
    with launches.trial({kernel: use}):
        for call in calls:
            call()
        return meter.time(calls)


def _tried(calls: list[Call], kernel: str, use: Use, meter: Meter) -> float:
    """The same; infinite where the GPU or the compiler cannot launch it so."""
    try:
        return _seconds(calls, kernel, use, meter)
    except faults() as fault:
        logger.info("  %s cannot be launched with %s: %s", kernel, _key(use), _first_line(fault))
        return math.inf


def _best(kernel: str, present: str, runs: Sequence[dict[str, float]], cases: Sequence[Case], meter: Meter) -> str:
    """The launch with the smallest mean over the cases that is right in all of them; the present one if none gains."""
    means = {key: _mean(run[key] for run in runs) for key in runs[0]}
    for key in sorted(means, key=means.__getitem__):
        if not means[key] < means[present] * (1 - GAIN):
            return present
        if _usable(kernel, key, cases, meter):
            return key
    return present


def _usable(kernel: str, key: str, cases: Sequence[Case], meter: Meter) -> bool:
    """Whether the launch is right in all cases; not so if one of them cannot be checked."""
    try:
        with launches.trial({kernel: json.loads(key)}):
            return all(meter.right(case) for case in cases)
    except faults() as fault:
        logger.warning("  %s with %s cannot be checked: %s", kernel, key, _first_line(fault))
        return False


def _first_line(fault: Exception) -> str:
    return str(fault).partition("\n")[0]


def _mean(seconds: Iterable[float]) -> float:
    """The geometric mean: a share gained counts the same in a short case and in a long one."""
    values = list(seconds)
    return math.exp(sum(map(math.log, values)) / len(values))


def _key(use: Use) -> str:
    return json.dumps(dict(use), separators=(",", ":"))


def table_text(rules: Rules) -> str:
    """A table as JSON, a rule a line."""
    kernels = [f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(rule)}" for rule in found) + "\n  ]"
               for kernel, found in rules.items()]
    return "{\n" + ",\n".join(kernels) + "\n}\n"


make_callable(__name__, "hinny.tune:tune")
