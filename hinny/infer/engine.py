"""A run, opened for use: text from a prompt, logits from tokens. One sequence of states for all four families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor

from hinny import tokenizer as tokenizers
from hinny.checkpoint.ranks import RankFailure
from hinny.checkpoint.store import load_model
from hinny.errors import ConfigError, RequestError
from hinny.infer.core import Core
from hinny.infer.limits import Limits
from hinny.infer.mail import Answer, Answers, whole
from hinny.infer.parts import Runner
from hinny.infer.prepare import prepare
from hinny.infer.quantise import Precision, check_precision, to_precision
from hinny.infer.request import Delivery, Request
from hinny.infer.runner import ModelRunner
from hinny.infer.sampling import Sampling
from hinny.infer.tensor import Head, load_tensor
from hinny.infer.tensor_ranks import Team, check_tensor_processes
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

def load(run: str | Path, device: str = "cpu", dtype: Precision | None = None) -> tuple[Model, Tokenizer]:
    """The model of a run directory at its latest checkpoint, and its tokenizer.

    dtype: None for float32 weights; "bf16" for matrices in bfloat16 (`hinny.infer.precision`); "int8", "fp8" or "int4"
    for the layers' projections in these and all other matrices in bfloat16 (`hinny.infer.quantise`), which needs the
    extra 'quantise'; "stored" for the types of the checkpoint, bfloat16 for most converted ones.
    """
    check_precision(dtype)
    opened = Run(Path(run))
    model = load_model(opened, device=device, dtype="stored" if dtype == "stored" else None)
    to_precision(model, dtype)
    return model, tokenizers.load(opened.path)


class Engine:
    """A model and its tokenizer, without gradients. Of a model on several processes rank 0 `leads`: it takes the
    requests, and `close` ends all; the others `follow`."""

    def __init__(self, run: str | Path, device: str = "cpu", dtype: Precision | None = None,
                 limits: Limits | None = None, state_dtype: torch.dtype | None = None, tensor: int = 1) -> None:
        """`run`: a run directory with at least one checkpoint. `dtype`: as in `load`. limits: None for what each
        request or batch of them needs, without a prefix cache. state_dtype: of SSM states, as in `ModelRunner`. tensor:
        processes of this machine, started by torchrun, that share the model; all make the engine, alike, at the same
        time, and limits are `Limits()` then, if none are given."""
        if tensor != 1:
            check_tensor_processes(tensor)
        self.run, self._dtype = Run(Path(run)), dtype
        self.device, self.state_dtype = device, state_dtype
        self._team = None if tensor == 1 else Team(device)
        self.limits = limits or (Limits(sequences=1, context=ROOM, snapshots=0) if tensor == 1 else Limits())
        self._chosen, self._prepared = limits is not None or tensor != 1, False
        self._answers: Answers | None = None
        self._least: int | None = None
        if self._team is None:
            self.model, self.tokenizer = load(run, device, dtype)
            self.model.eval().requires_grad_(False)
        else:
            # one that cannot says so to all
            rooms = [room for room in self._team.each(self._open_part) if room is not None]
            self._least = min(rooms, default=None)

    def _open_part(self) -> int | None:
        """This rank's part → bytes that are left on its device."""
        assert self._team is not None
        self.model, self.tokenizer = load_tensor(self.run, self._team.sums, self._dtype), tokenizers.load(self.run.path)
        self._prepare()
        return room(self._team.device)

    @property
    def leads(self) -> bool:
        """Whether requests are this process's; if not, all that it can do is `follow`."""
        return self._team is None or self._team.rank == 0

    def follow(self) -> None:
        """Do what rank 0 does until it closes. RankFailure if another rank has failed or is gone."""
        assert self._team is not None, "one process has nobody to follow"
        self._team.follow(self._runner)

    def on_failure(self, call: Callable[[], None]) -> None:
        """What to call, in whichever thread, when another rank has failed or is gone; ask before there is a core."""
        if self._team is not None:
            self._team.failed = call

    def close(self) -> None:
        """Let the other ranks end, if there are any. RankFailure if one has failed."""
        if self._team is not None:
            self._team.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*([] if kind is None else [RankFailure])):
            self.close()

    def within(self, limits: Limits) -> None:
        """From now on serve by these limits; what was begun by others goes on by those."""
        if self._team is not None and self._answers is not None:
            raise ConfigError("limits of a model on several processes cannot change once it has served.")
        self.limits, self._chosen, self._answers = limits, True, None

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (b t v) of whole sequences (b t); a row may be padded on its right, for no position looks there."""
        if self._team is not None:
            raise ConfigError("logits of whole sequences are given on one process; leave tensor out.")
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
            return [whole(request, list(answers.of(number, request.n)))
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

    def _prepare(self) -> None:
        if not self._prepared:
            prepare(self.model)
            self._prepared = True

    def _runner(self, slots: int, pages: int, page: int) -> ModelRunner:
        words, team = self.tokenizer.vocab_size, self._team
        head = None if team is None else Head(self.model, words, team.sums)
        return ModelRunner(self.model, slots=slots, pages=pages, page=page, words=words, state_dtype=self.state_dtype,
                           head=head, sums=None if team is None else team.sums)

    def _made(self, limits: Limits) -> Core:
        self._prepare()
        weight, config, team = self.model.embedding.weight, self.model.config, self._team
        snapshots = limits.sequences if limits.snapshots is None else limits.snapshots
        state = 8 if weight.dtype == torch.float64 else 4
        sizes = partial(pool_sizes, config, sequences=limits.sequences, context=limits.context, snapshots=snapshots,
                        drafts=limits.drafts > 0, page=limits.page, width=weight.element_size(),
                        state_width=state if self.state_dtype is None else self.state_dtype.itemsize,
                        ranks=1 if team is None else team.sums.size)
        found, budget, left = sizes(), limits.memory, room(weight.device) if team is None else self._least
        if budget is None and left is not None:
            free = int(left * SHARE)
            budget = free if found.bytes > free else None
        if budget is not None:
            found = sizes(budget=budget)
        runner: Runner
        if team is None:
            runner = own = self._runner(found.slots, found.pages, limits.page)
        else:
            runner = team.lead(self._runner, found.slots, found.pages, limits.page)
            own = cast(ModelRunner, runner.runner)
        return Core(runner, self.tokenizer, limits, slots=found.slots, pages=found.pages,
                    recurrent=found.slot_bytes > 0, slot_bytes=own.slot_bytes, page_bytes=own.page_bytes)


def room(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None on a CPU, where pools take what they need."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def generate(run: str | Path, prompt: str, *, max_tokens: int = 128, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             presence_penalty: float = 0.0, frequency_penalty: float = 0.0, repetition_penalty: float = 1.0,
             seed: int | None = None, stop: tuple[str, ...] = (), device: str = "cpu",
             dtype: Precision | None = None, drafts: int = 0, tensor: int = 1) -> Iterator[str]:
    """Pieces of the continuation of `prompt` by the model in `run`; greedy unless temperature is above 0.

    max_tokens     to write at most; the end of the document ends the text before
    top_k, top_p, min_p, seed and the penalties: as of `hinny.infer.sampling.Sampling`
    stop           strings before the first of which the text ends
    device, dtype  as for `load`
    drafts         tokens guessed from the text so far and checked at once, for greedy alone; no answer changes by it
    tensor         processes that share the model, each of which torchrun has call this: rank 0 gets the text

    Text comes as it becomes certain. The run is opened at the call, not with the first piece. RequestError for a
    request that cannot be served, also for an option that could not act; RuntimeError if the model fails on the way.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                        repetition_penalty=repetition_penalty)
    if drafts and not sampling.greedy:
        raise RequestError(f"drafts is {drafts}, but only greedy text can be guessed; drop it, or temperature and "
                           "penalties.")
    engine = Engine(run, device, dtype, tensor=tensor)
    if not engine.leads:
        engine.follow()
        return iter(())
    if drafts or tensor > 1:
        prompt_tokens = len(engine.tokenizer.encode(prompt))
        engine.within(Limits(sequences=1, snapshots=0, context=prompt_tokens + max_tokens, drafts=drafts))
    return _closing(engine, engine.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop))


def _closing(engine: Engine, pieces: Iterator[str]) -> Iterator[str]:
    with engine:
        yield from pieces
