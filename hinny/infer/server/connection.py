"""What comes from a client's connection: a body, and the news that it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from hinny.infer.server.refusals import Refusal

Result = TypeVar("Result")


class ClientLeft(Exception):
    """Nobody is there to be answered."""


async def read_body(http: Request, most: int, seconds: float) -> bytes:
    """The JSON of a request. Refusal 415 for another type, 413 above `most` bytes, 408 after `seconds`.

    ClientLeft if it ends before its end.
    """
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be JSON, with Content-Type: application/json.", code="unsupported_media_type")
    if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "the body must be sent as it is, without Content-Encoding.", code="unsupported_media_type")
    too_long = Refusal(413, f"the body is longer than {most} bytes, the most that this server reads.", code="too_large")
    told = http.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in http.stream():
                body += piece
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {seconds:g} seconds.", code="timeout") from None
    except ClientDisconnect:
        raise ClientLeft from None
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """What `work` gives. It is cancelled when the client leaves (ClientLeft) or after `seconds` (Refusal 504)."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if leaving.done():
            raise ClientLeft
        raise Refusal(504, "the answer took too long and was given up.", code="timeout")
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
