"""A thousand requests over HTTP, many more at once than there is room for: each is answered as if it were alone."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from small import small_model

from hinny.infer import sequence
from hinny.infer.core import Core, Turn
from hinny.infer.limits import Limits
from hinny.infer.request import Delivery
from hinny.infer.runner import ModelRunner
from hinny.infer.server import answers
from hinny.infer.server.answering import Answer
from hinny.infer.server.loop import Feed
from hinny.model import Model
from hinny.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
REQUESTS, CLIENTS, SLOW = 1000, 32, 6
PROMPTS, LONGEST, MOST = 24, 48, 16
LIMITS = Limits(sequences=16, context=LONGEST + MOST, step_tokens=96, page=4, drafts=2, snapshots=6)
SLOTS, PAGES = 22, 60
QUEUE = 24
"""Fewer than would come at once: some are told to come again."""
SMALL = (socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
"""So that the answer of a client that does not read stays in the server."""
OF_A_REQUEST = (Feed, Answer, answers.Continuation, sequence.Continuation, Delivery, Turn, sequence.Work)
"""Whatever stands for a request, or a part of it, while it is served."""


@dataclass(frozen=True)
class Served:
    """What the server needs of an engine."""

    core: Core
    limits: Limits
    tokenizer: ByteTokenizer


@dataclass(frozen=True)
class Asked:
    """A request, and what its client does with the answer."""

    body: dict[str, Any]
    alone: tuple[str, str]
    """Text and end of each of its choices, were it the only request."""
    lines: int | None = None
    """Of a stream, behind which the client leaves."""
    seconds: float | None = None
    """Behind which a client that waits for a whole answer leaves."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small tensors take ten times as long with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model("M-M*-", seed=1, vocab_size=TOKENIZER.vocab_size).float().eval().requires_grad_(False)


def _prompts(rng: random.Random) -> list[str]:
    """Of all lengths, most of which begin like others."""
    beginnings = ["".join(rng.choices("abcdefgh ", k=rng.randint(15, 40))) for _ in range(5)]
    return [rng.choice(beginnings)[:rng.randint(1, 40)] + "".join(rng.choices("ijklm", k=rng.randint(0, 8)))
            for _ in range(PROMPTS)]


def _greedy(model: Model, prompts: list[str]) -> list[list[int]]:
    """MOST tokens behind each prompt, by whole forward passes over all of the text."""
    texts = [TOKENIZER.encode(prompt) for prompt in prompts]
    for _ in range(MOST):
        longest = max(map(len, texts))
        logits = model(torch.tensor([text + [0] * (longest - len(text)) for text in texts]))
        for text, row in zip(texts, logits, strict=True):
            best = row[len(text) - 1].topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "rounding would decide; take another seed"
            text.append(int(best.indices[0]))
    return [text[-MOST:] for text in texts]


def _alone(tokens: list[int], stop: list[str]) -> tuple[str, str]:
    """Text and end of an answer of these tokens at most."""
    for n, token in enumerate(tokens, 1):
        text = TOKENIZER.decode(tokens[:n - (token == TOKENIZER.eod)])
        if hits := [at for word in stop if (at := text.find(word)) >= 0]:
            return text[:min(hits)], "stop"
        if token == TOKENIZER.eod:
            return text, "stop"
    return text, "length"


def _asked(rng: random.Random, prompt: str, tokens: list[int]) -> Asked:
    """Any of what clients do."""
    most, stop = rng.randint(1, MOST), []
    if rng.random() < 0.3:
        text = TOKENIZER.decode(tokens)
        start = rng.randrange(len(text) - 3)
        stop = [word for word in (text[start:start + rng.randint(1, 3)], "never written") if "\ufffd" not in word]
    body = {"prompt": prompt if rng.random() < 0.8 else TOKENIZER.encode(prompt), "max_tokens": most, "temperature": 0,
            "n": rng.choice([1, 1, 1, 1, 2, 4]), "stop": stop, "stream": rng.random() < 0.6}
    leaves = rng.random() < 0.2
    return Asked(body, _alone(tokens[:most], stop), rng.randint(0, 12) if leaves and body["stream"] else None,
                 rng.random() / 5 if leaves and not body["stream"] else None)


def _slow(prompt: str, tokens: list[int]) -> Asked:
    """A stream far longer than what lies between a server and a client that does not read."""
    return Asked({"prompt": prompt, "max_tokens": MOST, "temperature": 0, "n": 12, "stream": True, "logprobs": 20},
                 _alone(tokens, []))


class Crowd:
    """Clients that take one request after the other."""

    def __init__(self, url: str, todo: list[Asked]) -> None:
        self.todo, self.counts = todo, Counter[str]()
        self.others_done = asyncio.Event()
        transport = httpx.AsyncHTTPTransport(socket_options=[SMALL], limits=httpx.Limits(max_connections=None))
        self.client = httpx.AsyncClient(base_url=url, transport=transport, timeout=60)

    async def run(self, slow: list[Asked]) -> None:
        """All requests; those of `slow` stop reading until the others are done."""
        async with self.client:
            reading = []
            for asked in slow:
                begun = asyncio.Event()
                reading.append(asyncio.create_task(self._served(asked, begun)))
                await asyncio.wait_for(begun.wait(), 60)
            await asyncio.gather(*(self._work() for _ in range(CLIENTS)))
            await self._idle()
            gc.collect()
            # at least: the handler of a client that has just left may still be ending
            assert sum(type(each) is Feed for each in gc.get_objects()) >= len(slow), "what is not read waits"
            self.others_done.set()
            await asyncio.gather(*reading)

    async def _idle(self) -> None:
        """Until the server says that nobody is served, though some have not taken their answers."""
        while (await self.client.get("/health")).json()["sequences"]["live"]:
            pass

    async def _work(self) -> None:
        while self.todo:
            await self._served(self.todo.pop())

    async def _served(self, asked: Asked, begun: asyncio.Event | None = None) -> None:
        while await (self._stream(asked, begun) if asked.body["stream"] else self._whole(asked)) == 429:
            self.counts["told to come again"] += 1
            await asyncio.sleep(0.25)

    async def _whole(self, asked: Asked) -> int:
        asking = asyncio.create_task(self.client.post("/v1/completions", json=asked.body))
        done, _ = await asyncio.wait({asking}, timeout=asked.seconds)
        if not done:
            asking.cancel()
            await asyncio.wait({asking})
            self.counts["left"] += 1
            return 0
        found = asking.result()
        if found.status_code != 429:
            assert found.status_code == 200, found.text
            choices = found.json()["choices"]
            assert [(c["text"], c["finish_reason"]) for c in choices] == [asked.alone] * asked.body["n"]
            self.counts["answered"] += 1
        return found.status_code

    async def _stream(self, asked: Asked, begun: asyncio.Event | None) -> int:
        """begun: set with the first line, behind which the client stops reading."""
        texts, ends = [""] * asked.body["n"], [None] * asked.body["n"]
        async with self.client.stream("POST", "/v1/completions", json=asked.body) as answer:
            if answer.status_code == 429:
                return 429
            assert answer.status_code == 200
            events = 0
            async for line in answer.aiter_lines():
                if events == asked.lines:
                    break
                if begun:
                    begun.set()
                    await self.others_done.wait()
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    assert ends[choice["index"]] is None, "nothing follows an end"
                    texts[choice["index"]] += choice["text"]
                    ends[choice["index"]] = choice["finish_reason"]
                    events += 1
        if events == asked.lines:
            self.counts["left"] += 1
            assert all(asked.alone[0].startswith(text) for text in texts)
        else:
            self.counts["answered"] += 1
            assert list(zip(texts, ends, strict=True)) == [asked.alone] * asked.body["n"]
        return 200


def _alive() -> list[Any]:
    return [each for each in gc.get_objects() if type(each) in OF_A_REQUEST]


def _kept(others: list[Any]) -> list[Any]:
    """What still stands for a request, but for those of other tests, however often what nobody reaches is collected.

    More than once: a collection that begins while another thread's runs does nothing.
    """
    for _ in range(50):
        gc.collect()
        kept = [each for each in _alive() if not any(each is other for other in others)]
        if not kept:
            break
        time.sleep(0.1)
    return kept


def _holders(kept: list[Any]) -> str:
    """What refers to these, and what refers to that, for a message."""
    level, told, seen = list(kept), [], {id(kept)}
    for _ in range(4):
        seen |= {id(each) for each in level} | {id(level)}
        above = [each for each in gc.get_referrers(*level) if id(each) not in seen and not inspect.isframe(each)]
        told.append("; ".join(f"{type(each).__name__}: {str(each)[:300]}" for each in above))
        seen.add(id(above))
        level = above
    return "\n<- ".join([str(kept), *told])


def test_a_thousand_requests_are_answered_as_each_alone_and_leave_nothing(
        serve: Callable[..., Any], model: Model) -> None:
    others = _alive()
    rng = random.Random(6)
    prompts = _prompts(rng)
    known = list(zip(prompts, _greedy(model, prompts), strict=True))
    todo = [_asked(rng, *rng.choice(known)) for _ in range(REQUESTS - SLOW)]
    core = Core(ModelRunner(model, slots=SLOTS, pages=PAGES, page=LIMITS.page), TOKENIZER, LIMITS, slots=SLOTS,
                pages=PAGES, recurrent=True, worth=8)
    live = serve(engine=Served(core, LIMITS, TOKENIZER), max_queue=QUEUE)
    # what a client has not read must not vanish in the system's own buffers
    live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2304)
    crowd = Crowd(live.url, todo)
    asyncio.run(crowd.run([_slow(*rng.choice(known)) for _ in range(SLOW)]))

    counts, health = crowd.counts, httpx.get(live.url + "/health").json()
    assert counts["answered"] + counts["left"] == REQUESTS
    assert min(counts["answered"], 8 * counts["left"], 100 * counts["told to come again"]) > 500, counts
    assert (health["status"], health["sequences"]["live"]) == ("ready", 0)
    assert (health["sequences"]["running"], health["sequences"]["waiting"]) == (0, 0)
    stats = live.service.loop.stats
    assert min(stats.cached, stats.accepted, stats.preemptions) > 0, stats
    live.server.should_exit = True
    live.thread.join(20)
    assert not live.thread.is_alive()
    kept = _kept(others)
    assert not kept, _holders(kept)
    stats = core.stats()
    assert (stats.pages_used, stats.slots_used) == (stats.pages_cached, stats.slots_cached)
    assert stats.slots_cached == len(core.prefixes) <= LIMITS.snapshots
    core.forget()
    assert (core.memory.pages.free, core.memory.slots.free) == (PAGES, SLOTS)
    assert not core.busy
