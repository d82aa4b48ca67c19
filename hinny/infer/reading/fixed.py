"""A decoding step in memory that stays where it is: what a CUDA graph can record, and the graph.

Each row's length is a number on the device, its next key is written there by index, and attention reads the whole
buffer up to that length: nothing in a step depends on a length that the host knows, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hinny.infer.head import logits
from hinny.model import Model
from hinny.state import KVState, LayerState, SSMState, State

ALIGNED = 64
"""Buffers have room for a multiple of so many keys."""
GROWTH = (256, 4096)
"""Full buffers get room for as many keys again, but at least and at most for so many."""
UNRECORDED = 8
"""Steps before a graph is made: recording costs about as much as some of them, and an answer may be short."""


class FixedKV(KVState):
    """Keys and values in a buffer that neither moves nor grows; whoever owns it says where each row's next key goes."""

    def __init__(self, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> None:
        """k, v (b capacity g p); before, after (b,) int64: the keys of each row before and after the coming step."""
        super().__init__(k, v, after)
        self._before, self._rows = before, torch.arange(len(k), device=k.device)

    @property
    def start(self) -> Tensor:
        """(b,): where each row's next token stands."""
        return self._before

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the step's key and value (b 1 g p) of each row into the buffers."""
        if k.dtype != self._k.dtype:
            raise ValueError(f"the state holds keys of {self._k.dtype} and the model makes {k.dtype}; decode under the "
                             "autocast, or with the weights, that the prompt was read with.")
        self._k[self._rows, self._before] = k[:, 0]
        self._v[self._rows, self._before] = v[:, 0]


class FixedSSM(SSMState):
    """States of Mamba layers that stay where they are: one pass over a state where a new one takes several."""

    def advance(self, mix: Callable[..., tuple[Tensor, Tensor, Tensor]], step: Callable[..., Tensor] | None,
                *tokens: Tensor) -> Tensor:
        """As for every state; in place."""
        if step is not None:
            return step(*tokens, self.ssm, self.conv, None)
        y, ssm, conv = mix(*tokens, self.ssm, self.conv)
        self.ssm.copy_(ssm)
        self.conv.copy_(conv)
        return y


class Buffers:
    """What a step reads and writes, for a number of rows."""

    def __init__(self, state: State, room: int, device: torch.device) -> None:
        """Moves the layers out of `state`, one by one; room for so many tokens more at least."""
        needed = int(state.positions.max()) + room
        self.capacity = needed + -needed % ALIGNED
        self.before = state.positions.to(device, copy=True)
        self.after, self.alive = torch.empty_like(self.before), torch.ones_like(self.before)
        self.tokens, self.next = torch.zeros_like(self.before), torch.zeros_like(self.before)
        layers: list[LayerState] = []
        for i in range(len(state.layers)):
            layers.append(self._copied(state.layers[i]))
            state.layers[i] = None  # its memory is free from here on: one layer alone is held twice
        self.state = State(layers, state.positions)

    def _copied(self, layer: LayerState) -> LayerState:
        if layer is None:
            return None
        if isinstance(layer, SSMState):
            conv, ssm = (t.clone(memory_format=torch.contiguous_format) for t in (layer.conv, layer.ssm))
            return FixedSSM(conv, ssm)
        buffers = []
        for held in (layer.k, layer.v):
            buffers.append(held.new_zeros(len(held), self.capacity, *held.shape[2:]))
            buffers[-1][:, :held.shape[1]] = held
        return FixedKV(buffers[0], buffers[1], self.before, self.after)

    def advance(self, model: Model, words: Tensor) -> None:
        """One step of all rows: `tokens` → `next`, the likeliest of `words` (v d)."""
        torch.add(self.before, 1, out=self.after)
        hidden = model.hidden(self.tokens[:, None], self.state)[:, -1]
        self.next.copy_(logits(hidden, words).argmax(-1))
        self.before.add_(self.alive)

    def seen(self, positions: Tensor) -> State:
        """The state of all rows, which stand at `positions`: views of the buffers."""
        longest, unequal = int(positions.max()), bool((positions != positions[0]).any())
        lengths = positions.to(self.before.device) if unequal else None
        return State([KVState(layer.k[:, :longest], layer.v[:, :longest], lengths) if isinstance(layer, KVState)
                      else layer for layer in self.state.layers], positions)


class FixedBatch:
    """Rows of a state in fixed buffers, some of which may be idle; a greedy token for each at every step.

    `recorded`: a step is a CUDA graph, recorded after a few that are not. Buffers that must grow, or that half of the
    rows have left, are made anew, and so is the graph.
    """

    def __init__(self, model: Model, state: State, words: Tensor, room: int, *, recorded: bool) -> None:
        """Empties `state`. words (v d): the rows of the head among which to choose; room: tokens to come, if known."""
        self._model, self._words, self._recorded = model, words, recorded
        self._buffers: Buffers
        self._slots: Tensor
        self._places: Tensor
        self._positions: Tensor
        self._graph: Recorded
        self._place(state, room)

    @property
    def state(self) -> State:
        """The rows' state, partly the buffers themselves: a copy of it outlasts the next step."""
        whole = self._whole()
        return whole if torch.equal(self._places, torch.arange(len(whole.positions))) else whole.select(self._places)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (b,), one for each row → the likeliest next ones (b,)."""
        longest = int(self._positions.max())
        if longest == self._buffers.capacity:
            state = self.state
            self._forget()
            self._place(state, min(max(longest, GROWTH[0]), GROWTH[1]))
        buffers, kind = self._buffers, tokens.device.type
        buffers.tokens[self._slots] = tokens
        # a weight that autocast kept in its cache would be gone when the graph runs
        with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind),
                            cache_enabled=False):
            if self._recorded:
                self._graph(lambda: buffers.advance(self._model, self._words))
            else:
                buffers.advance(self._model, self._words)
        self._positions = self._positions + 1
        return buffers.next[self._slots]

    def keep(self, rows: Tensor) -> None:
        """Go on with `rows` alone, in that order."""
        buffers = self._buffers
        if 2 * len(rows) <= len(buffers.before):
            kept = self._whole().select(self._places[rows])
            self._forget()
            self._place(kept, max(buffers.capacity - int(kept.positions.max()), 1))
            return
        self._places, self._positions = self._places[rows], self._positions[rows]
        self._slots = self._places.to(buffers.before.device)
        # an idle row writes its key over its first one, and so never comes to the buffer's end
        buffers.alive.zero_()
        buffers.alive[self._slots] = 1
        buffers.before.mul_(buffers.alive)

    def _whole(self) -> State:
        """The state of all rows, idle ones at position 0."""
        positions = torch.zeros(len(self._buffers.before), dtype=torch.int64, device="cpu")
        positions[self._places] = self._positions
        return self._buffers.seen(positions)

    def _forget(self) -> None:
        """Hold neither graph nor layers, so that what others do not hold is free before there are new ones."""
        self._graph = Recorded()
        self._buffers.state.layers.clear()

    def _place(self, state: State, room: int) -> None:
        """Move `state` into new buffers."""
        self._graph = Recorded()
        self._positions = state.positions
        self._places = torch.arange(len(state.positions), device="cpu")
        self._slots = self._places.to(self._words.device)
        self._buffers = Buffers(state, max(room, 1), self._words.device)


class Recorded:
    """Something with fixed inputs and outputs as a CUDA graph.

    The first calls run it as it is, which also compiles kernels and fills caches; the one after them records it.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], None]) -> None:
        """Run once; `run` is the same at every call, and not kept."""
        if self._graph is None and self._calls < UNRECORDED:
            self._calls += 1
            aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                run()
            now.wait_stream(aside)
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            self._graph = graph
        self._graph.replay()
