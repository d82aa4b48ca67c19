"""Nodes of a trie that are read together, each from its own position, without padding in any state that is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hinny.infer.reading.answers import Answers
from hinny.infer.reading.requests import Usage
from hinny.infer.reading.trie import Node, Trie
from hinny.model import Model
from hinny.state import State, join

ALONE = 512
"""So many tokens of one sequence keep a device busy: they are read in one go, and by several sequences together only
where these are at the same position and equally long, so that attention needs no mask and states need no copies."""
MASK = 1 << 25
"""Queries times keys of rows at different positions in one pass of a model with attention, which may make a mask."""


@dataclass(frozen=True)
class Limits:
    """What may be used at once."""

    budget: int
    """Bytes of states."""
    tokens: int
    """Tokens of one forward pass of several sequences."""
    piece: int
    """Tokens of one sequence in one forward pass."""
    attention: bool
    """Whether the model has layers that look back at every token."""

    def rows(self, length: int, nearest: int, furthest: int) -> int:
        """How many sequences at positions `nearest` to `furthest` may read `length` tokens each in one pass."""
        most = self.tokens // length
        if self.attention and nearest < furthest:
            most = min(most, MASK // (length * (furthest + length)))
        return max(1, most)


class Batch:
    """Some nodes and the states that they begin with; None before the first token."""

    def __init__(self, model: Model, trie: Trie, answers: Answers, usage: Usage, nodes: list[Node],
                 state: State | None) -> None:
        """`state` has one row for each node, and is used up."""
        self.model, self.trie, self.answers, self.usage = model, trie, answers, usage
        self.nodes, self.state = nodes, state
        self.done = [node.begin for node in nodes]
        """Up to where each is read."""

    def read(self, limits: Limits) -> None:
        """Read every node to its end; `nodes` and the rows of `state` are then in another order."""
        self._stride(lambda left: left if left >= ALONE else 0, limits)
        bit = ALONE // 2
        while bit:
            self._stride(bit.__and__, limits)
            bit //= 2
        assert self.done == [node.end for node in self.nodes]

    def read_padded(self, piece: int) -> None:
        """Read nodes whose states nobody needs: equal pieces while all go on, then one padded on its right."""
        longest, shortest = (f(node.length for node in self.nodes) for f in (max, min))
        if self.state is None and longest > piece:
            self.state = self.model.init_state(len(self.nodes))
        if self.state is not None:
            self.state.reserve(longest)
        rows = list(range(len(self.nodes)))
        whole = (longest - 1) // piece
        assert shortest > whole * piece
        for _ in range(whole):
            self._forward(rows, self.state, piece)
        self._forward(rows, self.state, longest - whole * piece)

    def _stride(self, share: Callable[[int], int], limits: Limits) -> None:
        """Read from each row the part of what is left that `share` tells, rows with equal parts together."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (node, done) in enumerate(zip(self.nodes, self.done, strict=True)):
            part = share(node.end - done)
            alike.setdefault((part, done if part >= ALONE else 0), []).append(i)
        still = [i for (part, _), rows in alike.items() if not part for i in rows]
        groups = []
        for (part, _), rows in alike.items():
            if part:
                places = [self.done[i] for i in rows]
                most = limits.rows(min(part, limits.piece), min(places), max(places))
                groups += [(part, rows[i:i + most]) for i in range(0, len(rows), most)]
        if not groups:
            return
        order, states = list(still), [self._rows(still)] if still else []
        for part, rows in groups:
            state = self._rows(rows)
            state.reserve(part)
            for begin in range(0, part, limits.piece):
                self._forward(rows, state, min(limits.piece, part - begin))
            states.append(state)
            order += rows
        self.state = join(states) if len(states) > 1 else states[0]
        self.nodes, self.done = [self.nodes[i] for i in order], [self.done[i] for i in order]

    def _rows(self, rows: list[int]) -> State:
        """The states of `rows`: a copy, but for all of them."""
        if self.state is None:
            return self.model.init_state(len(rows))
        return self.state if rows == list(range(len(self.nodes))) else self.state.select(torch.tensor(rows))

    def _forward(self, rows: list[int], state: State | None, length: int) -> None:
        """Give `rows`, whose states are in `state`, their next `length` tokens, and padding where they have fewer."""
        given = np.zeros((len(rows), length), dtype=np.int64)
        marks = []
        for row, i in enumerate(rows):
            node, begin = self.nodes[i], self.done[i]
            end = self.done[i] = min(begin + length, node.end)
            given[row, :end - begin] = self.trie.tokens(node, begin, end)
            marks.append((begin, end - begin, node.wants))
        read = sum(columns for _, columns, _ in marks)
        self.usage.prefilled += read
        self.usage.padded += given.size - read
        device = self.model.output_weight.device
        self.answers.read(self.model.hidden(torch.from_numpy(given).to(device), state), marks)
