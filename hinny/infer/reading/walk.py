"""The way through a trie: what is read when, in which batches, and which states are held meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from hinny.infer.reading.answers import Answers
from hinny.infer.reading.batch import ALONE, Batch, Limits
from hinny.infer.reading.requests import Generate, Generated, Progress, Scored, Usage
from hinny.infer.reading.sizes import row_size
from hinny.infer.reading.trie import Node, Request, Trie
from hinny.infer.reading.writing import Group, Row, joined, write
from hinny.infer.reading.written import Writer
from hinny.model import Model
from hinny.state import State
from hinny.tokenizer import Tokenizer

ROWS = 1024
"""Sequences read or continued together at most: more do not make a token cheaper."""


@dataclass
class Frame:
    """Nodes behind one state, still to be read, each with its row of it."""

    state: State | None
    """None before the first token."""
    bytes: int
    ends: list[tuple[Node, int]]
    """Nodes that nothing follows; the next ones to read stand last."""
    kept: list[tuple[Node, int]]


class Walk:
    """One call: answers to `requests`."""

    def __init__(self, model: Model, tokenizer: Tokenizer, requests: Sequence[Request], limits: Limits, usage: Usage,
                 progress: Progress | None) -> None:
        self.model, self.tokenizer, self.requests = model, tokenizer, requests
        self.limits, self.usage, self.progress = limits, usage, progress
        self.trie, self.size = Trie(requests), row_size(model)
        self.n_words = min(tokenizer.vocab_size, model.config.vocab_size)
        self.answers = Answers(requests, model.output_weight, self.n_words)
        self.written: dict[int, Generated] = {}
        self.frames: list[Frame] = []
        self.waiting: list[Group] = []

    def run(self) -> list[Scored | Generated]:
        """Read everything, write everything; the answers in the order of the requests."""
        self._open(None, 0, [(child, 0) for child in self.trie.root.children])
        while self.frames or self.waiting:
            if self.waiting and self._enough():
                self._write()
            elif self.frames[-1].ends:
                self._read_ends(self.frames[-1])
            elif self.frames[-1].kept:
                self._read_kept(self.frames[-1])
            else:
                self.frames.pop()
                continue
            self._finish_short()
            if self.progress is not None:
                self.progress(len(self.answers.scored) + len(self.written), len(self.requests))
        return [self.written[i] if isinstance(request, Generate) else self.answers.scored[i]
                for i, request in enumerate(self.requests)]

    def _open(self, state: State | None, size: int, tasks: list[tuple[Node, int]]) -> None:
        """Have `tasks` read next. Those that fit one batch come to stand side by side."""
        def order(task: tuple[Node, int]) -> tuple[int, int]:
            node, _ = task
            # long ones share a pass only with those at the same position
            return (node.begin, node.length) if node.length >= ALONE else (-1, node.length)

        tasks = sorted(tasks, key=order)
        self.frames.append(Frame(state, size, ends=[t for t in tasks if not t[0].kept],
                                 kept=[t for t in tasks if t[0].kept]))

    def _free(self) -> int:
        """Bytes left of the budget."""
        held = sum(frame.bytes for frame in self.frames) + self._waiting_bytes()
        return max(0, self.limits.budget - held)

    def _take(self, tasks: list[tuple[Node, int]], room: int, padded: bool) -> list[tuple[Node, int]]:
        """Take off the end of `tasks` at least one, and more while their states fit `room`; `padded`: also only
        while they are alike and one pass may have them.
        """
        first, taken = tasks[-1][0], [tasks.pop()]
        longest, nearest, furthest = min(first.length, self.limits.piece), first.begin, first.begin
        end = first.end
        while tasks and len(taken) < ROWS:
            node = tasks[-1][0]
            end = max(end, node.end)
            # every row takes the room of the longest
            if (len(taken) + 1) * self.size.at(end) > room:
                break
            nearest, furthest = min(nearest, node.begin), max(furthest, node.begin)
            if padded and (len(taken) >= self.limits.rows(longest, nearest, furthest)
                           or not _alike(first, node, self.limits.piece)):
                break
            taken.append(tasks.pop())
        return taken

    def _read_ends(self, frame: Frame) -> None:
        """Read a batch of nodes that nothing follows, padded on the right."""
        taken = self._take(frame.ends, self._free(), padded=True)
        batch = self._batch(frame, taken)
        batch.read_padded(self.limits.piece)

    def _read_kept(self, frame: Frame) -> None:
        """Read a batch of nodes whose states are needed, and open what lies behind them.

        A quarter of what is free is for their states, as much for the copies that are made between two pieces; half is
        left for what lies deeper.
        """
        taken = self._take(frame.kept, self._free() // 4, padded=False)
        batch = self._batch(frame, taken)
        batch.read(self.limits)
        assert batch.state is not None
        rows: list[tuple[int, Row]] = []
        for i, node in enumerate(batch.nodes):
            if node.writers and (row := self._begin(node)) is not None:
                rows.append((i, row))
        parents = [i for i, node in enumerate(batch.nodes) if node.children]
        if rows:
            self.waiting.append(Group(_rows(batch.state, [i for i, _ in rows], last=not parents),
                                      [row for _, row in rows]))
        if parents:
            size = len(parents) * self.size.at(max(batch.nodes[i].end for i in parents))
            self._open(_rows(batch.state, parents, last=True), size,
                       [(child, row) for row, i in enumerate(parents) for child in batch.nodes[i].children])

    def _batch(self, frame: Frame, tasks: list[tuple[Node, int]]) -> Batch:
        """The tasks' nodes, with a copy of the state that each begins with."""
        nodes = [node for node, _ in tasks]
        state = None
        if frame.state is not None:
            used_up = not frame.ends and not frame.kept
            state = _rows(frame.state, [row for _, row in tasks], last=used_up)
            if used_up:
                frame.state, frame.bytes = None, 0
        return Batch(self.model, self.trie, self.answers, self.usage, nodes, state)

    def _begin(self, node: Node) -> Row | None:
        """Give those who write behind a prompt the first token, which reading it told; None if it was the last."""
        writers = [Writer(cast(Generate, self.requests[i]), self.tokenizer) for i in node.writers]
        more = max(writer.request.max_tokens for writer in writers)
        row = Row(tuple(node.writers), writers, token=-1, bytes=self.size.at(node.end + more))
        tokens = [self.answers.first.pop(i) for i in node.writers]
        self.usage.decoded += 1
        if row.take(tokens[0]):
            self._ended(row)
            return None
        return row

    def _finish_short(self) -> None:
        """Answer the requests of one token whose prompts have been read."""
        prompts = set()
        for i, token in self.answers.first.items():
            request = cast(Generate, self.requests[i])
            writer = Writer(request, self.tokenizer)
            writer.take(token)
            self.written[i] = writer.answer
            prompts.add(request.prompt)
        self.usage.decoded += len(prompts)
        self.answers.first.clear()

    def _ended(self, row: Row) -> None:
        for i, writer in zip(row.requests, row.writers, strict=True):
            self.written[i] = writer.answer

    def _enough(self) -> bool:
        """Whether the prompts that wait should be continued now."""
        rows = sum(len(group.rows) for group in self.waiting)
        return not self.frames or rows >= ROWS or 3 * self._waiting_bytes() > self.limits.budget

    def _waiting_bytes(self) -> int:
        rows = [row for group in self.waiting for row in group.rows]
        return len(rows) * max((row.bytes for row in rows), default=0)

    def _write(self) -> None:
        """Continue the waiting prompts, until half have ended if more are to come."""
        group = joined(self.waiting)
        self.waiting = []
        least = len(group.rows) // 2 if self.frames else 0
        rest = write(self.model, self.n_words, group, self.usage, self._ended, least)
        if rest is not None:
            self.waiting.append(rest)


def _rows(state: State, rows: list[int], last: bool) -> State:
    """The states of `rows`: a copy, but for all of a state that nobody else will use (`last`)."""
    if last and rows == list(range(len(state.positions))):
        return state
    return state.select(torch.tensor(rows))


def _alike(a: Node, b: Node, piece: int) -> bool:
    """Whether padding to the longer's length costs little, and is none but in the last piece."""
    if (a.length - 1) // piece != (b.length - 1) // piece:
        return False
    longer, shorter = max(a.length, b.length), min(a.length, b.length)
    return longer <= max(2 * shorter, 64) and (longer < ALONE or a.begin == b.begin)
