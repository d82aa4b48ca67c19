"""From what the head reads to the figures of the answers, without ever holding vocabulary x length numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hinny.infer.head import logits
from hinny.infer.reading.requests import Generate, Score, Scored
from hinny.infer.reading.trie import Request, Want, wanted

LOGITS = 1 << 26
"""Numbers of one piece of logits: 256 MiB in float32."""


class Answers:
    """The figures of all requests, filled in while the model reads.

    A log-probability is normalised over the model's whole output, padding of the vocabulary included, as the loss in
    training is; the likeliest token is one of the tokenizer's words, as in generation.
    """

    def __init__(self, requests: Sequence[Request], output: Tensor, n_words: int) -> None:
        """output (v d): the head's matrix; n_words: how many of its rows are words."""
        self.requests, self.output, self.n_words = requests, output, n_words
        self.first: dict[int, int] = {}
        """Generate → its first token, once the prompt is read."""
        self.scored: dict[int, Scored] = {}
        self._missing = {i: end - begin for i, (begin, end) in enumerate(map(wanted, requests))}
        self._parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, hidden: Tensor, rows: Sequence[tuple[int, int, Sequence[Want]]]) -> None:
        """Take what is wanted of hidden (b t d).

        rows: for each row the position that its column 0 stands for, the columns that count, and the wants of its node.
        """
        places: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        parts: list[Want] = []
        for row, (start, columns, wants) in enumerate(rows):
            for want in wants:
                begin, end = max(want.begin, start), min(want.end, start + columns)
                if begin < end:
                    parts.append(Want(want.request, begin, end))
                    places.append(np.arange(begin, end) - start + row * hidden.shape[1])
                    targets.append(self._targets(want.request, begin, end))
        if not parts:
            return
        # choices of one question ask about the same places
        unique, index = np.unique(np.concatenate(places), return_inverse=True)
        chances, likeliest = self._figures(hidden.flatten(0, 1), unique, index, np.concatenate(targets))
        used = 0
        for part in parts:
            n = part.end - part.begin
            self._fill(part, chances[used:used + n], likeliest[used:used + n])
            used += n

    def _targets(self, request: int, begin: int, end: int) -> np.ndarray:
        """The true tokens behind positions begin .. end - 1; any for a prompt, behind which nothing is known."""
        asked = self.requests[request]
        if isinstance(asked, Generate):
            return np.zeros(1, dtype=np.int64)
        start = len(asked.context) - 1
        return np.array(asked.continuation[begin - start:end - start], dtype=np.int64)

    def _figures(self, hidden: Tensor, places: np.ndarray, index: np.ndarray,
                 targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """hidden (n d), places (u,) in it, index (m,) into places, targets (m,) → log-probabilities, likeliest (m,)."""
        order = np.argsort(index, kind="stable")
        bounds = np.searchsorted(index[order], np.arange(len(places) + 1))
        size = max(1, LOGITS // len(self.output))
        chances, likeliest = np.empty(len(index)), np.empty(len(index), dtype=np.int64)
        for low in range(0, len(places), size):
            high = min(low + size, len(places))
            mine = order[bounds[low]:bounds[high]]
            at, of, target = (torch.from_numpy(x).to(hidden.device)
                              for x in (places[low:high], index[mine] - low, targets[mine]))
            found = logits(hidden[at], self.output)
            best = found[:, :self.n_words].argmax(dim=-1)
            chance = found[of, target] - found.logsumexp(dim=-1)[of]
            chances[mine], likeliest[mine] = chance.double().cpu().numpy(), best[of].cpu().numpy()
        return chances, likeliest

    def _fill(self, part: Want, chances: np.ndarray, likeliest: np.ndarray) -> None:
        asked = self.requests[part.request]
        self._missing[part.request] -= part.end - part.begin
        if isinstance(asked, Generate):
            self.first[part.request] = int(likeliest[0])
            return
        n, start = len(asked.continuation), len(asked.context) - 1
        held = self._parts.setdefault(part.request, (np.empty(n), np.empty(n, dtype=np.int64)))
        held[0][part.begin - start:part.end - start] = chances
        held[1][part.begin - start:part.end - start] = likeliest
        if not self._missing[part.request]:
            del self._parts[part.request]
            self.scored[part.request] = Scored(*held, greedy=tuple(held[1].tolist()) == asked.continuation)


def count(requests: Sequence[Request]) -> int:
    """Tokens of the requests, each by itself."""
    return sum(len(r.context) + len(r.continuation) if isinstance(r, Score) else len(r.prompt) for r in requests)
