"""A profiler's trace of some steps, for chrome://tracing or Perfetto: RUN/profile/steps-FROM-TO.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hinny.errors import ConfigError, RunError
from hinny.run import Run

log = logging.getLogger(__name__)


class Trace:
    """Profiles the steps from `first` to `last`, both of them too, counted from 1; none where they are None.

    Use it as a context: a trace that an interrupt or an error cut short is written as well, named after its steps.
    """

    def __init__(self, run: Run, first: int | None, last: int | None) -> None:
        self._folder = run.path / "profile"
        self._first, self._last = first, last
        self._profiler: profile | None = None
        self._done = 0

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A block that is step `number`: a range of that name in the trace."""
        if number == self._first:
            self._folder_is_there()
            kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self._profiler = profile(activities=kinds)
            self._profiler.start()
        if self._profiler is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        self._done = number
        if number == self._last:
            self._close()

    def _folder_is_there(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as fault:
            raise RunError(f"{self._folder} cannot be written: {fault.strerror}.") from None

    def _close(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._done:
            file = self._folder / f"steps-{self._first}-{self._done}.json"
            profiler.export_chrome_trace(str(file))
            log.info("%s: the profile of steps %d to %d.", file, self._first, self._done)


def traced(run: Run, steps: str | None, *, done: int, total: int) -> Trace:
    """The trace of `steps`, FROM:TO, of a run that has made `done` of `total`; ConfigError if it will not make them."""
    if steps is None:
        return Trace(run, None, None)
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not done < first <= last <= total:
        left = f"steps {done + 1} to {total} are still to be made" if done < total else "no step is left to be made"
        raise ConfigError(f"profile is {steps!r}; it must be FROM:TO, steps that this call will make: {left}.")
    return Trace(run, first, last)
