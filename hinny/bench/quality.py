"""What shorter weights and shorter states cost in quality: a run's held-out text, decoded token by token.

The tokens are given, so that all read the same text, and each goes through the states one step at a time, as in
generation: what rounding does to a state adds up over a window. A figure compares two decodings of the same tokens:

    shorter states     with the same weights and float32 states
    shorter weights    with float32 weights; states in float32 in both
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hinny.bench.generation_rows import key
from hinny.bench.kernel_table import merge_rows, read_rows
from hinny.bench.quality_table import page
from hinny.checkpoint.store import load_model
from hinny.data.mix import Batch, heldout_batches
from hinny.errors import ConfigError
from hinny.infer.limits import PAGE
from hinny.infer.parts import Part
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import prepare
from hinny.infer.quantise import quantise
from hinny.infer.runner import ModelRunner
from hinny.memory.quantised import KINDS
from hinny.model import Model
from hinny.run import Run, row, write_atomically

WEIGHTS = ("fp32", "bf16", *KINDS)
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS_AT_ONCE = 16


def bench_quality(run: str, *, weights: Sequence[str] | None = None, states: Sequence[str] | None = None,
                  windows: int = 32, length: int | None = None, save: Path | None = None,
                  markdown: Path | None = None) -> list[dict[str, Any]]:
    """Loss, changed greedy tokens and differences of logits of a run's newest checkpoint, rounded in several ways, and
    what trained it.

    weights    of fp32, bf16, int8, fp8, int4; fp32 and bf16 without it
    states     of fp32, bf16, fp16, those of the SSM layers; all without it, where the model has such layers
    windows    of held-out text, of `length` tokens each, the training length without it; at least 2
    save       a JSON file: rows take the place of the same figures in it
    markdown   a file for the page of these rows or, with save, of all in that file
    """
    if save is not None:
        read_rows(save)  # refused now, and not when all is decoded
    opened = Run(Path(run))
    config = opened.recipe.model
    recurrent = bool({"M", "1"} & {*config.pattern})
    for name, asked, known in (("weights", weights, WEIGHTS), ("states", states, tuple(STATES))):
        if unknown := [one for one in asked or () if one not in known]:
            raise ConfigError(f"{name} is {unknown[0]!r}; allowed: {', '.join(known)}.")
    if states and not recurrent and {*states} != {"fp32"}:
        raise ConfigError(f"states ({', '.join(states)}) has no effect on pattern {config.pattern}, whose layers have "
                          "no states of that kind; drop it.")
    length = opened.recipe.train.seq_len if length is None else length
    if windows < 2 or length < 1:
        raise ConfigError(f"windows is {windows} and length {length}; 2 windows of 1 token are the least.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = _Bench(opened, list(weights or ("fp32", "bf16")), device, windows, length)
    rows = [_trained(opened), *bench.rows(list(states or (STATES if recurrent else ("fp32",))))]
    if save is not None:
        merge_rows(save, rows, key)
    if markdown is not None:
        write_atomically(markdown, page(rows if save is None else read_rows(save), WEIGHTS, tuple(STATES)))
    return rows


def _trained(run: Run) -> dict[str, Any]:
    """What the run was made by, and for how many steps."""
    env = run.env
    return row("quality.trained", run.recipe.name, run.steps_done, "steps", command=env["command"]) | {
        "commit": env["commit"], "machine": env["machine"]}


@dataclass(frozen=True)
class Compared:
    """Two decodings of the same windows."""

    loss: np.ndarray
    """(windows,): mean loss of each window's tokens, nats."""
    change: np.ndarray
    """(windows,): how much more that is than the other decoding's."""
    changed: float
    """Share of tokens whose likeliest successor is another."""
    furthest: float
    """Largest |difference of a logit|."""


class _Bench:
    """A run's model in each precision asked for, and its held-out text."""

    def __init__(self, run: Run, weights: list[str], device: torch.device, windows: int, length: int) -> None:
        self.run, self.device, self.length, self.weights = run, device, length, weights
        recipe = run.recipe
        if not recipe.data.folders:
            raise ConfigError(f"{run.path}: its recipe names no data.path, so there is no held-out text.")
        self.batches = list(heldout_batches(
            recipe.data.only(next(iter(recipe.data.folders))), seq_len=length, windows=windows,
            batch_size=ROWS_AT_ONCE, vocab_size=recipe.model.vocab_size))
        if (found := sum(len(batch.tokens) for batch in self.batches)) < 2:
            raise ConfigError(f"the held-out text has {found} window of {length} tokens; a spread needs 2: "
                              "take a smaller length.")
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._whole = load_model(run, device=device).requires_grad_(False)

    def rows(self, states: list[str]) -> list[dict[str, Any]]:
        """The rows of every kind of weights with every kind of state."""
        found = []
        for weights in self.weights:
            model = self._model(weights)
            for state in states:
                whole = model if state != "fp32" else self._model("fp32")
                compared = compare(model, STATES[state], whole, self.batches)
                against = weights if state != "fp32" else "fp32"
                found += self._rows(compared, f"weights={weights} state={state} against={against}/fp32")
        return found

    def _model(self, weights: str) -> Model:
        model = copy.deepcopy(self._whole)
        if weights != "fp32":
            to_bfloat16(model)
        if weights in KINDS:
            quantise(model, weights)  # type: ignore[arg-type]
        prepare(model)
        return model

    def _rows(self, compared: Compared, shape: str) -> list[dict[str, Any]]:
        shape = f"{shape} windows={len(compared.loss)} length={self.length}"
        figures = {"loss": (*interval(compared.loss), "nats/token"),
                   "loss_change": (*interval(compared.change), "nats/token"),
                   "greedy_changed": (compared.changed, None, None, "of tokens"),
                   "logit_change": (compared.furthest, None, None, "nats at most")}
        return [row(f"quality.{name}", self.run.recipe.name, value, unit, low=low, high=high, shape=shape,
                    device=self.name) for name, (value, low, high, unit) in figures.items()]


def compare(model: Model, state: torch.dtype, whole: Model, batches: Sequence[Batch]) -> Compared:
    """`model` with states in `state` beside `whole` with states in float32, step by step over the same tokens."""
    losses, changes, changed, counted, furthest = [], [], 0, 0, 0.0
    for batch in batches:
        sums = np.zeros((2, len(batch.tokens)))
        pairs = zip(steps(model, state, batch.tokens), steps(whole, torch.float32, batch.tokens), strict=True)
        for t, (ours, theirs) in enumerate(pairs):
            counts = torch.from_numpy(batch.mask[:, t])
            if not counts.any():
                break
            ours, theirs = ours.cpu()[counts].double(), theirs.cpu()[counts].double()
            targets = torch.from_numpy(batch.targets[:, t])[counts]
            for place, logits in zip(sums, (ours, theirs), strict=True):
                place[counts.numpy()] += torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
            changed += int((ours.argmax(-1) != theirs.argmax(-1)).sum())
            counted += len(ours)
            furthest = max(furthest, float((ours - theirs).abs().max()))
        mean = sums / batch.mask.sum(1)
        losses.append(mean[0])
        changes.append(mean[0] - mean[1])
    return Compared(np.concatenate(losses), np.concatenate(changes), changed / counted, furthest)


def steps(model: Model, state: torch.dtype, tokens: np.ndarray) -> Iterator[Tensor]:
    """Logits (b v) behind each of tokens (b t), one step of all rows after the other."""
    b, t = tokens.shape
    each = -(-t // PAGE)
    runner = ModelRunner(model, slots=b, pages=b * each, state_dtype=state)
    pages = [list(range(i * each, (i + 1) * each)) if runner.page_bytes else [] for i in range(b)]
    for at in range(t):
        yield runner.run([Part(i, pages[i], at, [int(tokens[i, at])]) for i in range(b)])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and the bounds of its 95 % interval, the values being independent."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half
