"""The two pre-norms of the paper's models, as modules that hold their gain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hinny import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm with a plain gain (d,): the Mamba family and the hybrid."""

    bias: None = None

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def init_weights(self, generator: torch.Generator) -> None:
        """The gain becomes 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) → (... d)."""
        return ops.rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and delta (... d) → their sum and its norm, for inference: no gradients."""
        return ops.add_norm(x, delta, self.weight, None, self.eps)


class LayerNorm1p(nn.Module):
    """Layer norm whose gain is weight + 1 (Megatron's layernorm-1p): the Transformer."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d))
        self.eps = eps

    def init_weights(self, generator: torch.Generator) -> None:
        """Weight 0, that is gain 1, and bias 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) → (... d)."""
        return ops.layer_norm_1p(x, self.weight, self.bias, self.eps)

    def after(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """As RMSNorm's."""
        return ops.add_norm(x, delta, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm1p]] = {"rmsnorm": RMSNorm, "layernorm1p": LayerNorm1p}
"""model.norm → module."""
