"""What the engine's thread keeps while it waits for work."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

from fake_core import FakeCore

from hinny.infer.request import Request
from hinny.infer.server.loop import Feed, Loop

PATIENCE = 5.0
"""Seconds for a thread to do what takes it no time."""


def test_a_request_that_is_given_up_as_it_ends_is_kept_by_nobody() -> None:
    """Its order to drop it comes when the core is idle again, so that the thread waits right behind it."""
    async def given_up() -> None:
        core = FakeCore(steps=threading.Semaphore(0))
        loop = Loop(core, most=4)
        loop.start()
        feed = await loop.submit([Request((65,), max_tokens=1)])
        assert core.steps is not None
        core.steps.release()
        until = time.monotonic() + PATIENCE
        while core.live and time.monotonic() < until:
            time.sleep(0.001)  # not asyncio's: the event loop is not to hear of the end yet
        loop.cancel(feed)
        assert feed.gone
        _, piece = await feed.next()
        assert piece.ended == "length"
        kept: weakref.ref[Feed] = weakref.ref(feed)
        del feed
        while kept() is not None and time.monotonic() < until:
            await asyncio.sleep(0.005)
            gc.collect()
        assert not core.busy
        assert kept() is None, "the idle thread keeps what it was last told to drop"
        await loop.close()

    asyncio.run(given_up())
