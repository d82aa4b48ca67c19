"""The training step, timed: forward, loss, backward, AdamW, on random tokens; beside transformers if asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.bench.clock import in_turn, median_range
from hinny.bench.peers import transformers_twin
from hinny.config import load_recipe
from hinny.errors import BackendError, ConfigError
from hinny.model import Model
from hinny.run import row

TOLERANCE = 1e-3
"""Largest difference of logits between the peers, both fp32: they sum in another order."""


def bench_train(recipe: str, *, steps: int = 5, batch: int | None = None, length: int | None = None,
                precision: str | None = None, against: str | None = None) -> list[dict[str, Any]]:
    """Training tokens/s of a recipe's model, median over `steps`, low and high over them.

    recipe     file or shipped name; batch, length, precision default to its micro-batch, seq_len and precision
    against    "transformers": the same weights in transformers, stepped in turn with ours; fp32 only
    """
    loaded = load_recipe(recipe)
    batch = loaded.train.micro_batch_size if batch is None else batch
    length = loaded.train.seq_len if length is None else length
    precision = precision or ("fp32" if against else loaded.train.precision)
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision is {precision!r}; it must be fp32 or bf16.")
    if against not in (None, "transformers"):
        raise ConfigError(f"against is {against!r}; the only peer known is transformers.")
    if against and precision != "fp32":
        raise ConfigError("against transformers is timed in fp32 on both sides; drop precision.")
    if min(steps, batch, length) < 1:
        raise ConfigError(f"steps ({steps}), batch ({batch}) and length ({length}) must be 1 or more.")
    model = Model(loaded.model)
    model.init_weights(loaded.train.seed)
    tokens = torch.randint(loaded.model.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    works, peer = [_our_step(model, tokens, precision)], None
    if against:
        twin = transformers_twin(model)
        _check(model, twin, tokens)
        works.append(_twin_step(twin, tokens))
        peer = f"transformers {version('transformers')} {type(twin).__name__}"
    seconds = in_turn(works, repeats=steps)
    speeds = [[batch * length / s for s in series] for series in seconds]
    value, low, high = median_range(speeds[0])
    peer_value = median_range(speeds[1])[0] if peer else None
    return [row("train", loaded.name, value, "tokens/s", low=low, high=high, peer=peer, peer_value=peer_value,
                ratio=value / peer_value if peer_value else None,
                shape=f"batch={batch} length={length} precision={precision} threads={torch.get_num_threads()}")]


def _our_step(model: Model, tokens: Tensor, precision: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = ops.linear_cross_entropy(model.hidden(tokens[:, :-1]), model.output_weight, tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _twin_step(twin: nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        logits = twin(tokens[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def _check(model: Model, twin: nn.Module, tokens: Tensor) -> None:
    ours, theirs = model(tokens[:1, :-1]), twin(tokens[:1, :-1]).logits
    if (gap := float((ours - theirs).abs().max())) > TOLERANCE:
        raise BackendError(f"{type(twin).__name__} with the same weights differs by {gap:.2e} in its logits, more than "
                           f"{TOLERANCE}: nothing was timed.")
