"""The feed-forward layer in its three forms (paper section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hinny import ops
from hinny.config import ModelConfig
from hinny.layers.linear import Linear
from hinny.state import LayerState

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"gelu": F.gelu, "relu2": ops.relu2, "swiglu": ops.swiglu}
"""mlp.activation → function of the projection up, for swiglu of gate and up. GELU is the exact erf form."""


class MLP(nn.Module):
    """x (b t d) → x (b t d): down(act(up(x))), or down(silu(gate(x)) * up(x)) for swiglu."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mlp is not None
        self.activation = ACTIVATIONS[config.mlp.activation]
        gated = config.mlp.activation == "swiglu"
        self.gate = Linear(config.d_model, config.mlp.d_ff) if gated else None
        self.up = Linear(config.d_model, config.mlp.d_ff)
        self.down = Linear(config.mlp.d_ff, config.d_model)
        self.std = config.init_std
        self.out_std = config.output_init_std or config.init_std / math.sqrt(2 * config.depth)

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, init_std); the output projection smaller, so that depth does not grow the residual stream."""
        for linear in (self.gate, self.up):
            if linear is not None:
                nn.init.normal_(linear.weight, std=self.std, generator=generator)
        nn.init.normal_(self.down.weight, std=self.out_std, generator=generator)

    def forward(self, x: Tensor, state: LayerState = None, segments: Tensor | None = None) -> Tensor:
        """x (b t d) → (b t d). Tokens do not meet here: `state` must be None, `segments` changes nothing."""
        assert state is None
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x), self.up(x)))

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> None:
        """An MLP carries nothing."""
        return None
