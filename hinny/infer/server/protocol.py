"""One connection of HTTP/1.1: a client that says nothing, or takes nothing, does not keep it for ever."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hinny.infer.server.metrics import Metrics
from hinny.infer.server.refusals import Refusal

MOST_HEAD = 2**16
"""Bytes of a request's head."""
HEAD_SECONDS = 20.0
"""For the head of a request to arrive, from the connection or the end of the last answer's body on."""


class Connection(H11Protocol):
    """uvicorn's, which waits for heads and for readers without end, and refuses in plain text."""

    def __init__(self, *, metrics: Metrics, head: float, stalled: float, **uvicorns: Any) -> None:
        """head: seconds for a request's head; stalled: seconds in which a client must take what was written."""
        super().__init__(**uvicorns)
        self._metrics, self._head, self._stalled = metrics, head, stalled
        self._until_head: asyncio.TimerHandle | None = None
        self._until_read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is there; a head must follow."""
        super().connection_made(transport)
        self._until_head = self.loop.call_later(self._head, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_head()
        self._stop_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A piece of a head or of a body. A piece of a head does not begin its time anew."""
        super().data_received(data)
        if not self._waits:
            self._stop_head()
        elif self._until_head is None and not self.transport.is_closing():
            self._until_head = self.loop.call_later(self._head, self._give_up)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._stop_read()
        self._until_read = self.loop.call_later(self._stalled, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._stop_read()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an answer in the form of all others."""
        self._refuse(Refusal(400, "this is no HTTP/1.1 request that can be read, or its head is longer than "
                             f"{MOST_HEAD} bytes.", code="invalid_http"))

    @property
    def _waits(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        self._until_head = None
        if not self._waits or self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(Refusal(408, f"the head of the request did not arrive within {self._head:g} seconds.",
                                 code="timeout"))
        else:
            self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # an answer has begun: another one would be taken for its rest
            self.transport.abort()
            return
        self._metrics.requests.labels("other", str(refusal.status)).inc()
        answer = refusal.response()
        answer.headers["Connection"] = "close"
        for event in (h11.Response(status_code=refusal.status, headers=answer.raw_headers,
                                   reason=HTTPStatus(refusal.status).phrase),
                      h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _should_upgrade(self) -> bool:
        # there are no websockets here; who asks for one gets an answer in HTTP
        return False

    def _stop_head(self) -> None:
        if self._until_head is not None:
            self._until_head.cancel()
            self._until_head = None

    def _stop_read(self) -> None:
        if self._until_read is not None:
            self._until_read.cancel()
            self._until_read = None
