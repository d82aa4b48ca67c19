"""Shows a running study: a bar for each training and one for the whole; plain lines where there is no terminal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hinny.study.plan import Job

PLAIN_EVERY = 20.0
"""Seconds between two lines about the trainings where there is no terminal."""


class Tail:
    """Follows a run's metrics file by whole lines; starts over where the file was replaced, as a resumed run does."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"
        self.offset, self.inode = 0, 0
        self.last: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """The newest record of a training step, empty before the first."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                if (inode := os.fstat(file.fileno()).st_ino) != self.inode:
                    self.offset, self.inode = 0, inode
                file.seek(self.offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self.offset += len(whole) + len(newline)
            records = [json.loads(line) for line in whole.splitlines() if line.strip()]
            self.last = next((r for r in reversed(records) if "loss" in r), self.last)
        return self.last


class Display:
    """Tells about jobs on `console`; use as a context manager. `total` is the number of jobs.

    `ran` counts what this process ran, `foreign` what another one did meanwhile.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.count = console, total, 0
        self.ran, self.foreign = 0, 0
        self._waited = ""
        self.tails: dict[str, tuple[Job, Tail]] = {}
        self.bars: dict[str, TaskID] = {}
        self.printed = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
        self.overall = self.progress.add_task("study", total=total, note="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, job: Job) -> None:
        if job.run is not None:
            self.tails[job.name] = (job, Tail(job.run))
        self.bars[job.name] = self.progress.add_task(job.name, total=job.steps or None, note="")
        if not self.console.is_terminal:
            self._say(f"{job.name}: started")

    def finished(self, job: Job, seconds: float) -> None:
        self.progress.remove_task(self.bars.pop(job.name))
        last = self.tails.pop(job.name)[1].read() if job.name in self.tails else {}
        loss = f", loss {last['loss']:.3f}" if last else ""
        self.ran += 1
        self._count(f"{job.name}: {seconds:.0f} s{loss}")

    def reused(self, job: Job, elsewhere: bool = False) -> None:
        self.foreign += elsewhere
        self._count(f"{job.name}: {'done by another process' if elsewhere else 'reused'}")

    def waits(self, why: str) -> None:
        """Say `why` nothing is started, once."""
        if why != self._waited:
            self._say(f"waiting: {why}")
        self._waited = why

    def tick(self) -> None:
        for name, (job, tail) in self.tails.items():
            if last := tail.read():
                self.progress.update(self.bars[name], completed=last["step"], note=note(last, job.steps))
        if not self.console.is_terminal and self.tails and time.monotonic() - self.printed > PLAIN_EVERY:
            for name, (job, tail) in self.tails.items():
                if tail.last:
                    self._say(f"{name}: step {tail.last['step']} of {job.steps}, {note(tail.last, job.steps)}")

    def _count(self, text: str) -> None:
        self.count += 1
        self.progress.update(self.overall, completed=self.count, note=f"{self.count} of {self.total} jobs")
        self._say(f"[{self.count:>{len(str(self.total))}}/{self.total}] {text}")

    def _say(self, text: str) -> None:
        self.printed = time.monotonic()
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def note(record: dict[str, Any], steps: int) -> str:
    """Loss, speed and time left of a training, from its newest record."""
    text = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s"
    if record["step"] and record["tokens_per_s"]:
        left = (steps - record["step"]) * record["tokens"] / record["step"] / record["tokens_per_s"]
        text += f"  {int(left) // 60}:{int(left) % 60:02d} left"
    return text
