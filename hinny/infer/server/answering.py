"""An answer on its way from the core to a client: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hinny.infer.request import Delivery, Request
from hinny.infer.server.answers import Continuation, Form, Usage, event
from hinny.infer.server.connection import ClientLeft, while_connected
from hinny.infer.server.loop import Feed, Loop
from hinny.infer.server.metrics import Metrics
from hinny.infer.server.refusals import Refusal

log = logging.getLogger(__name__)


class Answer:
    """The choices of one answer, from the core's deliveries. It counts itself in the metrics."""

    def __init__(self, loop: Loop, metrics: Metrics, form: Form, requests: Sequence[Request],
                 parts: Sequence[Sequence[Continuation]], arrived: float, seconds: float) -> None:
        """parts: of each request its continuations. It may take `seconds` from `arrived` (time.monotonic) on."""
        self.loop, self.metrics, self.form, self.requests, self.parts = loop, metrics, form, requests, parts
        self.usage = Usage(sum(len(request.prompt) for request in requests))
        self._arrived, self._seconds = arrived, seconds
        self._feed: Feed | None = None
        self._left = sum(request.n for request in requests)
        self._times: dict[int, float] = {}

    @property
    def seconds_left(self) -> float:
        """Until this answer takes too long."""
        return max(0.0, self._arrived + self._seconds - time.monotonic())

    @property
    def choices(self) -> list[Continuation]:
        """In the order of their indices."""
        return [part for parts in self.parts for part in parts]

    async def begin(self) -> None:
        """Put it in the queue. Refusal if it is not taken on."""
        try:
            self._feed = await self.loop.submit(self.requests)
        except Refusal as refusal:
            if refusal.status == 429:
                self.metrics.refused.inc()
            raise

    async def next(self) -> tuple[Continuation, Delivery] | None:
        """A choice and its next piece; None behind the last one."""
        if not self._left:
            return None
        assert self._feed is not None
        place, piece = await self._feed.next()
        part = self.parts[place][piece.index]
        self.usage.count(place, piece)
        self._observe(part.index, len(piece.choices))
        part.take(piece)
        self._left -= piece.ended is not None
        return part, piece

    async def whole(self) -> Response:
        """The answer in one body."""
        await self.begin()
        while await self.next() is not None:
            pass
        return JSONResponse(self.form.whole(self.choices, self.usage))

    def end(self) -> None:
        """All is done, or nobody waits any more: then the core gives it up. Twice is once."""
        feed, self._feed = self._feed, None
        if feed is not None:
            self.loop.cancel(feed)
            self.metrics.count(self.usage)
            if not self._left:
                self.metrics.whole.observe(time.monotonic() - self._arrived)

    def _observe(self, index: int, tokens: int) -> None:
        now = time.monotonic()
        if tokens and not self._times:
            self.metrics.first.observe(now - self._arrived)
        if index in self._times:
            for _ in range(tokens):
                self.metrics.each.observe((now - self._times[index]) / tokens)
        if tokens:
            self._times[index] = now


class Stream(Response):
    """An answer as server-sent events, which stops being written when the client leaves."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store",
                                                                  "X-Accel-Buffering": "no"})
        # it is not known before the end
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.answer
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._write(send), answer.seconds_left)
        except ClientLeft:
            answer.metrics.cancelled.inc()
        except Refusal as refusal:
            # before the last words, which a client may never read
            answer.end()
            await self._fail(refusal, send)
        # ours, such as a tokenizer's that cannot name a token: the stream has begun, and its client must hear of it
        except Exception as fault:
            answer.end()
            log.exception("a stream failed")
            answer.metrics.exceptions.inc()
            await self._fail(Refusal(500, f"the server failed ({type(fault).__name__})."), send)
        finally:
            answer.end()

    async def _fail(self, refusal: Refusal, send: Send) -> None:
        """The last event of a stream that began."""
        self.answer.metrics.faults.labels(str(refusal.status)).inc()
        await send({"type": "http.response.body", "body": event(refusal.body()), "more_body": False})

    async def _write(self, send: Send) -> None:
        form = self.answer.form
        for part in self.answer.choices:
            if opening := form.opening(part):
                await send({"type": "http.response.body", "body": opening, "more_body": True})
        while (found := await self.answer.next()) is not None:
            part, piece = found
            if piece.text or piece.ended or form.with_logprobs:
                await send({"type": "http.response.body", "body": form.next(part, piece), "more_body": True})
            # neither waits where there is a backlog: others, and the news that the client left, have their turn
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": form.closing(self.answer.usage), "more_body": False})
