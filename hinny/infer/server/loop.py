"""The thread that owns the engine's core: requests go in, deliveries come out, nothing else touches it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from hinny.errors import RequestError
from hinny.infer.request import Delivery, Request
from hinny.infer.server.refusals import Refusal, draining
from hinny.infer.stats import Stats

log = logging.getLogger(__name__)


LAST_STEP = 20
"""Seconds for the step that runs when the server ends."""


class Worker(Protocol):
    """What the loop needs of `hinny.infer.core.Core`; all of it is called in one thread."""

    @property
    def busy(self) -> bool: ...
    def add(self, request: Request) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[Delivery]: ...
    def stats(self) -> Stats: ...


class Feed:
    """The deliveries of some requests that are answered together, in order."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.unfinished = sum(request.n for request in requests)
        self.numbers: list[int] = []
        """The core's, of each request."""
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone = False
        """Nobody waits for it any more."""
        self._arrived: asyncio.Queue[Delivery | Refusal] = asyncio.Queue()

    def put(self, item: Delivery | Refusal) -> None:
        """Let `next` give this."""
        self._arrived.put_nowait(item)

    async def next(self) -> tuple[int, Delivery]:
        """Which of the requests, and its next piece. Refusal if it failed, or the server gave it up."""
        item = await self._arrived.get()
        if isinstance(item, Refusal):
            raise item
        if item.ended == "failed":
            raise Refusal(500, item.message or "the engine failed.", code="engine_failed")
        if item.ended == "cancelled":
            raise draining()
        return self.numbers.index(item.request), item


class Loop:
    """Steps a core in a thread of its own while it is busy. Public methods belong to the event loop of `start`."""

    def __init__(self, core: Worker, most: int) -> None:
        """most: continuations that may be at work or wait; one more request is refused with 429."""
        self.core, self.most = core, most
        self.stats = core.stats()
        """As of the last step."""
        self.failure: str | None = None
        """Why the thread ended; then every request is refused."""
        self.live = 0
        """Continuations that were taken on and have not ended."""
        self.over = False
        """The server ends: what was still being read is not begun any more."""
        self._feeds: set[Feed] = set()
        self._by_number: dict[int, Feed] = {}
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="hinny core", daemon=True)
        self._events: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; deliveries go to the event loop that runs now."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """End the thread behind the step that it is in, if that ends. What is not finished stays unfinished."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join, LAST_STEP)

    async def submit(self, requests: Sequence[Request]) -> Feed:
        """Have the core take on all of them or none. Refusal: 429 if too many wait, 400 if the core has
        objections, 500 if it cannot, 503 after `cancel_all`."""
        if self.failure is not None:
            raise Refusal(500, self.failure, code="engine_failed")
        if self.over:
            raise draining()
        more = sum(request.n for request in requests)
        if more > self.most:
            raise Refusal(400, f"{more} continuations in one request; this server takes {self.most} at most.")
        if self.live + more > self.most:
            raise Refusal(429, f"{self.live} continuations are being written or wait, and {more} more would be above "
                          f"{self.most}; try again.", code="queue_full", headers={"Retry-After": "1"})
        feed = Feed(requests)
        self._feeds.add(feed)
        self.live += more
        self._orders.put(partial(self._add, feed))
        try:
            await feed.accepted
        except asyncio.CancelledError:
            self.cancel(feed)
            raise
        return feed

    def cancel(self, feed: Feed) -> None:
        """Nobody waits for it any more: its memory is free behind the step that runs now. Twice is once."""
        if not feed.gone and feed in self._feeds:
            feed.gone = True
            self._orders.put(partial(self._drop, feed))

    def cancel_all(self) -> None:
        """Those who wait are told that the server ends, and so is who comes later."""
        self.over = True
        for feed in self._feeds:
            self.cancel(feed)

    # in the thread

    def _work(self) -> None:
        try:
            while self._obey():
                delivered = self.core.step()
                self.stats = self.core.stats()
                if delivered:
                    self._tell(partial(self._hand_out, delivered))
        # whatever it is, those who wait must hear of it
        except BaseException as fault:
            log.exception("the engine failed")
            self._tell(partial(self._fail, f"the engine failed ({type(fault).__name__}: {fault}); restart the server."))

    def _obey(self) -> bool:
        """Do what was ordered, and wait for orders until there is work. False: end."""
        while not self.core.busy or not self._orders.empty():
            order = self._orders.get()
            if order is None:
                return False
            order()
            # a request that was given up would else be kept while the next order is waited for
            del order
            self.stats = self.core.stats()
        return True

    def _add(self, feed: Feed) -> None:
        try:
            for request in feed.requests:
                feed.numbers.append(self.core.add(request))
        # whatever it is, the core has not taken this one on, and serves the others
        except BaseException as fault:
            self._drop(feed)
            if isinstance(fault, RequestError):
                refusal = Refusal(400, str(fault))
            else:
                log.exception("a request could not be taken on")
                refusal = Refusal(500, f"the request could not be taken on ({type(fault).__name__}: {fault}).")
            self._tell(partial(self._refuse, feed, refusal))
            return
        self._tell(partial(self._accept, feed))

    def _drop(self, feed: Feed) -> None:
        for number in feed.numbers:
            self.core.cancel(number)

    def _tell(self, what: Callable[[], None]) -> None:
        assert self._events is not None
        try:
            self._events.call_soon_threadsafe(what)
        except RuntimeError:
            if not self._events.is_closed():
                raise
            # a second signal has ended it, and all who waited are gone
            self._orders.put(None)

    # in the event loop

    def _accept(self, feed: Feed) -> None:
        self._by_number |= dict.fromkeys(feed.numbers, feed)
        if not feed.accepted.done():
            feed.accepted.set_result(None)

    def _refuse(self, feed: Feed, refusal: Refusal) -> None:
        if feed.accepted.done():
            feed.put(refusal)
        else:
            feed.accepted.set_exception(refusal)
        self._settle(feed, feed.unfinished)

    def _hand_out(self, delivered: Sequence[Delivery]) -> None:
        for piece in delivered:
            feed = self._by_number.get(piece.request)
            # None: taken on before another request of the same body was refused
            if feed is not None:
                feed.put(piece)
                if piece.ended is not None:
                    self._settle(feed, 1)

    def _settle(self, feed: Feed, ended: int) -> None:
        """So many continuations have ended."""
        feed.unfinished -= ended
        self.live -= ended
        if not feed.unfinished:
            self._feeds.discard(feed)
            for number in feed.numbers:
                self._by_number.pop(number, None)

    def _fail(self, message: str) -> None:
        self.failure = message
        for feed in list(self._feeds):
            self._refuse(feed, Refusal(500, message, code="engine_failed"))
