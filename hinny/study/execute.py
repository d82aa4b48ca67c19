"""Runs the stages of a plan as processes: some chains at a time, each job's output in its own log file."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import BinaryIO, Protocol

from hinny.errors import RunError
from hinny.study.plan import Job, Stage

POLL = 0.1
"""Seconds between two looks at the running processes."""
PATIENCE = 120.0
"""Seconds that a process gets to save after a SIGINT before it is killed."""
LOG_LINES = 15


class Watcher(Protocol):
    """Who is told about the course of jobs; hinny.study.progress shows them."""

    def started(self, job: Job) -> None: ...
    def finished(self, job: Job, seconds: float) -> None: ...
    def reused(self, job: Job) -> None: ...
    def tick(self) -> None: ...


@dataclass
class _Slot:
    """A chain in work: the job that runs, its process, and the jobs after it."""

    job: Job
    process: subprocess.Popen[bytes]
    rest: list[Job]
    since: float = field(default_factory=time.monotonic)


def run_stage(stage: Stage, watcher: Watcher, env: dict[str, str] | None = None) -> None:
    """Run every job of `stage` that is not done yet, or that runs at every start.

    Raises RunError where a log cannot be written, and with the end of its log if a job fails, after the others were
    told to save (SIGINT) and have ended; passes KeyboardInterrupt on in the same way, for SIGTERM too.
    """
    waiting = [list(chain) for chain in stage.chains]
    slots: list[_Slot] = []
    with _sigterm_as_interrupt():
        try:
            while waiting or slots:
                while waiting and len(slots) < stage.jobs:
                    _next(waiting.pop(0), slots, watcher, env)
                for slot in [s for s in slots if s.process.poll() is not None]:
                    slots.remove(slot)
                    _check(slot)
                    watcher.finished(slot.job, time.monotonic() - slot.since)
                    _next(slot.rest, slots, watcher, env)
                watcher.tick()
                if slots:
                    time.sleep(POLL)
        finally:
            _stop(slots)


def _next(chain: list[Job], slots: list[_Slot], watcher: Watcher, env: dict[str, str] | None) -> None:
    """Start the chain's first job that is not done or runs always."""
    while chain:
        job = chain.pop(0)
        if job.done() and not job.always:
            watcher.reused(job)
            continue
        with _open_log(job) as log:
            # a session of its own: a Ctrl-C at the terminal reaches the study alone, which passes it on once
            process = subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       start_new_session=True, env=None if env is None else {**os.environ, **env})
        slots.append(_Slot(job, process, chain))
        watcher.started(job)
        return


def _open_log(job: Job) -> BinaryIO:
    """The job's log, to be appended to."""
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        return open(job.log, "ab")
    except OSError as fault:
        raise RunError(f"{job.log} cannot be written: {fault.strerror}.") from None


def _check(slot: _Slot) -> None:
    job, code = slot.job, slot.process.returncode
    if code != 0:
        raise RunError(f"{job.name} failed with exit status {code}. The end of its log:\n{log_end(job)}\n"
                       f"The whole log: {job.log}\nThe command: hinny {' '.join(job.argv)}")
    if not job.done():
        raise RunError(f"{job.name} ended without an error but did not write what it should; see {job.log}.")


def log_end(job: Job) -> str:
    """The last lines of the job's log, indented."""
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (it is empty)"


def _stop(slots: list[_Slot]) -> None:
    """Ask every running process to save and end, and wait for it; a second Ctrl-C kills them."""
    running = [slot.process for slot in slots if slot.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    try:
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within: SIGTERM ends the study as Ctrl-C does, so that no training is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
