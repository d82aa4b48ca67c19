"""Causal grouped-query attention, with rotary positions or none (paper section 2.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.config import AttentionConfig, ModelConfig
from hinny.layers.linear import Linear
from hinny.state import KVState


def positions(x: Tensor, start: int | Tensor, segments: Tensor | None) -> Tensor:
    """Position of each token in its document: (t,), or (b t) where documents are packed or `start` is that of each row
    (b,), or already of each token (b t).
    """
    if isinstance(start, Tensor):
        return start if start.dim() == 2 else start[:, None] + torch.arange(x.shape[1], device=x.device)
    count = torch.arange(start, start + x.shape[1], device=x.device)
    if segments is None:
        return count
    opens = torch.ones_like(segments, dtype=torch.bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return count - torch.where(opens, count, 0).cummax(dim=1).values


def stretch_of(config: AttentionConfig) -> ops.Stretch | None:
    """What `config` says of positions past the trained length, as the op takes it."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    fast, slow = (scaling.fast, scaling.slow) if scaling.method == "yarn" else (None, None)
    return ops.Stretch(scaling.factor, scaling.trained_len, fast, slow)


class Attention(nn.Module):
    """x (b t d) → x (b t d): h query heads share g key/value heads, head i using head i // (h / g)."""

    mix = staticmethod(ops.attention)
    """What mixes the tokens; may be replaced, as Mamba2.mix."""
    positions = staticmethod(positions)
    """Where the tokens stand in their documents; may be replaced too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.attention is not None
        self.config = c = config.attention
        self.stretch = stretch_of(c)
        self.q = Linear(config.d_model, c.n_heads * c.head_dim)
        self.k = Linear(config.d_model, c.n_kv_heads * c.head_dim)
        self.v = Linear(config.d_model, c.n_kv_heads * c.head_dim)
        self.o = Linear(c.n_heads * c.head_dim, config.d_model)
        self.std = config.init_std
        self.out_std = config.output_init_std or config.init_std / math.sqrt(2 * config.depth)

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, init_std); the output projection smaller, so that depth does not grow the residual stream."""
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=self.std, generator=generator)
        nn.init.normal_(self.o.weight, std=self.out_std, generator=generator)

    def forward(self, x: Tensor, state: KVState | None = None, segments: Tensor | None = None) -> Tensor:
        """x (b t d) → (b t d). `state`, if given, is read and gets the new keys and values."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (part.view(heads) for part in self.projected(x))
        if self.config.positions == "rope":
            position = self.positions(x, 0 if state is None else state.start, segments)
            base, rope_dim = self.config.rope_base, self.config.rope_dim
            assert base is not None
            q, k = (ops.rope(part, position, base=base, rope_dim=rope_dim, stretch=self.stretch) for part in (q, k))
        if self.config.score_scale is not None:
            q = q * self.config.score_scale
        y = self.mix(q, k, v, segments=segments, lengths=None) if state is None else state.attend(self.mix, q, k, v)
        return self.o(y.flatten(2))

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t d) → queries (b t h*p), keys and values (b t g*p)."""
        return self.q(x), self.k(x), self.v(x)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> KVState:
        """The state before the first token: no keys."""
        shape = (batch_size, 0, self.k.weight.shape[0] // self.config.head_dim, self.config.head_dim)
        empty = torch.empty(shape, device=device, dtype=self.k.weight.dtype)
        return KVState(k=empty, v=empty.clone())
