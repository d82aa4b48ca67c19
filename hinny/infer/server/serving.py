"""A server from start to end: opened, announced, drained."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn

from hinny.errors import ConfigError
from hinny.infer.server import chat
from hinny.infer.server.application import application
from hinny.infer.server.guard import is_loopback
from hinny.infer.server.options import Options
from hinny.infer.server.protocol import HEAD_SECONDS, MOST_HEAD, Connection
from hinny.infer.server.service import Opened, Service

log = logging.getLogger(__name__)
LAST_BYTES = 5
"""Seconds for slow clients to take the end of their answers, once all are written."""


class Server(uvicorn.Server):
    """uvicorn's server, which at the first SIGTERM or SIGINT drains the service and at the second one ends."""

    def __init__(self, service: Service) -> None:
        connection = partial(Connection, metrics=service.metrics, head=HEAD_SECONDS, stalled=service.options.timeout)
        super().__init__(uvicorn.Config(application(service), http=cast(type[Connection], connection), ws="none",
                                        h11_max_incomplete_event_size=MOST_HEAD, log_config=None, access_log=False,
                                        server_header=False, lifespan="on", timeout_graceful_shutdown=LAST_BYTES))
        self.service = service
        self._events: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        self._events = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            options = self.service.options
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("%s at http://%s:%d", options.name, f"[{host}]" if ":" in host else host, port)
            if not options.keys and not is_loopback(host):
                log.info("anyone who reaches this machine may use it; an API key closes it.")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In a signal handler: ask the event loop to drain. Its own list of signals stays empty: the exit code is 0."""
        if self._events is None:
            self.should_exit = self.force_exit = True
        else:
            self._events.call_soon_threadsafe(self._drain if self._draining is None else self._abort)

    def _drain(self) -> None:
        if self._draining is None:
            log.info("shutting down: requests have %g seconds", self.service.options.drain)
            self._draining = asyncio.get_running_loop().create_task(self._drain_and_end())

    def _abort(self) -> None:
        # requests then end as if their clients had left, in order and without a trace of each
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.should_exit = True

    async def _drain_and_end(self) -> None:
        await self.service.drain()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, port 0 for a free one. ConfigError where it cannot be had.

    It is made before a model is loaded, which may take minutes.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as fault:
        found.close()
        raise ConfigError(f"host {host}, port {port} cannot be listened at: {fault.strerror}. Choose others by --host "
                          "and --port.") from None
    return found


def serve(engine: Opened, run: Path, options: Options, listener: socket.socket) -> None:
    """Serve an engine until SIGTERM or Ctrl-C. ConfigError for a chat template that cannot be used."""
    form = chat.load(engine.tokenizer, run, options.chat_template)
    Server(Service(engine, form, options)).run([listener])
