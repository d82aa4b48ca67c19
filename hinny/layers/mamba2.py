"""Mamba-2: a short convolution, a state space with one decay per head, a gated norm (arXiv 2405.21060, section 7).

    z, x, B, C, dt = in_proj(u)
    x, B, C        = silu(conv(x)), silu(conv(B)), silu(conv(C))                                |  both in
    y              = ssd(x, softplus(dt + dt_bias), A = -exp(A_log), B, C) + D x                |  self.mix
    out            = out_proj(norm(y * silu(z)))            norm in n_groups groups, the gate before it

Letters: b batch, t time, d model, h heads, p head_dim, g groups, n state; d_inner = h p.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.config import ModelConfig
from hinny.layers.conv import CausalConv
from hinny.layers.linear import Linear, SplitLinear, inverse_softplus_of_time_step
from hinny.state import CarriedLayer, SSMState

A_RANGE = (1.0, 16.0)
Three = tuple[Tensor, Tensor, Tensor]


class Mamba2(nn.Module):
    """x (b t d) → x (b t d) through a state of h heads, each head_dim x d_state (research: paper section 2.1)."""

    mix = staticmethod(ops.mamba2)
    """What mixes the tokens; whoever spreads a sequence over processes puts another with its signature here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mamba2 is not None
        self.config = c = config.mamba2
        d_inner = c.d_inner(config.d_model)
        n_heads, d_groups = d_inner // c.head_dim, c.n_groups * c.d_state
        self.in_proj = SplitLinear(config.d_model, {"z": d_inner, "x": d_inner, "B": d_groups, "C": d_groups,
                                                    "dt": n_heads})
        self.conv = nn.ModuleDict({part: CausalConv(channels, c.d_conv)
                                   for part, channels in (("x", d_inner), ("B", d_groups), ("C", d_groups))})
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.norm = nn.ParameterDict({"weight": torch.empty(d_inner)})
        self.out_proj = Linear(d_inner, config.d_model)
        self.norm_eps, self.group_size = config.norm_eps, d_inner // c.n_groups
        self.out_std = config.init_std / math.sqrt(config.depth)

    def init_weights(self, generator: torch.Generator) -> None:
        """Megatron's initial values: decays from U(1, 16), time steps log-uniform, D = 1, small output."""
        self.in_proj.init_weights(generator)
        for conv in self.convs:
            conv.init_weights(generator)
        with torch.no_grad():
            c = self.config
            self.dt_bias.copy_(inverse_softplus_of_time_step(self.dt_bias.shape, c.dt_min, c.dt_max, generator))
            rates = torch.empty(self.A_log.shape, device=generator.device).uniform_(*A_RANGE, generator=generator)
            self.A_log.copy_(rates.log())
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm["weight"])
        nn.init.normal_(self.out_proj.weight, std=self.out_std, generator=generator)

    def rates(self) -> Tensor:
        """A (h,): how fast the state of each head decays, negative."""
        return -self.A_log.exp()

    @property
    def convs(self) -> list[CausalConv]:
        """The convolutions of x, B and C, in this order."""
        return cast(list[CausalConv], list(self.conv.values()))

    def forward(self, u: Tensor, state: SSMState | CarriedLayer | None = None,
                segments: Tensor | None = None) -> Tensor:
        """u (b t d) → (b t d). `state`, if given, is read and updated."""
        z, x, B, C, dt = self.in_proj(u)
        weights, biases = zip(*((conv.weight, conv.bias) for conv in self.convs), strict=True)
        options: dict[str, Any] = {"D": self.D, "dt_bias": self.dt_bias, "dt_softplus": True}
        A = self.rates()

        def mix(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, ssm: Tensor | None, conv: Tensor | None) -> Three:
            heads, groups = (*x.shape[:2], -1, self.config.head_dim), (*x.shape[:2], -1, self.config.d_state)
            return self.mix(x.view(heads), dt, A, B.view(groups), C.view(groups), weights, biases, initial_state=ssm,
                            conv_state=conv, segments=segments, chunk_len=self.config.chunk_len, **options)

        def step(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, ssm: Tensor, conv: Tensor,
                 slots: Tensor | None) -> Tensor:
            return ops.mamba2_update(ssm, conv, x, dt, A, B, C, weights, biases, slots=slots, **options)

        y = mix(x, dt, B, C, None, None)[0] if state is None else state.advance(
            mix, step if self.mix is ops.mamba2 else None, x, dt, B, C)
        y = ops.gated_rms_norm(y.flatten(2), z, self.norm["weight"], self.norm_eps, self.group_size)
        return self.out_proj(y)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> SSMState:
        """The state before the first token: zeros."""
        n_heads = self.A_log.shape[0]
        channels = sum(conv.bias.shape[0] for conv in self.convs)
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return SSMState(
            conv=torch.zeros(batch_size, channels, self.config.d_conv - 1, device=device, dtype=dtype),
            ssm=torch.zeros(batch_size, n_heads, self.config.head_dim, self.config.d_state, device=device,
                            dtype=dtype))
