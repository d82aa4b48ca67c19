"""Generation, timed: of a run, prefill and decode speed and the memory that a sequence carries, against its length; of
a recipe, what `hinny.bench.generation_recipe` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from hinny.bench.clock import in_turn, median_range
from hinny.bench.generation_fit import calibrate as fitted
from hinny.bench.generation_recipe import bench_recipe
from hinny.errors import ConfigError
from hinny.infer.engine import load
from hinny.model import Model
from hinny.run import Run, row
from hinny.state import State

PIECE = 1024
"""Prefill goes in pieces of this many tokens, so that its memory does not grow with the square of the context."""

RUN_CONTEXTS = (64, 256, 1024)


def bench_generate(run: str | None = None, *, recipe: str | None = None, contexts: Sequence[int] = (),
                   batch: int | Sequence[int] = 1, tokens: int = 16, repeats: int | None = None,
                   calibrate: Sequence[Path] = (), **more: Any) -> list[dict[str, Any]]:
    """Decode and prefill tokens/s: of the model of a `run`, or of a `recipe`'s with random weights.

    run        at each context (64, 256, 1024 without any) on random tokens, medians over `repeats` (3) of `tokens`
               single steps; beside them the bytes of the state. The rows are saved as the run's results/generate.json
    recipe     as `bench_recipe` says, which has more options
    calibrate  files of rows of recipes: nothing is timed, the constants of hinny.predict are fitted to them
    """
    if sum((run is not None, recipe is not None, bool(calibrate))) != 1:
        raise ConfigError("bench generate takes a run, or a recipe, or files to calibrate by: one of the three.")
    if calibrate:
        return fitted(calibrate)
    if recipe is not None:
        if repeats is not None:
            raise ConfigError(f"repeats ({repeats}) has no effect on a recipe, whose steps are timed one by one; drop "
                              "it.")
        batches = [batch] if isinstance(batch, int) else list(batch)
        return bench_recipe(recipe, contexts=contexts, batches=batches, tokens=tokens, **more)
    if more:
        raise ConfigError(f"{next(iter(more))} has no effect on a run; drop it, or name a recipe.")
    if not isinstance(batch, int):
        if len(batch) != 1:
            raise ConfigError(f"a run is timed at one batch, not {len(batch)}.")
        batch = batch[0]
    return _bench_run(cast(str, run), contexts or RUN_CONTEXTS, batch, tokens, 3 if repeats is None else repeats)


def _bench_run(run: str, contexts: Sequence[int], batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    if batch < 1 or tokens < 1 or repeats < 1 or min(contexts) < 1:
        raise ConfigError(f"batch ({batch}), tokens ({tokens}), repeats ({repeats}) and every context "
                          f"({', '.join(map(str, contexts))}) must be 1 or more.")
    opened = Run(run)
    model = load(run)[0].eval().requires_grad_(False)
    rows = []
    for context in contexts:
        rows += _at(model, opened.recipe.name, context, batch, tokens, repeats)
    opened.save_rows("generate", rows)
    return rows


@torch.no_grad()
def _at(model: Model, name: str, context: int, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))

    def prefill() -> State:
        state = model.init_state(batch)
        for start in range(0, context, PIECE):
            model.hidden(ids[:, start:start + PIECE], state)
        return state

    def step(state: State) -> None:
        (model.hidden(ids[:, :1], state)[:, -1] @ model.output_weight.T).argmax(dim=-1)

    full = prefill()
    ready = [full.fork() for _ in range(repeats + 1)]
    for state in ready:
        # the copies and the first growth of their buffers are no part of decoding
        step(state)

    def decode() -> None:
        state = ready.pop()
        for _ in range(tokens):
            step(state)

    filled, stepped = in_turn([prefill, decode], repeats)
    shape = f"context={context} batch={batch}"
    threads = f"threads={torch.get_num_threads()}"
    rows = []
    for what, count, seconds in (("prefill", context, filled), ("decode", tokens, stepped)):
        value, low, high = median_range([batch * count / s for s in seconds])
        rows.append(row(what, name, value, "tokens/s", shape=f"{shape} {threads}", low=low, high=high))
    return [*rows, row("state_bytes", name, full.bytes(), "bytes", shape=shape)]
