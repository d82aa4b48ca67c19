"""Evaluations of a run: `evaluate(run, tasks)` writes one results file a task and returns the rows.

A task is a function of an engine and the options; its rows follow the one schema of `hinny.run.row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hinny.errors import ConfigError
from hinny.evals.options import EvalOptions
from hinny.evals.perplexity import held_out
from hinny.evals.recall import copying, mqar, phonebook
from hinny.infer.engine import Engine

Rows = list[dict[str, Any]]

TASKS: dict[str, Callable[[Engine, EvalOptions], Rows]] = {
    "heldout": held_out, "phonebook": phonebook, "mqar": mqar, "copy": copying}
"""Task name → function."""

__all__ = ["TASKS", "EvalOptions", "evaluate"]


def evaluate(run: str | Path, tasks: Iterable[str], options: EvalOptions | None = None) -> Rows:
    """Run `tasks` on the latest checkpoint of `run`; rows go to RUN/results/TASK.json and are returned."""
    names = list(dict.fromkeys(tasks))
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}.")
    if not names:
        raise ConfigError(f"no task named; known: {', '.join(TASKS)}.")
    engine = Engine(run)
    rows: Rows = []
    for name in names:
        found = TASKS[name](engine, options or EvalOptions())
        engine.run.save_rows(name, found)
        rows += found
    return rows
