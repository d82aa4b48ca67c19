"""Evaluation, timed: requests shaped as tasks are, through hinny's reader and, if asked for, through lm-eval's own.

Weights are random: they cost what trained ones cost. The requests of both sides are the same tokens, and both must give
the same log-probabilities before anything is timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hinny import memory
from hinny.bench.clock import median_range
from hinny.bench.eval_items import CASES
from hinny.bench.eval_peer import HFLM
from hinny.bench.kernel_cases.case import shape_text
from hinny.bench.kernel_table import merge_rows, read_rows
from hinny.bench.training_table import key
from hinny.config import Recipe, load_recipe
from hinny.errors import BackendError, ConfigError
from hinny.infer.precision import to_bfloat16
from hinny.infer.reading.reader import ModelReader
from hinny.infer.reading.requests import Generate, Score
from hinny.model import Model
from hinny.run import row
from hinny.tokenizer import ByteTokenizer

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference of a log-probability between the peers, in nats a token of the continuation. In bf16 the twin's
logits are rounded too, those above 4 to steps of 0.03; of thousands of figures the furthest were 0.07 apart."""

WRITTEN = 128
"""Tokens that a RULER needle task writes."""

NEEDLE = "needle"
"""The case of one long prompt and what is written behind it."""

ITEMS, REQUESTS_AT_ONCE = 16, 4


def bench_eval(recipe: str, *, only: Sequence[str] | None = None, items: int | None = None, length: int | None = None,
               batch: int | None = None, steps: int = 1, precision: str | None = None, against: str | None = None,
               overrides: Sequence[str] = (), save: Path | None = None) -> list[dict[str, Any]]:
    """Seconds, tokens read and memory of an evaluation with a recipe's model and random weights.

    only       cases: choices, five-shot, distinct (hinny.bench.eval_items), needle: one prompt as long as RULER's, and
               128 tokens written; all but needle without it
    items      questions of a case of scores, 16 without it; length: of a prompt of choices (4096) or needle (131072)
               with its answer
    against    "lm-eval": its HFLM over transformers' twin with the same weights, `batch` requests at a time (4)
    steps      times that each side is timed, after one pass that is not; precision: fp32 or bf16, bf16 on a GPU
    save       a JSON file: these rows take the place of the same figures in it, the others stay
    """
    if against not in (None, "lm-eval"):
        raise ConfigError(f"against is {against!r}; the only peer known is lm-eval.")
    cases = list(only or CASES)
    if unknown := [case for case in cases if case not in (*CASES, NEEDLE)]:
        raise ConfigError(f"only is {unknown[0]!r}; known: {', '.join((*CASES, NEEDLE))}.")
    if against and NEEDLE in cases:
        raise ConfigError("needle is timed without a peer: HFLM holds the logits of every position, "
                          "vocabulary x length; drop against or needle.")
    acting = {"length": {"choices", NEEDLE} & {*cases}, "items": {*cases} - {NEEDLE}, "batch": against}
    for name, value in (("length", length), ("items", items), ("batch", batch)):
        if value is not None and not acting[name]:
            raise ConfigError(f"{name} ({value}) has no effect on {', '.join(cases)}"
                              f"{' without against' if name == 'batch' else ''}; drop it.")
    items, batch = ITEMS if items is None else items, REQUESTS_AT_ONCE if batch is None else batch
    if min(items, batch, steps, 1 if length is None else length) < 1:
        raise ConfigError(f"items ({items}), batch ({batch}), steps ({steps}) and length ({length}) must be 1 or more.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    if precision not in TOLERANCE:
        raise ConfigError(f"precision is {precision!r}; it must be fp32 or bf16.")
    if save is not None:
        read_rows(save)  # refused now, and not when all is timed
    bench = _Bench(load_recipe(recipe, overrides), device, precision, steps)
    rows = []
    for case in cases:
        if case == NEEDLE:
            rows += bench.needle(131072 if length is None else length)
        else:
            rows += bench.scores(case, items, 4096 if length is None else length, batch if against else None)
    if save is not None:
        merge_rows(save, rows, key)
    return rows


class _Bench:
    """A model of random weights, and what is timed with it."""

    def __init__(self, recipe: Recipe, device: torch.device, precision: str, repeats: int) -> None:
        self.recipe, self.device, self.precision, self.repeats = recipe, device, precision, repeats
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self.model = random_model(recipe, device, "bf16" if precision == "bf16" else "fp32")
        self.tokenizer = ByteTokenizer()
        if recipe.model.vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(f"model.vocab_size is {recipe.model.vocab_size}; the bench writes its requests in bytes "
                              f"and needs {self.tokenizer.vocab_size}: choose a recipe with a larger vocabulary.")

    def scores(self, case: str, items: int, length: int, peer_batch: int | None) -> list[dict[str, Any]]:
        """Rows of a case of scores: seconds, and how many times fewer tokens are read than asked for."""
        requests = CASES[case](np.random.default_rng(0), 256, items=items, length=length)
        reader = ModelReader(self.model, self.tokenizer)
        found = [answer.total for answer in reader.score(requests)]
        usage = reader.usage
        peer = None
        if peer_batch is not None:
            longest = max(len(r.context) + len(r.continuation) for r in requests)
            peer = HFLM(self.model, batch=peer_batch, length=longest)
            self._check(requests, found, peer.score(requests))
        ours, theirs = self._timed(lambda: reader.score(requests), None if peer is None else
                                   lambda: peer.score(requests))
        value, low, high = median_range(ours)
        named: dict[str, Any] = {} if peer is None else {
            "peer": peer.name, "peer_value": median_range(theirs)[0], "ratio": median_range(theirs)[0] / value}
        shape = self._shape(case=case, items=items, requests=len(requests),
                            **({"length": length} if case == "choices" else {}))
        read = usage.prefilled + usage.padded
        return [row("eval.seconds", self.recipe.name, value, "s", low=low, high=high, shape=shape, device=self.name,
                    **named),
                row("eval.tokens_saved", self.recipe.name, usage.asked / read, "times", shape=shape, device=self.name)]

    def needle(self, length: int) -> list[dict[str, Any]]:
        """Rows of one long prompt: seconds of prompt and answer, of the answer's share, and memory."""
        if length <= WRITTEN:
            raise ConfigError(f"length is {length}; a needle's prompt and the {WRITTEN} tokens written need more.")
        prompt = tuple(np.random.default_rng(0).integers(256, size=length - WRITTEN).tolist())
        asked = Generate(prompt, WRITTEN)
        # the end-of-document token may come at any time with random weights: what is timed is all 128
        reader = ModelReader(self.model, _Endless())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        ours, _ = self._timed(lambda: reader.generate([asked]), None)
        only_prompt, _ = self._timed(lambda: reader.score([Score(prompt, (0,))]), None)
        (value, low, high), (prefill, low_p, high_p) = median_range(ours), median_range(only_prompt)
        shape = self._shape(case=NEEDLE, length=length, written=WRITTEN)
        rows = [row("eval.seconds", self.recipe.name, value, "s", low=low, high=high, shape=shape, device=self.name),
                row("eval.prompt_seconds", self.recipe.name, prefill, "s", low=low_p, high=high_p, shape=shape,
                    device=self.name)]
        if self.device.type == "cuda":
            predicted = memory.inference(self.recipe.model, tokens=length, piece=reader.piece,
                                         width=2 if self.precision == "bf16" else 4)["memory_bytes"]
            rows.append(row("eval.peak_memory", self.recipe.name,
                            torch.cuda.max_memory_allocated(self.device) / 1e9, "GB", bound=predicted / 1e9,
                            shape=shape, device=self.name))
        return rows

    def _check(self, requests: Sequence[Score], ours: Sequence[float], theirs: Sequence[float]) -> None:
        for request, mine, other in zip(requests, ours, theirs, strict=True):
            if abs(mine - other) > TOLERANCE[self.precision] * len(request.continuation):
                raise BackendError(f"HFLM gives a continuation of {len(request.continuation)} tokens {other:.4f} nats "
                                   f"where the reader gives {mine:.4f}: nothing was timed.")

    def _timed(self, mine: Callable[[], object], other: Callable[[], object] | None) -> tuple[list[float], list[float]]:
        """Seconds of both, in turn; both have run before, but for a needle, which is run once here."""
        if other is None:
            mine()
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.repeats):
            for work, found in zip((mine, other), seconds, strict=True):
                if work is None:
                    continue
                gc.collect()
                start = time.perf_counter()
                work()  # ends with figures on the host: the device is done
                found.append(time.perf_counter() - start)
        return seconds

    def _shape(self, **sizes: Any) -> str:
        where = {"gpus": 1} if self.name else {"threads": torch.get_num_threads()}
        return shape_text(**sizes, precision=self.precision, **where)


class _Endless(ByteTokenizer):
    """Bytes without an end of the document."""

    def __init__(self) -> None:
        super().__init__()
        self.eod = -1


@torch.no_grad()
def random_model(recipe: Recipe, device: torch.device, precision: Literal["fp32", "bf16"]) -> Model:
    """The recipe's model with random weights drawn on `device`, a part at a time, ready for inference."""
    with torch.device("meta"):
        model = Model(recipe.model)
    generator = torch.Generator(device).manual_seed(recipe.train.seed)
    for part in model.parts().values():
        part.to_empty(device=device)
        model.init_part(part, generator)
        if precision == "bf16":
            to_bfloat16(part)
    return model.eval().requires_grad_(False)
