"""The short causal convolution in front of both kinds of SSM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.layers.linear import fan_in_uniform


class CausalConv(nn.Module):
    """Depthwise causal convolution of width `width` with bias, then SiLU."""

    mix = staticmethod(ops.causal_conv)
    """What mixes the tokens; may be replaced, as Mamba2.mix."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming uniform weight and PyTorch's bias: both U(-1/sqrt(width), 1/sqrt(width))."""
        fan_in_uniform(self.weight, self.weight.shape[1], generator)
        fan_in_uniform(self.bias, self.weight.shape[1], generator)

    def forward(self, x: Tensor, state: Tensor | None = None, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (b t ch), state (b ch w-1) → y (b t ch) and the next state."""
        return self.mix(x, self.weight, self.bias, activation="silu", initial_state=state, segments=segments)
