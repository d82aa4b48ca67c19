"""Norms of SSM states along a long text: where a state grows without bound or collapses, it shows here.

A model whose states were never full in training may not forget in time on longer texts (state collapse, arXiv
2410.07145); its norms then leave the range that they had within the trained length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hinny.data.folder import DataFolder
from hinny.errors import ConfigError
from hinny.evals.options import EvalOptions
from hinny.evals.perplexity import check_data
from hinny.infer.engine import Engine
from hinny.infer.reading.requests import Progress
from hinny.run import row

SEQUENCES = 4
"""Sequences at most, where the options say nothing."""
TOKENS_AT_ONCE = 4096
"""Of each sequence, through the model."""
FIRST = 64
"""The first position at which states are looked at; then at every doubling."""


@torch.no_grad()
def state_norms(engine: Engine, options: EvalOptions, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Root mean square, and the largest magnitude, of each SSM layer's state after 64, 128, … tokens of text.

    The text: `samples` sequences (4) of the longest of `lengths` (the training length) from the start of the held-out
    documents of the first folder, joined. `layer` in a row's shape is the layer's index in the pattern, `position` the
    tokens read. `low` and `high` of the mean square are the smallest and largest sequence's.
    ConfigError for a model without such layers, or too short a text; DataError as in `held_out`.
    """
    if not {"M", "1"} & set(engine.model.config.pattern):
        raise ConfigError(f"{engine.run.path}: pattern {engine.model.config.pattern} has no Mamba layer, so there are "
                          "no states to look at.")
    length = max(options.lengths) if options.lengths else engine.run.recipe.train.seq_len
    folders = list(engine.run.recipe.data.folders)
    if not folders:
        raise ConfigError(f"{engine.run.path}: its recipe names no data.path, so there is no held-out text.")
    check_data(engine, folders[0], 0)
    shard = DataFolder(folders[0], engine.run.recipe.model.vocab_size).shard("heldout")
    n = min(options.samples or SEQUENCES, shard.n_tokens // length)
    if n < 1:
        raise ConfigError(f"the held-out split of {folders[0]} has {shard.n_tokens} tokens, fewer than one sequence of "
                          f"{length}; give --lengths {shard.n_tokens} or less, or more text.")
    tokens = torch.from_numpy(np.asarray(shard.tokens(0, n * length), np.int64)).view(n, length)
    tokens = tokens.to(engine.model.embedding.weight.device)
    places = [p for k in range(64) if (p := FIRST << k) < length] + [length]
    rows, start, state = [], 0, engine.model.init_state(n, capacity=length)
    for place in places:
        for begin in range(start, place, TOKENS_AT_ONCE):
            engine.model.hidden(tokens[:, begin:min(begin + TOKENS_AT_ONCE, place)], state)
        start = place
        for index, layer in enumerate(state.layers):
            held = {} if layer is None else layer.tensors()
            if "ssm" in held:
                rows += _rows(engine, held["ssm"], f"layer={index} position={place} sequences={n}")
        if progress is not None:
            progress(start, length)
    return rows


def _rows(engine: Engine, state: Tensor, shape: str) -> list[dict[str, Any]]:
    squares = state.double().flatten(1).square().mean(1).sqrt()
    name = engine.run.recipe.name
    return [row("state_norm.rms", name, float(squares.square().mean().sqrt()), "", shape=shape,
                low=float(squares.min()), high=float(squares.max())),
            row("state_norm.largest", name, float(state.abs().max()), "", shape=shape)]
