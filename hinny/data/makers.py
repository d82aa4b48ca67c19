"""Batches made by processes beside the training, where making them is work: practice in recall is written and encoded.

A thread would take turns with the loop for Python's lock: a step's launches, each of which gives it up for a moment,
then wait for the lock longer than the GPU computes. A process has a stream of its own, which is the same function of
the step, and ends with the pipe from the one that started it. Text alone is copied by the thread of `Ahead`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from hinny.data.ahead import Ahead
from hinny.data.mix import Batch, Stream
from hinny.errors import DataError

PROCESSES = 2


@contextmanager
def made_ahead(stream: Stream, rows: range, first: int, last: int, *, beside: bool) -> Iterator[Ahead[Batch]]:
    """Inside, `get(step)` gives these rows of the stream's batches of steps [first, last), made before they are asked
    for: by processes if `beside` is wanted and there is practice in the stream, else by a thread.
    """
    if not (beside and stream.practises):
        with Ahead(lambda step: stream.batch(step, rows), first, last) as ahead:
            yield ahead
        return
    makers = Makers(stream, rows, last)
    try:
        with Ahead(makers, first, last) as ahead:
            yield ahead
    finally:
        makers.close()


class Makers:
    """Called with a step: `stream.batch(step, rows)`, from one of several processes, which go on with the next steps.

    What `batch` raises is raised here; DataError where a process has ended.
    """

    def __init__(self, stream: Stream, rows: range, last: int, processes: int = PROCESSES) -> None:
        self._rows, self._last = rows, last
        self._makers = [_Maker(stream.arguments) for _ in range(processes)]

    def __call__(self, step: int) -> Batch:
        for ahead in range(step, min(step + len(self._makers), self._last)):
            maker = self._makers[ahead % len(self._makers)]
            if ahead not in maker.asked:
                maker.ask(ahead, self._rows)
        return self._makers[step % len(self._makers)].answer(step)

    def close(self) -> None:
        """End the processes; may be called twice."""
        for maker in self._makers:
            maker.close()


class _Maker:
    """One process; `asked` are the steps that it makes, in this order."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.asked: deque[int] = deque()
        # its own session: a Ctrl-C is for the training, which ends it
        self._process = subprocess.Popen([sys.executable, "-m", "hinny.data.makers"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, start_new_session=True,
                                         env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        self._send(arguments)

    def ask(self, step: int, rows: range) -> None:
        self._send((step, rows))
        self.asked.append(step)

    def answer(self, step: int) -> Batch:
        """The batch of a step that was asked for; what was asked for before it is thrown away."""
        while True:
            try:
                batch, fault = pickle.load(cast(IO[bytes], self._process.stdout))
            except (EOFError, pickle.UnpicklingError):
                raise self._ended() from None
            if self.asked.popleft() == step:
                break
        if fault is not None:
            raise fault
        return cast(Batch, batch)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # closing sends what is left
            with suppress(BrokenPipeError):
                cast(IO[bytes], pipe).close()

    def _send(self, value: object) -> None:
        pipe = cast(IO[bytes], self._process.stdin)
        try:
            pickle.dump(value, pipe)
            pipe.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> DataError:
        status = self._process.wait()
        return DataError(f"a process that makes batches ended with status {status}; its message, if any, is above. "
                         "Killed, perhaps for want of memory? The same command goes on from the last checkpoint.")


def _make(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer until `source` ends."""
    stream = Stream(**pickle.load(source))
    while True:
        try:
            step, rows = pickle.load(source)
        except EOFError:
            return
        pickle.dump(_tried(lambda: stream.batch(step, rows)), sink)  # noqa: B023  # called at once
        sink.flush()


def _tried(make: Callable[[], Batch]) -> tuple[Batch | None, Exception | None]:
    try:
        return make(), None
    # it is raised where the step is asked for
    except Exception as fault:
        return None, fault


if __name__ == "__main__":
    _make(sys.stdin.buffer, sys.stdout.buffer)
