"""What a sequence carries from one piece to the next: keys and values, convolution inputs, SSM states.

A `State` is made by `Model.init_state`, updated by every forward pass that receives it, and independent of how the
sequence was cut: prefill in pieces of any size, then single tokens, gives the numbers of one full pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hinny.errors import RequestError


@dataclass
class SSMState:
    """State of a Mamba layer: size does not grow with the sequence."""

    conv: Tensor
    """(b ch w-1): the last inputs of the causal convolution, zeros before the start."""
    ssm: Tensor
    """(b h p n) for Mamba-2, (b d n) for Mamba-1; float32, or float64 in a float64 model."""

    def fits(self, name: str, tensor: Tensor, position: int) -> bool:
        """Whether `tensor` could be the one called `name`, of the same model and batch after `position` tokens."""
        return tensor.shape == self.tensors()[name].shape

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by argument name."""
        return {"conv": self.conv, "ssm": self.ssm}


class KVState:
    """Keys and values of an attention layer: grows by one row a token."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        """k, v (b s g p): what has been seen; s may be 0."""
        self._k, self._v, self.length = k, v, k.shape[1]

    @property
    def k(self) -> Tensor:
        """(b s g p), s = length."""
        return self._k[:, :self.length]

    @property
    def v(self) -> Tensor:
        """(b s g p), s = length."""
        return self._v[:, :self.length]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put t more keys and values (b t g p) behind the ones held."""
        self._k, self._v = _append(self._k, k, self.length), _append(self._v, v, self.length)
        self.length += k.shape[1]

    def fits(self, name: str, tensor: Tensor, position: int) -> bool:
        """Whether `tensor` could be the one called `name`, of the same model and batch after `position` tokens."""
        b, _, g, p = self.k.shape
        return tensor.shape == (b, position, g, p)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by argument name."""
        return {"k": self.k, "v": self.v}


def _append(buffer: Tensor, new: Tensor, used: int) -> Tensor:
    """A buffer with the `used` rows held, then `new`; without gradients it is the same one while there is room."""
    total = used + new.shape[1]
    if torch.is_grad_enabled() and (buffer.requires_grad or new.requires_grad):
        return torch.cat([buffer[:, :used], new.to(buffer.dtype)], dim=1)
    if buffer.shape[1] < total:
        b, _, g, p = buffer.shape
        larger = buffer.new_zeros(b, max(2 * total, 64), g, p)
        larger[:, :used] = buffer[:, :used]
        buffer = larger
    buffer[:, used:total] = new
    return buffer


LayerState = KVState | SSMState | None


@dataclass
class State:
    """The states of all layers of a model, for a batch of sequences of equal length."""

    layers: list[LayerState]
    position: int = 0
    """Tokens seen so far."""

    def bytes(self) -> int:
        """Memory that the sequences need, without the spare room of growing buffers."""
        return sum(t.numel() * t.element_size() for layer in self._held() for t in layer.tensors().values())

    def fork(self) -> State:
        """An independent copy: both may go on differently."""
        return self._map(lambda t: t.clone())

    def select(self, rows: Tensor) -> State:
        """A copy that holds the sequences `rows` (int64), in that order; repeats are allowed."""
        return self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def save(self, path: Path) -> None:
        """Write all tensors to a safetensors file."""
        tensors = {f"{i}.{name}": tensor.contiguous() for i, layer in enumerate(self.layers) if layer is not None
                   for name, tensor in layer.tensors().items()}
        save_file(tensors, path, metadata={"position": str(self.position), "layers": str(len(self.layers))})

    def load(self, path: Path) -> None:
        """Replace this state by what `save` wrote of one of the same model and batch, on this state's device.

        RequestError, and this state as it was, for a file that is absent, foreign, or of another model or batch.
        """
        found, position, n_layers = _read(path)
        if n_layers != len(self.layers):
            raise RequestError(f"{path}: {n_layers} layers, this model has {len(self.layers)}; the state was saved by "
                               "another model.")
        loaded: list[LayerState] = []
        for i, layer in enumerate(self.layers):
            parts = {}
            for name, mine in ({} if layer is None else layer.tensors()).items():
                part = found.pop(f"{i}.{name}", None)
                if part is None:
                    raise RequestError(f"{path}: no {name} for layer {i}; the state was saved by another model.")
                assert layer is not None
                if not layer.fits(name, part, position):
                    raise RequestError(f"{path}: {name} of layer {i} has shape {tuple(part.shape)} at position "
                                       f"{position}, here it has {tuple(mine.shape)} at {self.position}; the state was "
                                       "saved by another model or for another batch size.")
                parts[name] = part.to(mine.device)
            loaded.append(None if layer is None else type(layer)(**parts))
        if found:
            raise RequestError(f"{path}: {len(found)} tensors too many ({next(iter(found))} …); the state was saved "
                               "by another model.")
        self.layers, self.position = loaded, position

    def _held(self) -> list[KVState | SSMState]:
        return [layer for layer in self.layers if layer is not None]

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        copies: list[LayerState] = [
            None if layer is None else type(layer)(**{n: change(t) for n, t in layer.tensors().items()})
            for layer in self.layers]
        return State(copies, self.position)


def _read(path: Path) -> tuple[dict[str, Tensor], int, int]:
    """Tensors by name, position and number of layers of a file that `State.save` wrote."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return found, int(facts["position"]), int(facts["layers"])
    except OSError as fault:
        raise RequestError(f"{path}: the state cannot be read: {fault.strerror or fault}.") from None
    except (SafetensorError, KeyError, ValueError) as fault:
        raise RequestError(f"{path}: not a file of State.save, or a damaged one: {fault}.") from None
