"""The states of all layers of a model, for a batch of sequences: selected, joined, saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hinny.errors import RequestError
from hinny.state.layers import KVState, LayerState, SSMState, equal, longest


@dataclass
class State:
    """The states of all layers of a model, for a batch of sequences."""

    layers: list[LayerState]
    positions: Tensor
    """(b,) int64 on the CPU: tokens seen so far by each."""

    @property
    def position(self) -> int:
        """Tokens seen so far by every sequence; ValueError where they differ."""
        if not equal(self.positions):
            raise ValueError(f"the rows stand at {_places(self.positions)}; read `positions`, which has all of them.")
        return longest(self.positions)

    def advance(self, tokens: int) -> None:
        """Say that every sequence has seen so many more tokens; the layers' states are updated by the layers."""
        self.positions = self.positions + tokens

    def bytes(self) -> int:
        """Memory that the sequences need, without the spare room of buffers."""
        return sum(layer.bytes(int(self.positions.sum())) for layer in self._held())

    def reserved_bytes(self) -> int:
        """Memory held, with spare room."""
        return sum(layer.bytes(None) for layer in self._held())

    def reserve(self, tokens: int) -> None:
        """Let the next forward pass make room for so many tokens at once; without, full buffers grow piece by piece."""
        for layer in self._held():
            layer.reserve(tokens)

    def fork(self) -> State:
        """An independent copy, without spare room: both may go on differently."""
        return self.select(torch.arange(len(self.positions)))

    def select(self, rows: Tensor) -> State:
        """A copy that holds the sequences `rows` (int64), in that order; repeats are allowed."""
        positions = self.positions[rows.cpu()]
        return State([None if layer is None else layer.select(rows, positions) for layer in self.layers], positions)

    def save(self, path: Path) -> None:
        """Write all tensors to a safetensors file."""
        tensors = {f"{i}.{name}": tensor.contiguous() for i, layer in enumerate(self.layers) if layer is not None
                   for name, tensor in layer.tensors().items()}
        places = (self.positions[:1] if equal(self.positions) else self.positions).tolist()
        save_file(tensors, path, metadata={"position": " ".join(map(str, places)), "layers": str(len(self.layers))})

    def load(self, path: Path) -> None:
        """Replace this state by what `save` wrote of one of the same model and batch, on this state's device.

        RequestError, and this state as it was, for a file that is absent, foreign, or of another model or batch.
        """
        found, places, n_layers = _read(path)
        if n_layers != len(self.layers):
            raise RequestError(f"{path}: {n_layers} layers, this model has {len(self.layers)}; the state was saved by "
                               "another model.")
        if len(places) not in (1, len(self.positions)):
            raise RequestError(f"{path}: {len(places)} rows, this state has {len(self.positions)}; the state was saved "
                               "for another batch size.")
        positions = places.expand(len(self.positions)).clone()
        loaded: list[LayerState] = []
        for i, layer in enumerate(self.layers):
            parts = {}
            for name, mine in ({} if layer is None else layer.tensors()).items():
                part = found.pop(f"{i}.{name}", None)
                if part is None:
                    raise RequestError(f"{path}: no {name} for layer {i}; the state was saved by another model.")
                assert layer is not None
                if not layer.fits(name, part, longest(positions)):
                    raise RequestError(f"{path}: {name} of layer {i} has shape {tuple(part.shape)} at "
                                       f"{_places(positions)}, here it has {tuple(mine.shape)} at "
                                       f"{_places(self.positions)}; the state was saved by another model or for "
                                       "another batch size.")
                parts[name] = part.to(mine.device)
            kind = cast(Any, type(layer))
            loaded.append(None if layer is None else kind.join([kind(**parts)], positions))
        if found:
            raise RequestError(f"{path}: {len(found)} tensors too many ({next(iter(found))} …); the state was saved "
                               "by another model.")
        self.layers, self.positions = loaded, positions

    def _held(self) -> list[KVState | SSMState]:
        return [layer for layer in self.layers if layer is not None]


def join(states: Sequence[State]) -> State:
    """One batch of the sequences of `states`, in order; a copy, without spare room. All are of one model.

    Keys and values take the room of the longest sequence in every row; what a Mamba layer holds has no length.
    """
    if not states or len({len(state.layers) for state in states}) > 1:
        raise ValueError(f"join: states of {[len(state.layers) for state in states]} layers; give at least one, and "
                         "all of one model.")
    positions = torch.cat([state.positions for state in states])
    return State([None if parts[0] is None else cast(Any, type(parts[0])).join(parts, positions)
                  for parts in zip(*(state.layers for state in states), strict=True)], positions)


def _places(positions: Tensor) -> str:
    """Where rows stand, in words: "position 5", "positions 3 to 9"."""
    low, high = int(positions.min()), int(positions.max())
    return f"position {low}" if low == high else f"positions {low} to {high}"


def _read(path: Path) -> tuple[dict[str, Tensor], Tensor, int]:
    """Tensors by name, positions (one if all are equal) and number of layers of a file that `State.save` wrote."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found, torch.tensor([int(place) for place in facts["position"].split()]), int(facts["layers"])
    except OSError as fault:
        raise RequestError(f"{path}: the state cannot be read: {fault.strerror or fault}.") from None
    except (SafetensorError, KeyError, ValueError) as fault:
        raise RequestError(f"{path}: not a file of State.save, or a damaged one: {fault}.") from None
