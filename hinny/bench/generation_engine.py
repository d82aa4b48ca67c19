"""hinny's side of `hinny bench generate --recipe`: a model of random weights behind the engine's runner, timed.

A decode point needs no prompt: pages and slots are filled with random numbers up to the context, which costs what a
text that was read costs. Steps are the engine's own: one pass over all sequences, their likeliest tokens back on the
host, which are the next step's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hinny import ops
from hinny.errors import BackendError
from hinny.infer.core import Core
from hinny.infer.limits import PAGE, Limits
from hinny.infer.parts import Part
from hinny.infer.prepare import prepare
from hinny.infer.quantise import quantise
from hinny.infer.request import Delivery, Request
from hinny.infer.runner import ModelRunner
from hinny.infer.sums import Sums
from hinny.infer.tensor import Head
from hinny.memory.quantised import Kind
from hinny.model import Model
from hinny.tokenizer import ByteTokenizer

WARM_UP = 3
"""Steps before the timed ones: the first captures a graph."""

SEED = 0


class Ours:
    """A model, ready for inference, on its device; each point has pools of its own, freed behind it."""

    def __init__(self, model: Model, *, state: torch.dtype, piece: int,
                 sums: Sums | None = None, kind: Kind | None = None) -> None:
        """Changes `model` as the engine does. state: type of the SSM states; piece: tokens of a prompt that are read in
        one pass; sums: of a model that is cut over processes; kind: of the projections, which are then made shorter.
        """
        if kind is not None:
            quantise(model, kind)
        prepare(model)
        self.model, self.state, self.piece, self.sums = model, state, piece, sums
        self.head = None if sums is None else Head(model, model.config.vocab_size, sums)
        self.device = model.embedding.weight.device
        self._random = torch.Generator(self.device).manual_seed(SEED)

    def decode(self, batch: int, context: int, tokens: int) -> list[float]:
        """Seconds of `tokens` steps of `batch` sequences, whose middle one has `context` tokens behind it."""
        start = max(1, context - WARM_UP - tokens // 2)
        runner, pages = self._pools(batch, start + WARM_UP + tokens)
        self._fill(runner)
        written = torch.randint(runner.words, (batch,), generator=torch.Generator().manual_seed(SEED)).tolist()
        seconds = []
        for step in range(WARM_UP + tokens):
            parts = [Part(slot, pages[slot], start + step, (written[slot],)) for slot in range(batch)]
            begun = self._now()
            written = ops.likeliest(runner.run(parts))[1].tolist()  # on the host: the step is over
            seconds.append(time.perf_counter() - begun)
        return seconds[WARM_UP:]

    def prefill(self, length: int, repeats: int) -> list[float]:
        """Seconds from a prompt's tokens to its first answer's token, `repeats` times behind one that is not timed."""
        runner, pages = self._pools(1, length)
        prompt = torch.randint(runner.words, (length,), generator=torch.Generator().manual_seed(SEED)).tolist()
        seconds = []
        for _ in range(1 + repeats):
            runner.clear_slot(0)
            begun = self._now()
            for start in range(0, length, self.piece):
                tokens = prompt[start:start + self.piece]
                found = runner.run([Part(0, pages[0], start, tokens, wanted=int(start + self.piece >= length))])
            found.argmax(dim=-1).tolist()
            seconds.append(time.perf_counter() - begun)
        return seconds[1:]

    def answer(self, batch: int, length: int, tokens: int, repeats: int) -> list[float]:
        """Seconds from `batch` requests of `length` tokens each to the last of their `tokens`, `repeats` times behind
        one that is not timed; no prompt is found in a cache.
        """
        runner, pages = self._pools(batch, length + tokens)
        limits = Limits(sequences=batch, context=length + tokens, snapshots=0, step_tokens=max(self.piece, batch))
        core = Core(runner, _Numbers(runner.words), limits, slots=batch, pages=sum(map(len, pages)),
                    recurrent=self.model.config.mamba2 is not None or self.model.config.mamba1 is not None)
        prompts = torch.randint(runner.words, (batch, length), generator=torch.Generator().manual_seed(SEED)).tolist()
        seconds = []
        for _ in range(1 + repeats):
            core.forget()
            begun = self._now()
            for prompt in prompts:
                core.add(Request(tuple(prompt), tokens, ignore_eod=True))
            written = 0
            while core.busy:
                for delivery in core.step():
                    _check(delivery)
                    written += len(delivery.choices)
            seconds.append(self._now() - begun)
            assert written == batch * tokens, (written, batch, tokens)
        return seconds[1:]

    def logits(self, prompt: list[int]) -> Tensor:
        """(v,) behind a prompt."""
        runner, pages = self._pools(1, len(prompt))
        runner.clear_slot(0)
        return runner.run([Part(0, pages[0], 0, prompt)])[0]

    def free(self) -> None:
        """Gives back what the points before held of a GPU."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _pools(self, batch: int, tokens: int) -> tuple[ModelRunner, list[Sequence[int]]]:
        """A runner of room for `batch` sequences, and the pages of each: anywhere, as after many requests."""
        self.free()
        each = -(-tokens // PAGE)
        runner = ModelRunner(self.model, slots=batch, pages=batch * each, page=PAGE, state_dtype=self.state,
                             words=self.model.config.vocab_size, head=self.head, sums=self.sums)
        order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(SEED)).tolist()
        return runner, [order[i * each:(i + 1) * each] for i in range(batch)]

    def _fill(self, runner: ModelRunner) -> None:
        for tensor in runner.pool.tensors():
            tensor.normal_(generator=self._random)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Numbers(ByteTokenizer):
    """Words are their numbers: a random model's have no other text. None ends a document."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.vocab_size, self.eod = words, -1

    def _decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)


def _check(delivery: Delivery) -> None:
    """The engine makes an answer of a fault; here it ends the point, or the command."""
    if delivery.ended == "failed":
        if "out of memory" in delivery.message.lower():
            raise torch.OutOfMemoryError(delivery.message)
        raise BackendError(f"a request of the bench failed: {delivery.message}")
