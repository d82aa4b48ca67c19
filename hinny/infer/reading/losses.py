"""The loss of every token of long texts, read piece by piece with the state carried on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hinny.infer.head import logits
from hinny.infer.reading.requests import Progress
from hinny.model import Model

TOKENS_AT_ONCE = 8192
LOGITS_AT_ONCE = 2**24
"""Numbers: 64 MiB in float32, whatever vocabulary and length are."""


@torch.no_grad()
def losses(model: Model, tokens: np.ndarray, at_once: int = TOKENS_AT_ONCE,
           progress: Progress | None = None) -> np.ndarray:
    """-log p of each token but the first after all before it in its sequence; tokens (b t) → (b t-1) float64, nats.

    Up to `at_once` tokens go through the model together, whole sequences or pieces of one, with the state carried from
    piece to piece; logits are made for as many positions as LOGITS_AT_ONCE allows. Neither changes the result.
    """
    b, t = tokens.shape
    rows = min(b, max(1, at_once // t))
    piece = max(1, at_once // rows)
    found = np.empty((b, t - 1))
    read = 0
    for first in range(0, b, rows):
        group = torch.from_numpy(np.ascontiguousarray(tokens[first:first + rows], dtype=np.int64))
        group = group.to(model.embedding.weight.device)
        state = model.init_state(len(group), capacity=t - 1)
        for start in range(0, t - 1, piece):
            stop = min(start + piece, t - 1)
            hidden = model.hidden(group[:, start:stop], state)
            loss = _loss(model, hidden.flatten(0, 1), group[:, start + 1:stop + 1].flatten())
            found[first:first + rows, start:stop] = loss.view(len(group), -1).double().cpu().numpy()
            read += len(group) * (stop - start)
            if progress is not None:
                progress(read, b * (t - 1))
    return found


def _loss(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden (n d), targets (n) → (n); a vocabulary's width of logits for a few positions at a time."""
    few = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = []
    for some, wanted in zip(hidden.split(few), targets.split(few), strict=True):
        parts.append(F.cross_entropy(logits(some, model.output_weight), wanted, reduction="none"))
    return torch.cat(parts)
