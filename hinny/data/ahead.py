"""Batches made before they are asked for, in a thread beside the training loop.

A batch is a function of its step, so what `Ahead` hands out is what the function returns when it is called directly.
The thread waits for the disk where a memory map has a page to fetch, and both there and in numpy's copies the loop
goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Made(Generic[T]):
    """What `make` gave for one step: a value, or what it raised."""

    values: list[T]
    fault: BaseException | None


class Ahead(Generic[T]):
    """`get(step)` gives `make(step)` for the steps [first, last); up to `depth` of them are ready beforehand.

    The steps are expected one after the other, from `first`; any other step is served as well, from there on. `make`
    is called by one thread alone. What it raises is raised by `get`, at that step and as it was; until another step,
    or this one again, is asked for, nothing more is made. Use as a context manager, or call `close`.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int, depth: int = 4) -> None:
        assert depth >= 1, f"depth {depth}: at least one batch is ready"
        self._make = make
        self._last = last
        self._depth = depth
        self._changed = threading.Condition()
        self._ready: deque[_Made[T]] = deque()
        self._wanted: int | None = first
        """The step that `get` is expected to ask for; None after a fault."""
        self._next = first
        """The step that the thread makes next; `last` when it is to make none."""
        self._walk = 0
        """Counts the starts, so that what was begun for another walk is thrown away."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hinny-ahead", daemon=True)
        self._thread.start()

    def get(self, step: int) -> T:
        """make(step); waits until it is there."""
        assert step < self._last, f"step {step} is not below {self._last}"
        with self._changed:
            assert not self._closed, f"step {step} is asked for after close"
            if step != self._wanted:
                self._ready.clear()
                self._walk += 1
                self._next = step
            self._wanted = step + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            made = self._ready.popleft()
            self._changed.notify_all()
            if made.fault is not None:
                self._wanted = None
                raise made.fault
            return made.values[0]

    def close(self) -> None:
        """End the thread, after the batch that it is making; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (len(self._ready) < self._depth and self._next < self._last))
                if self._closed:
                    return
                step, walk = self._next, self._walk
                self._next += 1
            made = self._try(step)
            with self._changed:
                if walk == self._walk:
                    self._ready.append(made)
                    if made.fault is not None:
                        self._next = self._last
                    self._changed.notify_all()

    def _try(self, step: int) -> _Made[T]:
        try:
            return _Made([self._make(step)], None)
        # it is raised where the step is asked for
        except BaseException as fault:
            return _Made([], fault)
