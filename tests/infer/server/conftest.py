"""Servers for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fake_core import FakeCore, FakeEngine
from live import Live

from hinny.infer.server.options import Options
from hinny.infer.server.service import Opened


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    """Starts a server of a fake core, or of an engine; options by name."""
    with ExitStack() as servers:
        def start(core: FakeCore | None = None, engine: Opened | None = None, **options: Any) -> Live:
            live = Live(engine or FakeEngine(core or FakeCore()), Options(**{"name": "fake", **options}))
            return servers.enter_context(live.running())

        yield start
