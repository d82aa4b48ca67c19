"""Loss on the same held-out text at several lengths of context: read in windows that know nothing of each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from hinny.data.folder import DataFolder
from hinny.errors import ConfigError
from hinny.evals.options import EvalOptions
from hinny.evals.perplexity import check_data, of_folder
from hinny.evals.positions import SEQUENCES, loss_row
from hinny.infer.engine import Engine
from hinny.infer.reading.losses import TOKENS_AT_ONCE, losses
from hinny.infer.reading.requests import Progress


def window_loss(engine: Engine, options: EvalOptions, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Mean loss of the same tokens read in windows of each of `lengths`, nats/token: what longer context is worth.

    The text: `samples` sequences of the longest length, from the start of the held-out documents, joined in their
    order. Every other length must divide the longest, so that its windows cover the same targets; without lengths, the
    training length alone. The interval is 95 % over the sequences. For each folder of a blend by itself.
    ConfigError if the text is shorter than one sequence, DataError if the data are not the run's.
    """
    lengths = sorted(set(options.lengths or (engine.run.recipe.train.seq_len,)))
    longest = lengths[-1]
    if odd := [length for length in lengths if longest % length]:
        raise ConfigError(f"lengths: {odd[0]} does not divide {longest}, the longest: windows of both cannot cover the "
                          f"same text. Choose lengths that divide {longest}.")
    folders = list(engine.run.recipe.data.folders)
    if not folders:
        raise ConfigError(f"{engine.run.path}: its recipe names no data.path, so there is no held-out text.")
    rows = []
    for place, path in enumerate(folders):
        check_data(engine, path, place)
        shard = DataFolder(path, engine.run.recipe.model.vocab_size).shard("heldout")
        n = min(options.samples or SEQUENCES, (shard.n_tokens - 1) // longest)
        if n < 1:
            raise ConfigError(f"the held-out split of {path} has {shard.n_tokens} tokens, and a window of {longest} "
                              f"needs one more than that; give --lengths {max(shard.n_tokens - 1, 1)} or less, or "
                              "prepare more text.")
        tokens = shard.tokens(0, n * longest + 1)
        suffix = of_folder(path, folders)
        for length in lengths:
            # a window's last target is the first token of the next one
            texts = np.stack([tokens[i:i + length + 1] for i in range(0, n * longest, length)])
            loss = losses(engine.model, texts, options.batch_tokens or TOKENS_AT_ONCE, progress)
            rows.append(loss_row(engine, "window_loss", loss.reshape(n, longest), "nats/token",
                                 f"length={length} sequences={n}{suffix}"))
    return rows
