"""A run, opened for use: text from a prompt, logits from tokens. One sequence of states for all four families."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hinny import tokenizer as tokenizers
from hinny.checkpoint.store import load_model
from hinny.errors import RequestError
from hinny.infer.core import Core
from hinny.infer.limits import Limits
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import prepare
from hinny.infer.request import Choice, Delivery, Request
from hinny.infer.runner import ModelRunner
from hinny.infer.sampling import Sampling
from hinny.memory.serving import pool_sizes
from hinny.model import Model
from hinny.run import Run
from hinny.tokenizer import Tokenizer

AT_ONCE = 32
"""Continuations at work at the same time where no limits are given."""
ROOM = 1024
"""Tokens for which a core is made at least where no limits are given, lest each longer request need another one."""
SHARE = 0.9
"""Of a GPU's free memory, what pools may take; the rest is for a pass's own numbers."""

Precision = Literal["bf16", "stored"]


def load(run: str | Path, device: str = "cpu", dtype: Precision | None = None) -> tuple[Model, Tokenizer]:
    """The model of a run directory at its latest checkpoint, and its tokenizer.

    dtype: None for float32 weights; "bf16" for matrices in bfloat16 (`hinny.infer.precision`); "stored" for the types
    of the checkpoint, bfloat16 for most converted ones.
    """
    opened = Run(Path(run))
    model = load_model(opened, device=device, dtype="stored" if dtype == "stored" else None)
    if dtype == "bf16":
        to_bfloat16(model)
    return model, tokenizers.load(opened.path)


@dataclass(frozen=True)
class Answer:
    """One whole continuation."""

    text: str
    choices: tuple[Choice, ...]
    ended: str
    """As of a Delivery: "stop", "length" or "failed"."""
    message: str
    cached: int
    """Tokens of the prompt that were not read again."""


class Engine:
    """A model and its tokenizer, without gradients."""

    def __init__(self, run: str | Path, device: str = "cpu", dtype: Precision | None = None,
                 limits: Limits | None = None, state_dtype: torch.dtype | None = None) -> None:
        """`run`: a run directory with at least one checkpoint. `dtype`: as in `load`. limits: None for what each
        request or batch of them needs, without a prefix cache. state_dtype: of SSM states, as in `ModelRunner`."""
        self.run = Run(Path(run))
        self.model, self.tokenizer = load(run, device, dtype)
        self.model.eval().requires_grad_(False)
        self.device, self.state_dtype = device, state_dtype
        self.limits = limits or Limits(sequences=1, context=ROOM, snapshots=0)
        self._chosen, self._prepared = limits is not None, False
        self._answers: Answers | None = None

    def within(self, limits: Limits) -> None:
        """From now on serve by these limits; what was begun by others goes on by those."""
        self.limits, self._chosen, self._answers = limits, True, None

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (b t v) of whole sequences (b t); a row may be padded on its right, for no position looks there."""
        return self.model(tokens.to(self.device))

    @property
    def core(self) -> Core:
        """Serves many requests at once, within `limits`; made when it is first asked for."""
        if self._answers is None:
            self._answers = Answers(self._made(self.limits))
        return self._answers.core

    def tokens(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Up to `max_tokens` new tokens after the prompt; ends after the end-of-document token."""
        for delivery in self._deliveries(Request(tuple(prompt), max_tokens, sampling or Sampling())):
            yield from (choice.token for choice in delivery.choices)

    def stream(self, prompt: str, *, max_tokens: int, sampling: Sampling | None = None,
               stop: tuple[str, ...] = ()) -> Iterator[str]:
        """Pieces of text as they become certain; ends before the first string of `stop`, which is never shown."""
        ids = tuple(self.tokenizer.encode(prompt))
        for delivery in self._deliveries(Request(ids, max_tokens, sampling or Sampling(), stop)):
            if delivery.text:
                yield delivery.text

    def generate(self, prompt: str, *, max_tokens: int, sampling: Sampling | None = None,
                 stop: tuple[str, ...] = ()) -> str:
        """The continuation of `prompt`, whole. Arguments as in `stream`."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop))

    def complete(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """All continuations of all requests, which are worked on together: of each request its n, in order."""
        answers = self._fitting(requests)
        numbers = answers.add(requests)
        try:
            return [_whole(request, list(answers.of(number, request.n)))
                    for number, request in zip(numbers, requests, strict=True)]
        finally:
            answers.leave(numbers)

    def _deliveries(self, request: Request) -> Iterator[Delivery]:
        """One request's deliveries; who stops asking for them cancels it. RuntimeError if the model fails."""
        answers = self._fitting([request])
        numbers = answers.add([request])
        try:
            for delivery in answers.of(numbers[0], request.n):
                if delivery.ended == "failed":
                    raise RuntimeError(delivery.message)
                yield delivery
        finally:
            answers.leave(numbers)

    def _fitting(self, requests: Sequence[Request]) -> Answers:
        """A core for these; without limits of the user's, a larger one replaces one that is too small for them."""
        if self._chosen:
            if self._answers is None:
                self._answers = Answers(self._made(self.limits))
            return self._answers
        context = max((len(r.prompt) + r.max_tokens for r in requests), default=1)
        sequences = min(AT_ONCE, max(1, sum(r.n for r in requests)))
        if self._answers is None or self.limits.context < context or self.limits.sequences < sequences:
            self.limits = replace(self.limits, context=max(context, ROOM), sequences=sequences)
            self._answers = None
            self._answers = Answers(self._made(self.limits))
        return self._answers

    def _made(self, limits: Limits) -> Core:
        if not self._prepared:
            prepare(self.model)
            self._prepared = True
        weight, config = self.model.embedding.weight, self.model.config
        snapshots = limits.sequences if limits.snapshots is None else limits.snapshots
        state = 8 if weight.dtype == torch.float64 else 4
        sizes = partial(pool_sizes, config, sequences=limits.sequences, context=limits.context, snapshots=snapshots,
                        drafts=limits.drafts > 0, page=limits.page, width=weight.element_size(),
                        state_width=state if self.state_dtype is None else self.state_dtype.itemsize)
        found, budget = sizes(), limits.memory
        if budget is None and weight.is_cuda:
            free = int(torch.cuda.mem_get_info(weight.device)[0] * SHARE)
            budget = free if found.bytes > free else None
        if budget is not None:
            found = sizes(budget=budget)
        runner = ModelRunner(self.model, slots=found.slots, pages=found.pages, page=limits.page,
                             words=self.tokenizer.vocab_size, state_dtype=self.state_dtype)
        return Core(runner, self.tokenizer, limits, slots=found.slots, pages=found.pages,
                    recurrent=found.slot_bytes > 0, slot_bytes=runner.slot_bytes, page_bytes=runner.page_bytes)


class Answers:
    """A core and what it delivered to those who have not asked for it yet: several may be asked for in turn."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._mail: dict[int, deque[Delivery]] = {}

    def add(self, requests: Sequence[Request]) -> list[int]:
        """All of them, or, with RequestError, none."""
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self.core.add(request))
                self._mail[numbers[-1]] = deque()
        except RequestError:
            self.leave(numbers)
            raise
        return numbers

    def of(self, number: int, n: int) -> Iterator[Delivery]:
        """A request's deliveries, to the end of the last of its n continuations."""
        mail = self._mail[number]
        while n:
            while not mail:
                for delivery in self.core.step():
                    if delivery.request in self._mail:
                        self._mail[delivery.request].append(delivery)
            n -= mail[0].ended is not None
            yield mail.popleft()

    def leave(self, numbers: Sequence[int]) -> None:
        """Nobody asks for these any longer."""
        for number in numbers:
            self.core.cancel(number)
            self._mail.pop(number, None)


def _whole(request: Request, pieces: Sequence[Delivery]) -> list[Answer]:
    """Deliveries of a request → its continuations."""
    found = []
    for index in range(request.n):
        own = [piece for piece in pieces if piece.index == index]
        assert own[-1].ended is not None
        found.append(Answer("".join(piece.text for piece in own), tuple(c for piece in own for c in piece.choices),
                            own[-1].ended, own[-1].message, own[-1].cached))
    return found


def generate(run: str | Path, prompt: str, *, max_tokens: int = 128, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             presence_penalty: float = 0.0, frequency_penalty: float = 0.0, repetition_penalty: float = 1.0,
             seed: int | None = None, stop: tuple[str, ...] = (), device: str = "cpu",
             dtype: Precision | None = None, drafts: int = 0) -> Iterator[str]:
    """Pieces of the continuation of `prompt` by the model in `run`; greedy unless temperature is above 0.

    drafts: tokens guessed from the text so far and checked at once, for greedy alone; no answer changes by it.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                        repetition_penalty=repetition_penalty)
    engine = Engine(run, device, dtype)
    if drafts:
        if not sampling.greedy:
            raise RequestError(f"drafts is {drafts}, but only greedy text can be guessed; drop it, or temperature and "
                               "penalties.")
        prompt_tokens = len(engine.tokenizer.encode(prompt))
        engine.within(Limits(sequences=1, snapshots=0, context=prompt_tokens + max_tokens, drafts=drafts))
    return engine.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
