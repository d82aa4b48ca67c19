"""What the endpoints do: requests checked and turned into tokens, figures of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from hinny.infer.limits import Limits
from hinny.infer.request import Request
from hinny.infer.server.answering import Answer, Stream
from hinny.infer.server.answers import Continuation, Form, Words
from hinny.infer.server.chat import Chat
from hinny.infer.server.connection import read_body, while_connected
from hinny.infer.server.loop import Loop, Worker
from hinny.infer.server.metrics import Metrics
from hinny.infer.server.options import Options
from hinny.infer.server.refusals import Refusal, draining
from hinny.infer.server.schemas import Asked, ChatRequest, CompletionRequest, Kind, read
from hinny.infer.text import encoded
from hinny.tokenizer import Tokenizer

SHORT = 4096
"""Characters that are made tokens at once; for more a thread does it, so that nobody else waits."""
DEFAULT_TOKENS = 16
"""Of a completion that names no max_tokens, as OpenAI has it."""
MOST_READ = 64
"""Requests that may be read beside those whose continuations are at work or wait: each holds a body."""
LEFT = 499
"""Status, in the metrics alone, of a request whose client left."""
Result = TypeVar("Result")


class Opened(Protocol):
    """What a server needs of `hinny.infer.engine.Engine`."""

    @property
    def core(self) -> Worker: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def limits(self) -> Limits: ...


class Service:
    """One model behind HTTP. All of it belongs to one event loop."""

    def __init__(self, engine: Opened, chat: Chat, options: Options) -> None:
        self.options, self.limits, self.tokenizer, self.chat = options, engine.limits, engine.tokenizer, chat
        self.loop = Loop(engine.core, engine.limits.sequences + options.max_queue)
        self.metrics = Metrics(lambda: self.loop.stats)
        self.started = int(time.time())
        self.draining = False
        self._words = Words(engine.tokenizer)
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a request is answered, which `drain` waits for.

        Refusal once the server is shutting down, or if it holds bodies of too many others.
        """
        if self.draining:
            raise draining()
        if self._active >= (most := self.loop.most + MOST_READ):
            self.metrics.refused.inc()
            raise Refusal(429, f"{most} requests are being read or answered, as many as may be; try again.",
                          code="queue_full", headers={"Retry-After": "1"})
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def drain(self) -> None:
        """Take on nothing more, finish what runs, and give up what is not finished in time."""
        self.draining = True
        try:
            async with asyncio.timeout(self.options.drain):
                await self._idle.wait()
        except TimeoutError:
            self.loop.cancel_all()

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health: 200 where requests are welcome."""
        state = "failed" if self.loop.failure else "draining" if self.draining else "ready"
        now = self.loop.stats
        return 200 if state == "ready" else 503, {
            "status": state, "message": self.loop.failure, "model": self.options.name, "context": self.limits.context,
            "sequences": {"running": now.running, "waiting": now.waiting, "most": self.limits.sequences,
                          "live": self.loop.live, "most_live": self.loop.most},
            "memory": {"bytes": now.bytes, "bytes_used": now.bytes_used, "pages": now.pages,
                       "pages_used": now.pages_used, "slots": now.slots, "slots_used": now.slots_used}}

    def model(self, name: str) -> dict[str, Any]:
        """Body of /v1/models/NAME. Refusal 404 for another name."""
        if name != self.options.name:
            raise Refusal(404, f"the model {name[:200]!r} is not served here; {self.options.name!r} is.", param="model",
                          code="model_not_found")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "hinny",
                "max_model_len": self.limits.context}

    async def completion(self, http: HTTPRequest) -> Response:
        """POST /v1/completions. Refusal, or ClientLeft."""
        arrived = time.monotonic()
        asked = await self._read(http, CompletionRequest)
        prompts = await self._prompts(asked)
        form = Form(self.options.name, chat=False, logprobs=asked.logprobs is not None, usage=_wants_usage(asked))
        tokens = asked.max_tokens or DEFAULT_TOKENS
        requests = [self._request(asked, prompt, tokens, asked.stops, asked.logprobs) for prompt in prompts]
        return await self._answer(http, form, requests, asked, arrived, echo=bool(asked.echo))

    async def chat_completion(self, http: HTTPRequest) -> Response:
        """POST /v1/chat/completions."""
        arrived = time.monotonic()
        asked = await self._read(http, ChatRequest)
        prompt = await _aside(sum(len(m.text) for m in asked.messages), lambda: self.chat.prompt(asked.messages))
        room = max(1, self.limits.context - len(prompt))
        request = self._request(asked, prompt, asked.max_completion_tokens or asked.max_tokens or room,
                                (*self.chat.stop, *asked.stops), (asked.top_logprobs or 0) if asked.logprobs else None)
        form = Form(self.options.name, chat=True, logprobs=bool(asked.logprobs), usage=_wants_usage(asked))
        return await self._answer(http, form, [request], asked, arrived, echo=False)

    async def _read(self, http: HTTPRequest, kind: type[Kind]) -> Kind:
        body = await read_body(http, self.options.max_body, self.options.timeout)
        asked = await _aside(len(body), lambda: read(kind, body))
        if asked.model is not None:
            self.model(asked.model)
        return asked

    async def _prompts(self, asked: CompletionRequest) -> list[list[int]]:
        given: list[Any] = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
        if isinstance(given[0], int):
            given = [given]
        if isinstance(given[0], str):
            return await _aside(sum(map(len, given)), lambda: encoded(self.tokenizer, given))
        words = self.tokenizer.vocab_size
        if (bad := max(map(max, given))) >= words:
            raise Refusal(400, f"prompt: token id {str(bad)[:20]} is outside the vocabulary, 0 to {words - 1}.",
                          param="prompt")
        return given

    def _request(self, asked: Asked, prompt: Sequence[int], tokens: int, stop: tuple[str, ...],
                 logprobs: int | None) -> Request:
        most = self.limits.context
        if len(prompt) + tokens > most:
            raise Refusal(400, f"the context is {most} tokens; the prompt has {len(prompt)} and {tokens} are to be "
                          f"written, {len(prompt) + tokens} in all. Shorten the prompt or lower max_tokens.",
                          param="max_tokens" if len(prompt) < most else "prompt", code="context_length_exceeded")
        return Request(prompt=tuple(prompt), max_tokens=tokens, sampling=asked.sampling, stop=stop, n=asked.n or 1,
                       logprobs=logprobs, ignore_eod=bool(asked.ignore_eos))

    async def _answer(self, http: HTTPRequest, form: Form, requests: Sequence[Request], asked: Asked, arrived: float,
                      echo: bool) -> Response:
        parts = []
        for place, request in enumerate(requests):
            front = self.tokenizer.decode(request.prompt) if echo else ""
            parts.append([Continuation(place * request.n + index, self._words, request.prompt, front)
                          for index in range(request.n)])
        answer = Answer(self.loop, self.metrics, form, requests, parts, arrived, self.options.timeout)
        if asked.stream:
            await answer.begin()
            return Stream(answer)
        try:
            return await while_connected(http.receive, answer.whole(), answer.seconds_left)
        finally:
            answer.end()


async def _aside(size: int, work: Callable[[], Result]) -> Result:
    """work(), in a thread if it is long."""
    return work() if size < SHORT else await asyncio.to_thread(work)


def _wants_usage(asked: Asked) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage
