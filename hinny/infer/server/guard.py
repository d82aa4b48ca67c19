"""What stands in front of all endpoints: API keys, other names for this machine, shutting down, faults, counting."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hinny.infer.server.refusals import Refusal
from hinny.infer.server.service import Service

log = logging.getLogger(__name__)
OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key: the page, which asks for it, whether the server is up, and how to speak to it."""


class Guard:
    """An ASGI application around another; it refuses without reading a body."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        """paths: that the metrics name; every other one is "other", so that a client cannot make metrics grow."""
        self.app, self.service, self.paths = app, service, paths
        self._keys = [_digest(key) for key in service.options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        endpoint = scope["path"] if scope["path"] in self.paths else "other"
        began = False

        async def counted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
                self.service.metrics.requests.labels(endpoint, str(message["status"])).inc()
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            await self._pass_on(scope, receive, counted)
        except Refusal as refusal:
            await refusal.response()(scope, receive, counted)
        # ours, whatever it is: the client hears of it, and it is seen
        except Exception as fault:
            log.exception("%s %s failed", scope["method"], endpoint)
            self.service.metrics.exceptions.inc()
            if began:
                raise
            await Refusal(500, f"the server failed ({type(fault).__name__}).").response()(scope, receive, counted)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            with self.service.working():
                await self.app(scope, receive, send)
        else:
            # the server that writes the answer leaves out the body of one to HEAD
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self.app({**scope, "method": method}, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """Without a key, this machine answers programs of its own to its own names alone.

        Else a page of the web whose name is made to lead to 127.0.0.1 would be let in by a browser (DNS rebinding).
        """
        told = Headers(scope=scope).get("host")
        here = (scope["server"] or ("",))[0]
        if told is None or self._keys or not is_loopback(here):
            return
        name = re.sub(r":\d*$", "", told).strip("[]").lower()
        if name != "localhost" and not name.endswith(".localhost") and not _is_address(name):
            raise Refusal(403, f"the header Host says {told[:100]!r}; without an API key a server on {here} answers to "
                          "localhost and to addresses alone. Use one of them, or start it with a key.",
                          code="host_not_allowed")

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # all of them, each in constant time, digests for equal lengths: how long it takes tells nothing
        found = [hmac.compare_digest(given, own) for own in self._keys]
        if scheme.lower() != "bearer" or not any(found):
            raise Refusal(401, "an API key is needed: send the header Authorization: Bearer KEY.",
                          code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def is_loopback(host: str) -> bool:
    """Whether an address is reached by this machine alone. A name is none."""
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
