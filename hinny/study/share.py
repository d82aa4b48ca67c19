"""Several processes at work on one study folder: claims that end with their process, and what each must know of others.

A claim is a lease (filelock.SoftFileLease): a file that only one process can create (O_EXCL, which network disks keep
too), whose time the holder renews. One that died on this machine loses its claim at once; one of which nothing can be
known, since it is on another machine, when its file has not been renewed for LEASE seconds. No clocks are compared.

    STUDY/.claims/NAME.lock       a claim                     NAME.mark   how often the work NAME was done
    STUDY/.claims/failed-*.txt    the message of a failure, which ends the processes that began before it
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from hinny.errors import RunError
from hinny.run import write_atomically

LEASE = 60.0
"""Seconds without a sign of life after which a claim of another machine is taken over; all processes need the same."""
LOOK = 1.0
"""Seconds between two looks at what other processes hold."""


class FailedElsewhere(RunError):
    """A job of another process failed, which has told it already."""


class Claims:
    """The claims of this process on the work in the study folder `root`."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ".claims"
        self._leases: dict[str, SoftFileLease] = {}
        self._marks = {file.name: file.read_text() for file in self.folder.glob("*.mark")}
        self._old_failures = set(self.folder.glob("failed-*.txt"))

    def take(self, name: str) -> bool:
        """Claim the work `name` unless another process has it. RunError where the folder cannot be written."""
        if name not in self._leases:
            # kept while another has the claim: it remembers since when that one has not answered
            self._leases[name] = SoftFileLease(self._file(name, "lock"), lease_duration=LEASE)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._leases[name].acquire(timeout=0)
        except Timeout:
            return False
        except OSError as fault:
            raise RunError(f"{self.folder.parent} cannot be used as a study's folder: {fault.strerror}. "
                           "Choose another with --out.") from None
        return True

    def lost(self, name: str) -> bool:
        """Whether a claim of this process has been taken over, because it did not answer for LEASE seconds."""
        return self._leases[name].compromise is not None

    def release(self, name: str) -> None:
        """Leave the work `name` to others."""
        self._leases.pop(name).release(force=True)

    @contextmanager
    def holding(self, name: str, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Within: the claim on `name` is this process's; `waits` is called between two looks at who has it."""
        while not self.take(name):
            self.check()
            waits()
            time.sleep(LOOK)
        try:
            yield
        finally:
            self.release(name)

    def due(self, name: str) -> bool:
        """Whether nobody has done `name` since this process began. Ask while holding the claim on it."""
        file = self._file(name, "mark")
        return not file.is_file() or file.read_text() == self._marks.get(file.name)

    def mark(self, name: str) -> None:
        """Tell the others that `name` is done."""
        write_atomically(self._file(name, "mark"), uuid.uuid4().hex + "\n")

    def fail(self, message: str) -> None:
        """End the work of all processes that are at it now."""
        write_atomically(self.folder / f"failed-{uuid.uuid4().hex}.txt", message)

    def check(self) -> None:
        """Raises FailedElsewhere if another process failed since this one began."""
        for file in sorted(set(self.folder.glob("failed-*.txt")) - self._old_failures):
            raise FailedElsewhere(f"Another process of this study failed: {file.read_text()}")

    def forget_failures(self) -> None:
        """Remove the messages of failures before this process began: the study has got past them."""
        for file in self._old_failures:
            file.unlink(missing_ok=True)

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / (re.sub(r"[^\w.+=-]", "-", name) + f".{kind}")
