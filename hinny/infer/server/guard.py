"""What stands in front of all endpoints: API keys, shutting down, headers, counting."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hinny.infer.server.refusals import Refusal
from hinny.infer.server.service import Service

OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key: the page, which asks for it, whether the server is up, and how to speak to it."""


class Guard:
    """An ASGI application around another; it refuses without reading a body."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        """paths: that the metrics name; every other one is "other", so that a client cannot make metrics grow."""
        self.app, self.service, self.paths = app, service, paths
        self._keys = [key.encode() for key in service.options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        endpoint = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
                self.service.metrics.requests.labels(endpoint, str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(scope)
            if scope["method"] == "POST":
                with self.service.working():
                    await self.app(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Refusal as refusal:
            await refusal.response()(scope, receive, counted)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode()
        # all of them, each in constant time: how long it takes tells nothing
        found = [hmac.compare_digest(given, own) for own in self._keys]
        if scheme.lower() != "bearer" or not any(found):
            raise Refusal(401, "an API key is needed: send the header Authorization: Bearer KEY.",
                          code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
