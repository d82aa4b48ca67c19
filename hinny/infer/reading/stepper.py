"""Greedy decoding of a batch of sequences of any lengths, a token for each row at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from hinny.infer.head import logits
from hinny.infer.reading.fixed import FixedBatch
from hinny.model import Model
from hinny.state import State


class Stepper:
    """Takes `state` over and goes on from it: on a GPU as a CUDA graph over fixed buffers (`fixed`).

    There a stepper pays for itself by some tens of tokens: its first steps are not recorded, and it copies the state.
    """

    def __init__(self, model: Model, state: State, vocab_size: int, room: int = 0) -> None:
        """vocab_size: the words that may be drawn, the first ones of the model's. room: tokens to come, if known: then
        nothing has to grow. `state` must not be used afterwards; `self.state` is what became of it.
        """
        words = len(model.output_weight)
        if not 0 < vocab_size <= words:
            raise ValueError(f"vocab_size is {vocab_size}; the model has {words} words, so it must be 1 to {words}.")
        if not len(state.positions):
            raise ValueError("the state has no rows; a step needs at least one.")
        self._model, self._words, self._rows = model, model.output_weight[:vocab_size], len(state.positions)
        self._state, self._fixed = state, None
        if self._words.is_cuda:
            with torch.no_grad():
                self._fixed = FixedBatch(model, state, self._words, room, recorded=True)
        else:
            state.reserve(room)

    @property
    def state(self) -> State:
        """The sequences as they stand. Valid until the next step; `fork` or `select` of it is a copy that stays."""
        return self._state if self._fixed is None else self._fixed.state

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens (b,) int64, the newest of each row → the likeliest ones (b,) behind them, on the model's device."""
        if tokens.shape != (self._rows,):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; they must be ({self._rows},), one a row.")
        tokens = tokens.to(self._words.device)
        if self._fixed is not None:
            return self._fixed.step(tokens)
        hidden = self._model.hidden(tokens[:, None], self._state)[:, -1]
        return logits(hidden, self._words).argmax(-1)

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Go on with `rows` (int64) alone, in that order, and forget the others; none twice, and at least one."""
        rows = rows.cpu()
        if not len(rows) or len(rows.unique()) < len(rows) or rows.min() < 0 or rows.max() >= self._rows:
            raise ValueError(f"rows are {rows.tolist()}; they must be one or more of 0 to {self._rows - 1}, no two "
                             "the same.")
        self._rows = len(rows)
        if self._fixed is None:
            self._state = self._state.select(rows)
        else:
            self._fixed.keep(rows)
