"""Choosing the next tokens of many continuations at once, each by its own sampling.

    raw logits → penalties → temperature → top-k → top-p → min-p → a draw

The order and the meaning are those of transformers' processors: repetition penalty first, then OpenAI's presence and
frequency penalties, then the filters, each on what the one before it left. Tokens as likely as the last one that a
filter keeps stay too. A draw looks along the kept tokens, in the order of their ids, for the one at which a share u of
their mass is reached. Masses are whole numbers, whose sums do not depend on the order in which a device adds them:
a row gives the same token alone and among others.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from secrets import randbits

import numpy as np
import torch
from torch import Tensor

from hinny import ops
from hinny.errors import RequestError
from hinny.infer.request import Choice
from hinny.infer.sampling import Sampling

AT_ONCE = 1 << 22
"""Logits that are drawn from, or told of, at once: bounds the memory this takes (about 40 bytes each)."""


class LogitsError(RequestError):
    """Logits from which no token can be chosen; `rows` says which. Those of the other rows are sound."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        super().__init__(f"the model's logits are not finite in row {', '.join(map(str, rows))}: a NaN or an infinity, "
                         "so no token can be chosen. Its weights or its numbers' type are at fault; try float32.")


class Chooser:
    """What one continuation needs between its tokens: its draws and what it has written. `written` changes it."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], index: int) -> None:
        """`index`: which of the request's continuations, for each has draws of its own."""
        self.sampling = sampling
        self.plain = sampling.greedy
        """Whether the likeliest token is taken as it is."""
        self.penalised = (sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
                          or sampling.repetition_penalty != 1)
        self._stream = f"{randbits(128) if sampling.seed is None else sampling.seed} {index}"
        self._position = 0
        # arrays, for numpy reads them without a look at each number
        self._seen, self._times = array("q"), array("q")
        self._place: dict[int, int] = {}
        if sampling.repetition_penalty != 1:
            for token in prompt:
                self._see(token)

    def written(self, token: int) -> None:
        """One more token of the continuation."""
        self._position += 1
        if self.penalised:
            self._times[self._see(token)] += 1

    @property
    def draw(self) -> float:
        """The number in [0, 1) by which the next token is drawn: of seed, index and position alone."""
        digest = blake2b(f"{self._stream} {self._position}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / (1 << 53)

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that have penalties and how often each was written (0: in the prompt alone), int64."""
        return np.array(self._seen, np.int64), np.array(self._times, np.int64)

    def _see(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._seen))
        if place == len(self._seen):
            self._seen.append(token)
            self._times.append(0)
        return place


def choose(logits: Tensor, choosers: Sequence[Chooser], logprobs: Sequence[int | None]) -> list[Choice]:
    """The next token of each row of `logits` (r v), float32, on any device; it waits for the device once.

    choosers, logprobs: one a row; a chooser may stand in several, and none is changed. logprobs: None, or how many of
    the likeliest tokens are told, with log-probabilities of the logits as they came. Greedy rows take the lowest id of
    the likeliest tokens. LogitsError for rows with NaN, an infinity, or without a token to choose.
    """
    assert (len(choosers), len(logprobs)) == (len(logits),) * 2, (logits.shape, len(choosers), len(logprobs))
    if not choosers:
        return []
    best, tokens = ops.likeliest(logits)
    for part in _lots([i for i, chooser in enumerate(choosers) if not chooser.plain], logits):
        where = _moved(part, logits)
        best[where], tokens[where] = _drawn(logits[where], [choosers[i] for i in part])
    told = [i for i, n in enumerate(logprobs) if n is not None]
    most = min(max((n for n in logprobs if n is not None), default=0), logits.shape[1])
    found = [_likeliest(logits[where], tokens[where], most)
             for where in (_moved(part, logits) for part in _lots(told, logits))]
    parts = [best, tokens, *(torch.cat(kind) for kind in zip(*found, strict=True))]
    # ids are exact in float64, so that everything comes in one transfer
    numbers = torch.cat([part.double().flatten() for part in parts]).tolist()
    return _choices(numbers, len(choosers), told, logprobs)


def _choices(numbers: list[float], n: int, told: list[int], logprobs: Sequence[int | None]) -> list[Choice]:
    """Of what came from the device: n best logits, n tokens, and per told row logprob, likeliest tokens and theirs."""
    bad = tuple(i for i, best in enumerate(numbers[:n]) if not abs(best) < float("inf"))
    if bad:
        raise LogitsError(bad)
    choices = [Choice(int(token)) for token in numbers[n:2 * n]]
    rest = numbers[2 * n:]
    most = (len(rest) - len(told)) // (2 * max(1, len(told)))
    ids, values = rest[len(told):len(told) * (1 + most)], rest[len(told) * (1 + most):]
    for k, i in enumerate(told):
        some = slice(k * most, k * most + min(logprobs[i] or 0, most))
        choices[i] = Choice(choices[i].token, rest[k],
                            tuple((int(t), p) for t, p in zip(ids[some], values[some], strict=True)))
    return choices


def _lots(rows: list[int], logits: Tensor) -> list[list[int]]:
    """`rows` in lots of which there is memory to think about at once."""
    n = max(1, AT_ONCE // logits.shape[1])
    return [rows[i:i + n] for i in range(0, len(rows), n)]


def _moved(numbers: Sequence[float] | np.ndarray, like: Tensor) -> Tensor:
    """Numbers on the device of `like`, without waiting for it."""
    return torch.as_tensor(numbers).to(like.device, non_blocking=True)


def _drawn(logits: Tensor, choosers: Sequence[Chooser]) -> tuple[Tensor, Tensor]:
    """Largest logit behind penalties and the token, both (r), of rows that are not plain. logits (r v): changed."""
    if any(chooser.penalised for chooser in choosers):
        _penalise(logits, choosers)
    best, tokens = ops.likeliest(logits)
    options = [chooser.sampling for chooser in choosers]
    if not any(o.temperature for o in options):
        return best, tokens
    heat = _moved(np.array([o.temperature or 1.0 for o in options]), logits)[:, None]
    # a NaN has no whole number; its row is refused for its `best`
    share = ((logits.double() - best[:, None]) / heat).exp_().nan_to_num_(0.0)
    scale = 1 << (62 - logits.shape[1].bit_length())
    mass = _kept((share * scale).round_().long(), options, scale)
    sums = mass.cumsum(-1)
    draws = _moved(np.array([chooser.draw for chooser in choosers]), logits)[:, None]
    # less than the total however it is rounded, for a draw is 1 - 2^-53 at most
    reached = (draws * sums[:, -1:].double()).long()
    drawn = torch.searchsorted(sums, reached, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    hot = _moved(np.array([o.temperature > 0 for o in options]), logits)
    return best, torch.where(hot, drawn, tokens)


def _penalise(logits: Tensor, choosers: Sequence[Chooser]) -> None:
    """Changes logits (r v) at the tokens that each row has seen."""
    rows, tokens, factors, taken = [], [], [], []
    for i, chooser in enumerate(choosers):
        if not chooser.penalised:
            continue
        token, often = chooser.seen
        # an id of the prompt that no text has is not chosen either
        token, often = token[token < logits.shape[1]], often[token < logits.shape[1]]
        rows.append(np.full(len(token), i))
        tokens.append(token)
        factors.append(np.full(len(token), chooser.sampling.repetition_penalty, np.float32))
        taken.append((often * chooser.sampling.frequency_penalty
                      + (often > 0) * chooser.sampling.presence_penalty).astype(np.float32))
    at = _moved(np.concatenate(rows), logits), _moved(np.concatenate(tokens), logits)
    factor, less = _moved(np.concatenate(factors), logits), _moved(np.concatenate(taken), logits)
    logit = logits[at]
    logits[at] = torch.where(logit < 0, logit * factor, logit / factor) - less


def _kept(mass: Tensor, options: Sequence[Sampling], scale: int) -> Tensor:
    """mass (r v), whole numbers with `scale` for the likeliest token, with 0 for tokens that a filter drops."""
    width = mass.shape[1]
    ks = [width if o.top_k is None else min(o.top_k, width) for o in options]
    widest = max((k for k, o in zip(ks, options, strict=True) if o.top_k is not None), default=0)
    if widest:
        place = _moved(np.array([min(k, widest) for k in ks]), mass)[:, None]
        cut = mass.topk(widest).values.gather(1, place - 1)
        whole = _moved(np.array([o.top_k is None for o in options]), mass)[:, None]
        mass = mass.where(whole | (mass >= cut), 0)
    if any(o.top_p is not None for o in options):
        ps = _moved(np.array([1.0 if o.top_p is None else o.top_p for o in options]), mass)[:, None]
        # behind a top-k the likeliest few are all there is, but for tokens as likely as the last of them
        few = all(o.top_k is not None for o in options)
        ordered = mass.topk(widest).values if few else mass.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        cut = ordered.where(before < ps * mass.sum(-1, keepdim=True).double(), scale).amin(-1, keepdim=True)
        mass = mass.where(mass >= cut, 0)
    if any(o.min_p is not None for o in options):
        least = _moved(np.array([o.min_p or 0.0 for o in options]), mass)[:, None]
        mass = mass.where(mass >= least * scale, 0)
    return mass


def _likeliest(logits: Tensor, tokens: Tensor, most: int) -> list[Tensor]:
    """Log-probabilities of `tokens` (r), then the `most` likeliest tokens and theirs, (r most) each."""
    norm = logits.double().logsumexp(-1, keepdim=True)
    # one whole number orders by logit and then by the lowest id: the bits of a float32 order as it does
    bits = (logits + 0.0).view(torch.int32).long()
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32
    ids = 0xFFFFFFFF - ((keys + (0xFFFFFFFF - torch.arange(logits.shape[1], device=keys.device)))
                        .topk(most).values & 0xFFFFFFFF)
    return [logits.gather(1, tokens[:, None]) - norm, ids, logits.gather(1, ids) - norm]
