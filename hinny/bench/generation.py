"""Generation, timed: prefill and decode speed, and the memory that a sequence carries, against its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hinny.bench.clock import in_turn, median_range
from hinny.errors import ConfigError
from hinny.infer.engine import Engine
from hinny.run import row
from hinny.state import State

PIECE = 1024
"""Prefill goes in pieces of this many tokens, so that its memory does not grow with the square of the context."""


def bench_generate(run: str, *, contexts: Sequence[int] = (64, 256, 1024), batch: int = 1, tokens: int = 16,
                   repeats: int = 3) -> list[dict[str, Any]]:
    """Prefill and decode tokens/s and state bytes of a run's model at each context, on random tokens.

    Decode is the time of `tokens` single steps behind the context; medians over `repeats`, low and high over them.
    The rows are saved in the run as results/generate.json.
    """
    if batch < 1 or tokens < 1 or repeats < 1 or min(contexts, default=0) < 1:
        raise ConfigError(f"batch ({batch}), tokens ({tokens}), repeats ({repeats}) and every context "
                          f"({', '.join(map(str, contexts))}) must be 1 or more.")
    engine = Engine(run)
    rows = []
    for context in contexts:
        rows += _at(engine, context, batch, tokens, repeats)
    engine.run.save_rows("generate", rows)
    return rows


@torch.no_grad()
def _at(engine: Engine, context: int, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    model, name = engine.model, engine.run.recipe.name
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
