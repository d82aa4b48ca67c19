"""The standard tasks of lm-eval (`hinny.evals.harness`) as entries of the table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hinny.evals import harness
from hinny.evals.entry import Entry, LateReader, Length, Outcome, Subject, contents, work_done
from hinny.evals.record import sample_line
from hinny.infer.reading.requests import Progress, Reader
from hinny.run import row

EXTRA = ("lm_eval", "datasets")


class StandardTask(Entry):
    """One task of lm-eval."""

    def __init__(self, task: harness.Standard) -> None:
        self.task, self.name, self.shots, self.metrics = task, task.name, task.shots, (task.headline,)
        shots = () if task.most_shots == 0 else ("shots", "seed")
        self.uses = frozenset({"samples", "data", "truncate", "max_length", "save_samples", "batch_tokens", *shots})

    @property
    def version(self) -> str:  # type: ignore[override]
        """lm-eval's; results name the task's own, too."""
        try:
            return f"lm-eval {importlib.metadata.version('lm_eval')}"
        except importlib.metadata.PackageNotFoundError:
            return "lm-eval (not installed)"

    def missing(self, subject: Subject) -> list[str]:
        absent = [module for module in EXTRA if find_spec(module) is None]
        lines = [f"{self.name}: the package {', '.join(absent)}: pip install 'hinny[eval]'"] if absent else []
        return [*lines, *(f"{self.name}: {line}" for line in harness.missing(subject.options.data, [self.name]))]

    def needs(self) -> list[str]:
        return harness.missing(Path("ROOT"), [self.name])

    def lengths(self, subject: Subject) -> tuple[list[Length], list[str]]:
        return [None], []

    def check(self, subject: Subject, lengths: Sequence[Length]) -> None:
        """Its prompts are made while it runs; one that is too long ends it before any is asked."""

    def key(self, subject: Subject) -> dict[str, Any]:
        from hinny.evals.harness.tasks import HINNY_VERSION

        options, limit = subject.options, subject.limit
        longest = {} if limit.policy == "error" else {"max_length": limit.tokens}
        shots = self.shots if options.shots is None else options.shots
        return {"version": f"{self.version}, hinny {HINNY_VERSION}", "shots": shots, "seed": self._seed(subject),
                "samples": options.samples or "all", "truncate": limit.policy, **longest}

    def _seed(self, subject: Subject) -> int:
        return harness.SEED if subject.options.seed is None else subject.options.seed

    def fingerprint(self, subject: Subject, length: Length) -> str:
        root = subject.options.data
        return "Hub" if root is None else contents(self.task.dataset.folder(root))

    def measure(self, subject: Subject, length: Length, progress: Progress) -> Outcome:
        options, limit, reader = subject.options, subject.limit, LateReader(subject)
        before = subject.usage()
        found = harness.run(cast(Reader, reader), self.name, root=options.data, samples=options.samples,
                            shots=options.shots, seed=self._seed(subject), save=options.save_samples,
                            max_length=limit.tokens, truncate=cast(Any, limit.policy), progress=progress)
        ending = f"shots={found.shots} version={found.version.replace(' ', '-')}"
        first = {found.headline: found.metrics[found.headline]}
        rows = [row(f"{self.name}.{metric}", subject.recipe.name, figure.value, "share", shape=f"n={figure.n} {ending}",
                    low=figure.low, high=figure.high, device=subject.accelerator)
                for metric, figure in {**first, **found.metrics}.items()]
        facts = {"samples": found.documents, "requests": found.requests, "truncated": found.truncated,
                 "documents_sha256": found.fingerprint, "headline": found.headline, "version": found.version,
                 "parts": {part: {metric: {"value": figure.value, "n": figure.n} for metric, figure in figures.items()}
                           for part, figures in found.parts.items()},
                 **work_done(before, subject.usage(), reader.sizes)}
        return Outcome(rows, facts, [sample_line(None, sample) for sample in found.samples or ()])


TASKS = tuple(StandardTask(task) for task in harness.STANDARD.values())
