"""Held-out loss: per token, per byte, and by how much of the document the model has seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hinny.data.folder import read_record, record_name
from hinny.data.mix import Batch, heldout_batches
from hinny.errors import ConfigError, DataError
from hinny.evals.options import EvalOptions
from hinny.infer.engine import Engine
from hinny.run import row

ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 16_384
"""Logits of so many tokens are made together: 1 GB at a vocabulary of 16K in float32."""


def held_out(engine: Engine, options: EvalOptions) -> list[dict[str, Any]]:
    """Loss on the first `windows` held-out windows of the training length, documents apart as in training.

    For each folder of a blend by itself; the rows' shapes then end in folder=PATH.
    The interval is 95 % over windows. Position counts tokens of the same document in front of the predicted one.
    DataError if the data folder is no longer the one that the run was trained on.
    """
    folders = list(engine.run.recipe.data.folders)
    if not folders:
        raise ConfigError(f"{engine.run.path}: its recipe names no data.path, so there is no held-out text.")
    for place, folder in enumerate(folders):
        check_data(engine, folder, place)
    return [found for folder in folders
            for found in _folder_rows(engine, options, folder, of_folder(folder, folders))]


def of_folder(path: str, folders: Sequence[str]) -> str:
    """What ends the shape of a row about one folder of a blend; nothing where there is one folder.

    A shape's items end at white space, so what is white in a path, and %, is told as in an address.
    """
    if len(folders) == 1:
        return ""
    return " folder=" + "".join(f"%{ord(c):02X}" if c.isspace() or c == "%" else c for c in str(path))


def _folder_rows(engine: Engine, options: EvalOptions, folder: str, suffix: str) -> list[dict[str, Any]]:
    """The rows of one folder; `suffix` ends their shapes."""
    recipe, most = engine.run.recipe, options.sizes().windows
    losses: list[np.ndarray] = []
    places: list[np.ndarray] = []
    windows: list[np.ndarray] = []
    n_bytes, rows_at_once = 0, max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // recipe.train.seq_len))
    for batch in heldout_batches(recipe.data.only(folder), seq_len=recipe.train.seq_len, windows=most,
                                 batch_size=rows_at_once, vocab_size=recipe.model.vocab_size):
        loss, place, window = _score(engine, batch)
        losses.append(loss)
        places.append(place)
        windows.append(window + (windows[-1][-1] + 1 if windows else 0))
        n_bytes += _bytes(engine, batch)
    loss, place, window = (np.concatenate(part) for part in (losses, places, windows))
    by_window = np.array([loss[window == w].mean() for w in np.unique(window)])
    half = 1.96 * by_window.std(ddof=1) / math.sqrt(len(by_window)) if len(by_window) > 1 else math.nan
    mean, name = float(loss.mean()), recipe.name
    per_byte = float(loss.sum()) / math.log(2) / n_bytes
    shape = f"windows={len(by_window)} length={recipe.train.seq_len}{suffix}"
    low, high = (mean - half, mean + half) if half == half else (None, None)
    rows = [row("held_out_loss", name, mean, "nats/token", shape=shape, low=low, high=high),
            row("bits_per_byte", name, per_byte, "bits/byte", shape=shape)]
    edges = [0, 4, *(2 ** i for i in range(3, 40) if 2 ** i < recipe.train.seq_len), recipe.train.seq_len]
    for first, end in itertools.pairwise(edges):
        inside = loss[(place >= first) & (place < end)]
        if inside.size:
            rows.append(row("loss_by_position", name, float(inside.mean()), "nats/token",
                            shape=f"position={first}-{end - 1}{suffix}"))
    return rows


def check_data(engine: Engine, path: str, place: int) -> None:
    """The folder at `path` may have been prepared anew since; the run keeps the data.json that it was trained with."""
    now, then = read_record(path)["fingerprint"], read_record(engine.run.text_home, place)["fingerprint"]
    if now != then:
        kept = engine.run.text_home / record_name(place)
        raise DataError(f"{path} holds other data than {engine.run.text_home} was trained on: fingerprint {now[:12]}, "
                        f"but {kept} says {then[:12]}. Prepare the folder as it was ({kept.name} of the run has the "
                        "command).")


def _score(engine: Engine, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, place in the document and row of each counted target of the batch."""
    tokens, targets, mask = (torch.from_numpy(a) for a in (batch.tokens, batch.targets, batch.mask))
    segments = None if batch.segments is None else torch.from_numpy(batch.segments).to(engine.device)
    with torch.no_grad():
        logits = engine.model(tokens.to(engine.device), segments=segments)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(engine.device), reduction="none")
    row_of = np.arange(len(tokens))[:, None].repeat(tokens.shape[1], axis=1)
    return loss.cpu().view_as(tokens)[mask].double().numpy(), _places(batch)[batch.mask], row_of[batch.mask]


def _places(batch: Batch) -> np.ndarray:
    """How many tokens of its document stand in front of each token (b t), within its row."""
    count = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)
    if batch.segments is None:
        return count
    opens = np.diff(batch.segments, axis=1, prepend=-1) != 0
    return count - np.maximum.accumulate(np.where(opens, count, 0), axis=1)


def _bytes(engine: Engine, batch: Batch) -> int:
    """Bytes of text behind the counted targets; the end-of-document token has none."""
    return sum(engine.tokenizer.n_bytes(ids[k].tolist()) for ids, k in zip(batch.targets, batch.mask, strict=True))
