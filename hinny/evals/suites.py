"""The table of tasks: every task by name, and the suites, which are lists of names.

What defines tasks is imported where the table is asked for, so that the command line's help needs none of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from hinny.errors import ConfigError
from hinny.evals.entry import Entry
from hinny.evals.made import Defaults, DepthTask, MadeTask
from hinny.evals.task import Task


@dataclass(frozen=True)
class Suite:
    """Tasks that are run together."""

    tasks: tuple[str, ...]
    defaults: Defaults | None = None
    """Samples and lengths of its tasks where none are chosen; None: each task's own."""
    lenient: bool = False
    """Whether a task that cannot run is left out, aloud, instead of an error: the suite is to run anywhere."""


SMALL = Defaults(samples=32, lengths=(512, 1024))
MODULES = {"hinny.evals.synthetic": SMALL, "hinny.evals.ruler": Defaults(samples=400, lengths=(4096,)),
           "hinny.evals.phonebook": Defaults(samples=400, lengths=(4096,)), "hinny.evals.scrolls": Defaults(),
           "hinny.evals.longbench": Defaults()}
"""Where TASKS are defined, and what they are run with where nothing is chosen; the paper has 400 samples of RULER."""

STANDARD = ("winogrande", "piqa", "hellaswag", "arc-easy", "arc-challenge", "mmlu", "mmlu-5shot", "openbookqa",
            "truthfulqa-mc2", "pubmedqa", "race", "nq-open", "squad-v2")
RULER = ("ruler-niah-single-1", "ruler-niah-single-2", "ruler-niah-single-3", "ruler-niah-multikey-1",
         "ruler-niah-multikey-2", "ruler-niah-multikey-3", "ruler-niah-multivalue", "ruler-niah-multiquery", "ruler-vt",
         "ruler-cwe", "ruler-fwe", "ruler-qa-squad", "ruler-qa-hotpot")
DATA_FREE = ("ruler-niah-single-1", "ruler-niah-multikey-2", "ruler-niah-multikey-3", "ruler-vt", "ruler-cwe",
             "ruler-fwe")
EXTENSION = ("position-joined", "window-loss", "phonebook-depth", "niah-depth", "phonebook", "copy", "mqar",
             "state-norms")
NATURAL = ("narrativeqa", "qasper", "quality", "multifieldqa-en", "hotpotqa", "2wikimqa", "musique", "trec", "triviaqa")


@cache
def table() -> dict[str, Entry]:
    """Name → task, of all tasks there are."""
    found: dict[str, Entry] = {}
    for entry in _entries():
        assert entry.name not in found, f"two tasks are called {entry.name}"
        found[entry.name] = entry
    return found


def _entries() -> Iterator[Entry]:
    from hinny.evals.standard import TASKS as standard
    from hinny.evals.studied import POSITIONS, STUDY

    yield from STUDY
    yield from standard
    for module, defaults in MODULES.items():
        for task in import_module(module).TASKS:
            yield MadeTask(task, defaults, _uses(task))
    yield from POSITIONS
    needles = import_module("hinny.evals.ruler.niah").Needles("niah-depth")
    yield DepthTask(needles, SMALL, _uses(needles))


def _uses(task: Task) -> tuple[str, ...]:
    """Options that act on a task of RULER alone."""
    from hinny.evals.ruler.base import RulerTask
    from hinny.evals.ruler.niah import Needles

    prose = isinstance(task, Needles) and task.haystack == "prose"
    return (*(("ruler_version",) if isinstance(task, RulerTask) else ()), *(("haystack",) if prose else ()))


@cache
def suites() -> dict[str, Suite]:
    """Name → suite."""
    synthetic = (task.name for task in import_module("hinny.evals.synthetic").TASKS)
    return {"paper-short": Suite(STANDARD),
            "paper-long": Suite((*RULER, *NATURAL, "phonebook-standard", "phonebook-reversed")),
            "synthetic": Suite((*synthetic, *DATA_FREE, "heldout", "position-joined", "position-chains"), SMALL,
                               lenient=True),
            "extension": Suite(EXTENSION, lenient=True)}


@dataclass(frozen=True)
class Chosen:
    """A task that is to be run."""

    entry: Entry
    lenient: bool = False
    """As in `Suite`."""


def choose(names: Iterable[str], suite: str | None = None) -> list[Chosen]:
    """The tasks named, then those of the suite, each once. ConfigError, with what is near, for an unknown name."""
    known = table()
    chosen = {name: Chosen(_find(name, known)) for name in names}
    if suite is not None:
        if suite not in suites():
            raise ConfigError(f"unknown suite {suite!r}; known: {', '.join(suites())}.{near(suite, suites())}")
        for name in suites()[suite].tasks:
            entry = known[name]
            if type(entry) is MadeTask and (defaults := suites()[suite].defaults) is not None:
                entry = MadeTask(entry.task, defaults, entry.extra)
            chosen.setdefault(name, Chosen(entry, suites()[suite].lenient))
    if not chosen:
        raise ConfigError("no task named; `hinny eval --list` shows them, --suite takes many: "
                          f"{', '.join(suites())}.")
    return list(chosen.values())


def _find(name: str, known: dict[str, Entry]) -> Entry:
    if name in known:
        return known[name]
    if name in suites():
        raise ConfigError(f"{name} is a suite: --suite {name}.")
    raise ConfigError(f"unknown task {name!r}.{near(name, known)} `hinny eval --list` shows all {len(known)}.")


def near(name: str, known: Iterable[str]) -> str:
    """" Did you mean …?" where a known name is like it."""
    plain = {_plain(other): other for other in known}
    found = [plain[like] for like in difflib.get_close_matches(_plain(name), plain, n=3)]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _plain(name: str) -> str:
    """lm-eval and RULER spell their names with _."""
    return name.lower().replace("_", "-")


def listing() -> list[dict[str, Any]]:
    """Every task: name, suites, version, shots, metrics, and what it needs that is not made."""
    return [{"name": name, "suites": [suite for suite, content in suites().items() if name in content.tasks],
             "version": entry.version, "shots": entry.shots, "metrics": list(entry.metrics), "data": entry.needs()}
            for name, entry in table().items()]
