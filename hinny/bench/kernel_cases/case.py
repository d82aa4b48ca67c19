"""A case of `hinny bench kernels`: inputs, our call, a peer's call, and what the machine must do at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hinny.bench.kernel_peers import MambaSSM

Outputs = Tensor | tuple[Tensor, ...]
Inputs = dict[str, Tensor]

TOLERANCE = {torch.bfloat16: 1.5 * 2 ** -8, torch.float16: 1.5 * 2 ** -11, torch.float32: 2e-5}
"""Dtype of the inputs → largest relative error of a result that rounds its operands to that dtype once."""


@dataclass(frozen=True)
class Case:
    """One thing to check and to time.

    what, shape   name the row; shape is "key=value …"
    inputs        draws one set of inputs
    ours          the ops called with a set (by name) → a tensor, or several
    peer          the same in a peer: (peer, **inputs) → the first of our outputs, or more of them; None: it has none
    peer_lacks    what the peer's call leaves out; its results are then not compared, its time is a lower bound
    moved         bytes that must be moved; in a backward, of the backward alone
    flops         floating-point operations that must be done, likewise
    unit          "ms", or "TB/s" for work that only moves bytes
    wanted        inputs that get gradients from the first output; then the backward is timed, else the forward
    whole         with `wanted`: forward and backward are timed together
    updated       inputs that the call changes in place
    sets          the fewest sets of inputs to go through in turn
    dtype         of the inputs that are activations, `TOLERANCE`'s key
    roundings     how many results rounded to that dtype feed each other
    """

    what: str
    shape: str
    inputs: Callable[[Draw], Inputs]
    ours: Callable[..., Outputs]
    peer: Callable[..., Outputs] | None = None
    peer_lacks: str = ""
    moved: float = 0.0
    flops: float = 0.0
    unit: str = "ms"
    wanted: tuple[str, ...] = ()
    whole: bool = False
    updated: tuple[str, ...] = ()
    sets: int = 3
    dtype: torch.dtype = torch.bfloat16
    roundings: int = 1

    @property
    def name(self) -> str:
        """What and shape: what `--only` is compared with."""
        return f"{self.what} {self.shape}"

    @property
    def tolerance(self) -> float:
        """Largest relative error allowed; independent roundings add up like the sides of a right angle."""
        return TOLERANCE[self.dtype] * math.sqrt(self.roundings)

    def of_peer(self, peer: MambaSSM) -> Callable[..., Outputs]:
        """The peer's call, to be made with a set of inputs."""
        call = self.peer
        assert call is not None
        return lambda **inputs: call(peer, **inputs)


class Draw:
    """Random tensors on one device, the same for the same seed; `number` counts the sets of inputs drawn."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device, self.number = torch.device(device), 0
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Of N(0, 1)."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Of U(low, high), float32."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def whole(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers in [0, limit), int64."""
        return torch.randint(limit, shape, generator=self.generator, device=self.device)

    def state_space(self, h: int) -> Inputs:
        """A, D and dt_bias of h heads (or channels), float32, as a Mamba-2 layer begins with: steps of 1e-3 to 0.1."""
        steps = self.uniform(math.log(1e-3), math.log(0.1), h).exp()
        return {"A": -self.uniform(1.0, 16.0, h), "D": self.normal(h, dtype=torch.float32),
                "dt_bias": steps + torch.log(-torch.expm1(-steps))}


def shape_text(**sizes: Any) -> str:
    """"key=value …"."""
    return " ".join(f"{key}={value}" for key, value in sizes.items())


def size(inputs: Mapping[str, Tensor]) -> int:
    """Bytes of a set of inputs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
