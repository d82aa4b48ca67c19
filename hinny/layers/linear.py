"""Projections with named parts, and the initial values that the layers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SplitLinear(nn.Module):
    """One projection whose output has named parts, each with a weight of its own.

    The parts can be sharded, converted and read by name, where one packed matrix would need its row ranges known.
    """

    def __init__(self, d_in: int, parts: dict[str, int]) -> None:
        super().__init__()
        for name, d_out in parts.items():
            self.add_module(name, nn.Linear(d_in, d_out, bias=False))

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming uniform with a = sqrt(5), as Megatron's Mamba stack sets in_proj."""
        for weight in self.parameters():
            fan_in_uniform(weight, weight.shape[1], generator)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t d_in) → one (b t d_out) for each part, in the order of construction."""
        return tuple(linear(x) for linear in self.children())


def fan_in_uniform(weight: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Fill with U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is Kaiming uniform with a = sqrt(5)."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def inverse_softplus_of_time_step(shape: torch.Size, dt_min: float, dt_max: float,
                                  generator: torch.Generator) -> Tensor:
    """Biases whose softplus is log-uniform in (dt_min, dt_max), never under 1e-4."""
    u = torch.rand(shape, generator=generator)
    dt = torch.exp(u * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))
