"""A core without a model: it writes the prompt again and again, a token a step, when it is let."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

from hinny.errors import RequestError
from hinny.infer.limits import Limits
from hinny.infer.request import Choice, Delivery, Request
from hinny.infer.stats import Stats
from hinny.tokenizer import ByteTokenizer

NOTHING = Stats(running=0, waiting=0, pages=8, pages_used=0, pages_cached=0, slots=4, slots_used=0, slots_cached=0,
                bytes=1000, bytes_used=0, read=0, written=0, prompts=0, hits=0, prompt_tokens=0, cached=0,
                preemptions=0, drafted=0, accepted=0, failed_copies=0)


@dataclass
class Written:
    request: Request
    number: int
    index: int
    text: str = ""
    tokens: int = 0


@dataclass
class FakeCore:
    """`steps` bounds what it may do: a semaphore that tests release, or None."""

    steps: threading.Semaphore | None = None
    broken: str = ""
    """A step raises this."""
    last: int = 0
    live: list[Written] = field(default_factory=list)
    ended: list[Delivery] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def busy(self) -> bool:
        return bool(self.live or self.ended)

    def add(self, request: Request) -> int:
        self.threads.add(threading.get_ident())
        if len(request.prompt) == 13:
            raise RequestError("thirteen tokens are too many.")
        self.last += 1
        self.seen.append(request)
        self.live += [Written(request, self.last, index) for index in range(request.n)]
        return self.last

    def cancel(self, number: int) -> None:
        self.threads.add(threading.get_ident())
        self.ended += [Delivery(w.number, w.index, "", (), "cancelled") for w in self.live if w.number == number]
        self.live = [w for w in self.live if w.number != number]

    def step(self) -> list[Delivery]:
        self.threads.add(threading.get_ident())
        if self.broken:
            raise RuntimeError(self.broken)
        found, self.ended = self.ended, []
        if found or (self.steps is not None and not self.steps.acquire(timeout=0.01)):
            return found
        return [self._write(written) for written in list(self.live)]

    def _write(self, written: Written) -> Delivery:
        request = written.request
        token = request.prompt[written.tokens % len(request.prompt)]
        written.tokens += 1
        written.text += bytes([token % 256]).decode(errors="replace")
        text = written.text[-1:]
        ended = "length" if written.tokens == request.max_tokens else None
        if any(written.text.endswith(word) for word in request.stop):
            text, ended = "", "stop"
        if ended:
            self.live.remove(written)
        top = tuple((t, -float(t)) for t in range(request.logprobs or 0))
        choice = Choice(token, None if request.logprobs is None else -0.5, top)
        return Delivery(written.number, written.index, text, (choice,), ended, cached=3)

    def stats(self) -> Stats:
        return replace(NOTHING, running=len(self.live), bytes_used=10 * len(self.live))


@dataclass
class FakeEngine:
    """What the server needs of an engine."""

    core: FakeCore = field(default_factory=FakeCore)
    limits: Limits = field(default_factory=lambda: Limits(sequences=4, context=200))
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
