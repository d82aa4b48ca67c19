"""Projections with named parts, and the initial values that the layers share."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from hinny import ops


class Linear(nn.Linear):
    """nn.Linear without a bias, by `ops.linear`: under autocast its weight's gradient is made in the weight's type."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (... d_in) → (... d_out)."""
        return ops.linear(x, self.weight)


class SplitLinear(nn.Module):
    """One projection whose output has named parts, each with a weight of its own.

    The parts can be sharded, converted and read by name, where one packed matrix would need its row ranges known.
    """

    def __init__(self, d_in: int, parts: dict[str, int]) -> None:
        super().__init__()
        for name, d_out in parts.items():
            self.add_module(name, Linear(d_in, d_out))

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming uniform with a = sqrt(5), as Megatron's Mamba stack sets in_proj."""
        for weight in self.parameters():
            fan_in_uniform(weight, weight.shape[1], generator)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t d_in) → one (b t d_out) for each part, in the order of construction."""
        parts = list(self.children())
        if all(map(_is_as_made, parts)):
            return ops.split_linear(x, [cast(Tensor, part.weight) for part in parts])
        return tuple(part(x) for part in parts)


def _is_as_made(part: nn.Module) -> bool:
    """Whether calling `part` does no more than its product: it was not replaced, and nobody listens to it."""
    listeners = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
    return type(part) is Linear and not any(listeners)


def fan_in_uniform(weight: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Fill with U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is Kaiming uniform with a = sqrt(5)."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def inverse_softplus_of_time_step(shape: torch.Size, dt_min: float, dt_max: float,
                                  generator: torch.Generator) -> Tensor:
    """Biases whose softplus is log-uniform in (dt_min, dt_max), never under 1e-4."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    dt = torch.exp(u * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))
