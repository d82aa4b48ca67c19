"""Rank 0 of a tensor-parallel model decides what is run; the other ranks follow.

    rank 0      TensorRunner, in place of its runner: says to each link what comes next, then does it
    others      follow(make, link): make a runner and do what they are told, until they are told to stop

A link is a socket between two processes of one host: told of a step within 0.1 ms, and of a process that is gone at
once. Of a sequence's pages only those are sent that the link has not heard of. Where all ranks know themselves what to
run, as a bench does, each calls its own runner and none of this is needed.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from hinny.checkpoint.ranks import RankFailure, reason
from hinny.infer.parts import Part, Runner

STOP, FAILED, MAKE, RUN, CLEAR_SLOT, COPY_SLOT, COPY_PAGE = range(7)
GRACE = 20.0
"""Seconds in which a call must come to rank 0 after a rank is gone; if none does, it waits for that rank for ever."""
JOIN = 120.0
"""Seconds in which all ranks must have come to `link`."""
LAST_WORD = 1.0
"""Seconds for what a rank that is gone has said of it to arrive: it says more than that it is gone."""
HEADER = 6
"""Numbers of a part in front of its new pages and its tokens."""

T = TypeVar("T")
Make = Callable[[int, int, int], Runner]
"""Numbers of slots, of pages and of a page's tokens → a runner with such pools."""

logger = logging.getLogger(__name__)


def link(group: dist.ProcessGroup) -> list[Connection]:
    """Join the ranks of `group`, all of one host: rank 0 gets a link to each other one, these get one to rank 0.

    Raises RankFailure if one does not come in JOIN seconds.
    """
    source = dist.get_global_rank(group, 0)
    if dist.get_rank(group) > 0:
        told: list[str] = [""]
        dist.broadcast_object_list(told, source, group=group)
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(JOIN)
        end.connect(told[0])
        end.setblocking(True)
        return [Connection(end.detach())]
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as door:
        # nobody else can reach into the folder, which is this user's alone
        door.bind(str(Path(folder) / "ranks"))
        door.listen(dist.get_world_size(group))
        door.settimeout(JOIN)
        dist.broadcast_object_list([door.getsockname()], source, group=group)
        try:
            return [Connection(door.accept()[0].detach()) for _ in range(dist.get_world_size(group) - 1)]
        except TimeoutError:
            raise RankFailure(f"a rank did not come within {JOIN:.0f} seconds") from None


class TensorRunner:
    """Rank 0's runner and, behind `links`, those of the other ranks, as one.

    What fails on one rank ends all: every call from then on raises RankFailure, which says why; so does the making.
    `failed` is called once when that is known, in whichever thread. `unheard` is called, in another thread, if no call
    has come `grace` seconds after a rank was gone; without it, the process ends then.
    """

    def __init__(self, make: Make, slots: int, pages: int, page: int, links: Sequence[Connection], *,
                 failed: Callable[[], None] | None = None, unheard: Callable[[str], None] | None = None,
                 grace: float = GRACE) -> None:
        assert links, "one rank needs no links"
        self._links = list(links)
        self._failed, self._unheard, self._grace = failed, unheard or _end, grace
        self._sent: dict[int, list[int]] = {}
        self._failure: str | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._gone, self._heard = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        self.runner = self._all([MAKE, slots, pages, page], lambda: make(slots, pages, page))
        self.page, self.words = self.runner.page, self.runner.words

    @property
    def failure(self) -> str | None:
        """Why nothing can be run any more; None while all goes well, and after `close` where it did to the end."""
        return None if self._ended else self._failure

    def run(self, parts: Sequence[Part]) -> Tensor:
        """`Runner.run`, on all ranks."""
        return self._all([RUN, *packed(parts, self._sent)], lambda: self.runner.run(parts))

    def clear_slot(self, slot: int) -> None:
        """`Runner.clear_slot`, on all ranks."""
        self._all([CLEAR_SLOT, slot], lambda: self.runner.clear_slot(slot))

    def copy_slot(self, source: int, target: int) -> None:
        """`Runner.copy_slot`, on all ranks."""
        self._all([COPY_SLOT, source, target], lambda: self.runner.copy_slot(source, target))

    def copy_page(self, source: int, target: int) -> None:
        """`Runner.copy_page`, on all ranks."""
        self._all([COPY_PAGE, source, target], lambda: self.runner.copy_page(source, target))

    def close(self) -> None:
        """Let the other ranks end; nothing can be run afterwards."""
        self._ended = self._ended or self._failure is None
        self._leave([STOP], "the runner is closed")

    def _all(self, numbers: list[int], work: Callable[[], T]) -> T:
        """Tell the others, then do rank 0's part."""
        if self._failure is not None:
            self._leave([FAILED], self._failure)
            raise RankFailure(self._failure)
        try:
            # nobody answers: who cannot do it says so, and all ends
            self._tell(_message(numbers))
            return work()
        except BaseException as fault:
            if not isinstance(fault, Exception):
                # Ctrl-C: the others may wait for what this rank was about to do
                self._leave([FAILED], "rank 0 was interrupted")
                raise
            self._gone.wait(LAST_WORD)
            why = self._failure or f"rank 0: {reason(fault)}"
            self._leave([FAILED], why)
            self._tell_failed()
            raise RankFailure(why) from fault

    def _tell(self, message: bytes) -> None:
        with self._lock:
            for one in self._links:
                # one that is gone is found by _watch, with what it said at last
                with suppress(OSError):
                    one.send_bytes(message)

    def _leave(self, numbers: list[int], why: str) -> None:
        """The last message to the others."""
        self._failure = self._failure or why
        self._heard.set()
        self._tell(_message(numbers) + (self._failure.encode() if numbers == [FAILED] else b""))

    def _tell_failed(self) -> None:
        with self._lock:
            failed, self._failed = self._failed, None
        if failed is not None and not self._ended:
            failed()

    def _watch(self) -> None:
        """Wait for the first of the other ranks that is gone; while all goes well, they say nothing."""
        first = wait(self._links)[0]
        assert isinstance(first, Connection)
        try:
            said = first.recv_bytes().decode()
        except (EOFError, OSError):
            said = f"rank {self._links.index(first) + 1} is gone without a word; look for its message"
        self._failure = self._failure or said
        self._gone.set()
        self._tell_failed()
        if not self._heard.wait(self._grace):
            self._unheard(said)


def follow(make: Make, link: Connection, rank: int) -> None:
    """On a rank above 0, run what rank 0 says on the runner that it says to make, until it says that all is done.

    Raises what the runner raises, after rank 0 was told of it, and RankFailure when rank 0 is gone or has failed.
    """
    pages: dict[int, list[int]] = {}
    runner: Runner | None = None
    try:
        while (told := _told(link))[0] != STOP:
            kind, *values = told
            if kind == MAKE:
                slots, count, page = values
                runner = make(slots, count, page)
            else:
                assert runner is not None, f"message {kind} before there is a runner"
                _do(runner, kind, values, pages)
    except RankFailure:
        raise
    except BaseException as fault:
        with suppress(OSError):
            link.send_bytes(f"rank {rank}: {reason(fault)}".encode())
        raise
    finally:
        link.close()


def dismiss(links: Sequence[Connection]) -> None:
    """Let the other ranks end where no TensorRunner was made."""
    for one in links:
        with suppress(OSError):
            one.send_bytes(_message([STOP]))


def _told(link: Connection) -> list[int]:
    """Kind and numbers of the next thing that rank 0 says."""
    try:
        message = link.recv_bytes()
    except (EOFError, OSError):
        raise RankFailure("rank 0 is gone") from None
    numbers = array("i", message[:4])
    if numbers[0] == FAILED:
        raise RankFailure(message[4:].decode())
    numbers.frombytes(message[4:])
    return numbers.tolist()


def _do(runner: Runner, kind: int, values: list[int], pages: dict[int, list[int]]) -> None:
    if kind == RUN:
        runner.run(list(unpacked(values, pages)))
    elif kind == CLEAR_SLOT:
        runner.clear_slot(*values)
    elif kind == COPY_SLOT:
        runner.copy_slot(*values)
    else:
        assert kind == COPY_PAGE, f"message {kind}"
        runner.copy_page(*values)


def packed(parts: Sequence[Part], sent: dict[int, list[int]]) -> list[int]:
    """Numbers that tell of `parts`. `sent`, of each slot the pages that the other side knows, is brought up to date."""
    numbers: list[int] = []
    for part in parts:
        pages, known = list(part.pages), sent.get(part.slot, [])
        kept = len(known) if pages[:len(known)] == known else 0
        numbers += (part.slot, kept, len(pages) - kept, part.start, len(part.tokens), part.wanted)
        numbers += pages[kept:]
        numbers += part.tokens
        sent[part.slot] = pages
    return numbers


def unpacked(numbers: list[int], known: dict[int, list[int]]) -> Iterator[Part]:
    """The parts that `packed` told of; `known` is brought up to date."""
    at = 0
    while at < len(numbers):
        slot, kept, new, start, count, wanted = numbers[at:at + HEADER]
        at += HEADER
        if kept == 0:
            known[slot] = []
        # the same list as long as it only grows, as on rank 0: a runner may know by it what it has seen already
        pages = known[slot]
        pages += numbers[at:at + new]
        at += new
        yield Part(slot, pages, start, numbers[at:at + count], wanted)
        at += count


def _message(numbers: list[int]) -> bytes:
    return array("i", numbers).tobytes()


def _end(why: str) -> None:
    """End this process, which cannot come back from where it is: on a GPU that waits for another one."""
    logger.critical("%s; this process cannot go on without it and ends", why)
    os._exit(1)
