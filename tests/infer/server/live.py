"""A server in a thread, on a port of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hinny.infer.server.chat import Chat
from hinny.infer.server.options import Options
from hinny.infer.server.service import Opened, Service
from hinny.infer.server.serving import Server, listen


class Live:
    """A running server."""

    def __init__(self, engine: Opened, options: Options) -> None:
        self.engine = engine
        self.service = Service(engine, Chat(engine.tokenizer), options)
        self.server = Server(self.service)
        self.listening = threading.Event()

        async def startup(sockets: Any = None) -> None:
            await Server.startup(self.server, sockets)
            self.listening.set()

        self.server.startup = startup  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with listen("127.0.0.1", 0) as listener:
            self.server.run([listener])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @contextmanager
    def running(self) -> Iterator[Live]:
        self.thread.start()
        assert self.listening.wait(20)
        try:
            yield self
        finally:
            self.server.should_exit = True
            self.thread.join(20)
            assert not self.thread.is_alive()
