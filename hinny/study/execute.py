"""Runs the stages of a plan as processes: some chains at a time, each job's output in its own log file."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO, Protocol

from hinny.errors import RunError
from hinny.run import Run
from hinny.study.devices import Devices, job_environment
from hinny.study.plan import Job, Stage
from hinny.study.share import LEASE, LOOK, Claims, FailedElsewhere

POLL = 0.1
"""Seconds between two looks at the running processes."""
PATIENCE = 120.0
"""Seconds that a process gets to save after a SIGINT before it is killed."""
LOG_LINES = 15


class Watcher(Protocol):
    """Who is told about the course of jobs; hinny.study.progress shows them."""

    def started(self, job: Job) -> None: ...
    def finished(self, job: Job, seconds: float) -> None: ...
    def reused(self, job: Job, elsewhere: bool = False) -> None: ...
    def waits(self, why: str) -> None: ...
    def tick(self) -> None: ...


@dataclass
class _Chain:
    """Jobs one after the other: the first one is the next to start, or the one that runs."""

    jobs: list[Job]
    foreign: bool = False
    """Whether another process was seen at it."""
    gpu: str | None = None
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.jobs[0].name


class Stages:
    """Runs stages for `watcher`, beside other processes on the same folder, each of which takes what nobody has.

    A stage is over when all of its chains are done, by whichever process.
    """

    def __init__(self, watcher: Watcher, claims: Claims, devices: Devices) -> None:
        self.watcher, self.claims, self.devices = watcher, claims, devices
        self._running: list[_Chain] = []
        self._old: set[str] = set()

    def run(self, plan: list[Stage]) -> None:
        """Run the stages of `plan`, one after the other; see `run_stage` for what is raised."""
        self._old = {job.name for stage in plan for chain in stage.chains for job in chain if _is_done(job)}
        for stage in plan:
            self.run_stage(stage)

    def run_stage(self, stage: Stage) -> None:
        """Run every job of `stage` that is not done yet, or that is to run at every start.

        Raises RunError where a log cannot be written, and with the end of its log if a job fails, here or in another
        process, after the running ones were told to save (SIGINT) and have ended; passes KeyboardInterrupt on in the
        same way, for SIGTERM too.
        """
        waiting = [_Chain(list(jobs)) for jobs in stage.chains]
        look = 0.0
        with sigterm_as_interrupt():
            try:
                while waiting or self._running:
                    if time.monotonic() >= look:
                        self.claims.check()
                        waiting = self._start(waiting, stage.jobs)
                        look = time.monotonic() + LOOK
                    for chain in list(self._running):
                        if self.claims.lost(chain.name):
                            waiting.append(self._give_up(chain))
                        elif chain.process and chain.process.poll() is not None:
                            look = 0.0
                            self._go_on(chain)
                    self.watcher.tick()
                    if self._running or waiting:
                        time.sleep(POLL)
            except RunError as fault:
                if not isinstance(fault, FailedElsewhere):
                    self.claims.fail(str(fault))
                raise
            finally:
                self._stop()

    def _start(self, waiting: list[_Chain], most: int) -> list[_Chain]:
        """Claim and start chains until `most` run; returns those that are left."""
        left, why = [], []
        for chain in waiting:
            if len(self._running) >= most:
                left.append(chain)
            elif not self.claims.take(chain.name):
                chain.foreign = True
                left.append(chain)
                why.append(f"{chain.name} is another process's")
            elif holder := next((pid for job in chain.jobs if job.run and (pid := Run(job.run).holder)), None):
                self.claims.release(chain.name)
                left.append(chain)
                why.append(f"{chain.name} goes on in process {holder}, whose study has ended")
            else:
                self._running.append(chain)
                self._next(chain)
        if why and not self._running:
            self.watcher.waits(why[0] + (f", and {len(why) - 1} more" if why[1:] else ""))
        return left

    def _next(self, chain: _Chain) -> None:
        """Start the chain's first job that is not done, or that is to run; without one the chain has ended."""
        while chain.jobs:
            job = chain.jobs[0]
            if not job.done() or (job.always and self.claims.due(job.name)):
                self._launch(chain, job)
                return
            self.watcher.reused(job, chain.foreign or job.name not in self._old)
            chain.jobs.pop(0)
        self._leave(chain)

    def _launch(self, chain: _Chain, job: Job) -> None:
        if chain.gpu is None:
            chain.gpu = self.devices.take()
        with _open_log(job) as log:
            # a session of its own: a Ctrl-C at the terminal reaches the study alone, which passes it on once
            chain.process = subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True, env=job_environment(chain.gpu))
        chain.since = time.monotonic()
        self.watcher.started(job)

    def _go_on(self, chain: _Chain) -> None:
        """The chain's running job has ended: check it, and start the next one."""
        assert chain.process
        job, code, chain.process = chain.jobs[0], chain.process.returncode, None
        _check(job, code)
        if job.always:
            self.claims.mark(job.name)
        chain.jobs.pop(0)
        self.watcher.finished(job, time.monotonic() - chain.since)
        self._next(chain)

    def _give_up(self, chain: _Chain) -> _Chain:
        """End the job of a chain that another process has taken over, at once; the chain waits again."""
        if chain.process:
            chain.process.kill()
            chain.process.wait()
            chain.process = None
        self.watcher.waits(f"{chain.name}: this process did not answer for {LEASE:.0f} s, and another may have it now")
        self._leave(chain)
        chain.foreign = True
        return chain

    def _leave(self, chain: _Chain) -> None:
        self._running.remove(chain)
        self.devices.give_back(chain.gpu)
        chain.gpu = None
        self.claims.release(chain.name)

    def _stop(self) -> None:
        """Ask every running job to save and end, wait for it, and release its claim; a second Ctrl-C kills them."""
        running = [chain.process for chain in self._running if chain.process and chain.process.poll() is None]
        try:
            _end(running)
        finally:
            for chain in list(self._running):
                self._leave(chain)


def _is_done(job: Job) -> bool:
    """Whether the job is done; one that cannot tell, for a fault that is told when its turn comes, is not."""
    try:
        return job.done()
    except RunError:
        return False


def _open_log(job: Job) -> BinaryIO:
    """The job's log, to be appended to."""
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        return open(job.log, "ab")
    except OSError as fault:
        raise RunError(f"{job.log} cannot be written: {fault.strerror}.") from None


def _check(job: Job, code: int) -> None:
    if code != 0:
        raise RunError(f"{job.name} failed with exit status {code}. The end of its log:\n{log_end(job)}\n"
                       f"The whole log: {job.log}\nThe command: hinny {' '.join(job.argv)}")
    if not job.done():
        raise RunError(f"{job.name} ended without an error but did not write what it should; see {job.log}.")


def log_end(job: Job) -> str:
    """The last lines of the job's log, indented."""
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (it is empty)"


def _end(running: list[subprocess.Popen[bytes]]) -> None:
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
def sigterm_as_interrupt() -> Iterator[None]:
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
