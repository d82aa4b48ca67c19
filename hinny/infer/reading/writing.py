"""Many prompts continued at once, each at its own position; rows that have ended leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hinny.infer.reading.requests import Usage
from hinny.infer.reading.stepper import Stepper
from hinny.infer.reading.written import Writer
from hinny.model import Model
from hinny.state import State, join


@dataclass
class Row:
    """A prompt that is being continued, for one request or for several with this prompt."""

    requests: tuple[int, ...]
    writers: list[Writer]
    token: int
    """The last one written; the state has not seen it."""
    bytes: int
    """What its state takes when it has written all that it may."""

    @property
    def left(self) -> int:
        """Tokens that it may write yet."""
        return max(writer.request.max_tokens - len(writer.tokens) for writer in self.writers)

    def take(self, token: int) -> bool:
        """Write a token; whether all writers have ended."""
        self.token = token
        ended = [writer.take(token) for writer in self.writers]
        return all(ended)


@dataclass
class Group:
    """Rows, and the state of each after its prompt and all its tokens but the last."""

    state: State
    rows: list[Row]


def joined(groups: list[Group]) -> Group:
    """One group of the rows of all."""
    if len(groups) == 1:
        return groups[0]
    return Group(join([group.state for group in groups]), [row for group in groups for row in group.rows])


def write(model: Model, n_words: int, group: Group, usage: Usage, ended: Callable[[Row], None],
          least: int) -> Group | None:
    """Decode greedily while more than `least` rows are left; the rest, None if all have ended.

    The group's state is used up. `ended` is told each row when its writers have their answers.
    """
    rows: list[Row | None] = list(group.rows)
    left = len(rows)
    device = model.output_weight.device
    stepper = Stepper(model, group.state, n_words, room=max(row.left for row in group.rows))
    tokens = torch.tensor([row.token for row in group.rows], device=device)
    while left > least:
        tokens = stepper.step(tokens)
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row is None:
                usage.padded += 1
                continue
            usage.decoded += 1
            if row.take(token):
                ended(row)
                rows[i], left = None, left - 1
        # to drop rows copies the others' states: not for every one
        if left <= least or (len(rows) - left) * 4 >= len(rows):
            stay = [i for i, row in enumerate(rows) if row is not None]
            if not stay:
                return None
            if len(stay) < len(rows):
                index = torch.tensor(stay)
                stepper.keep(index)
                rows, tokens = [rows[i] for i in stay], tokens[index.to(device)]
    return Group(stepper.state, [row for row in rows if row is not None])
