"""How a server behaves, apart from the engine's own limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hinny.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """ConfigError for a value that cannot be."""

    name: str
    """What the model is called in requests and answers."""
    keys: tuple[str, ...] = ()
    """Any of these opens the server; without one it is open."""
    chat_template: Path | None = None
    timeout: float = 600.0
    """Seconds for one request, its time in the queue included."""
    drain: float = 30.0
    """Seconds for running requests after SIGTERM."""
    max_queue: int = 256
    """Continuations that may wait beside those at work."""
    max_body: int = 8 * 2**20
    """Bytes of a request."""

    def __post_init__(self) -> None:
        for name in ("timeout", "max_body"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("drain", "max_queue"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if any(not key or not key.isascii() or not key.isprintable() or key != key.strip() for key in self.keys):
            raise ConfigError("an API key is empty or has spaces around it or characters that a header cannot carry; "
                              "use printable ASCII.")
