"""Which implementation of an op runs: chosen by name for a block of code, never by surprise.

    torch       fast chunked forms in plain torch
    reference   the definitions: recurrences and explicit sums, slow, for checking
    triton      kernels; this build has none, so asking for it raises
    auto        the fastest of what this build has: torch
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from hinny.errors import BackendError

BACKENDS = ("auto", "torch", "reference")
_asked: ContextVar[str] = ContextVar("hinny_ops_backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ops called inside the block run on backend `name`. Raises BackendError if this build cannot.

    The choice holds for the current thread or task alone. An op's backward runs on the backend of its forward.
    """
    if name == "triton":
        raise BackendError("ops backend 'triton': this build has no kernels yet. "
                           f"Use one of {', '.join(BACKENDS)}; auto takes the fastest there is.")
    if name not in BACKENDS:
        raise BackendError(f"ops backend {name!r} is not known. Use one of {', '.join(BACKENDS)}.")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def chosen() -> str:
    """The backend that ops called here run on, "torch" or "reference"; says once, in the log, what auto chose."""
    name = _asked.get()
    if name != "auto":
        return name
    _say_choice()
    return "torch"


@cache
def _say_choice() -> None:
    logging.getLogger(__name__).info("ops backend: auto chose torch (this build has no kernels)")
