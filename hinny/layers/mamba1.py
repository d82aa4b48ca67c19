"""Mamba: a short convolution and a state space with one decay per channel and state (arXiv 2312.00752, section 3.4).

    x, z     = in_proj(u)
    x        = silu(conv(x))
    dt, B, C = x_proj(x)
    y        = selective_scan(x, softplus(dt_proj(dt) + dt_bias), A = -exp(A_log), B, C) + D x
    out      = out_proj(y * silu(z))

Letters: b batch, t time, d model, n state; d_inner = expand d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.config import ModelConfig
from hinny.layers.conv import CausalConv
from hinny.layers.linear import Linear, SplitLinear, fan_in_uniform, inverse_softplus_of_time_step
from hinny.state import CarriedLayer, SSMState


class Mamba1(nn.Module):
    """x (b t d) → x (b t d) through a state of d_inner channels, each of d_state numbers."""

    mix = staticmethod(ops.selective_scan)
    """What mixes the tokens behind the convolution; may be replaced, as Mamba2.mix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.mamba1 is not None
        self.config = c = config.mamba1
        d_inner = c.expand * config.d_model
        self.in_proj = SplitLinear(config.d_model, {"x": d_inner, "z": d_inner})
        self.conv = CausalConv(d_inner, c.d_conv)
        self.x_proj = SplitLinear(d_inner, {"dt": c.dt_rank, "B": c.d_state, "C": c.d_state})
        self.dt_proj = Linear(c.dt_rank, d_inner)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.A_log = nn.Parameter(torch.empty(d_inner, c.d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = Linear(d_inner, config.d_model)
        self.out_std = config.init_std / math.sqrt(config.depth)

    def init_weights(self, generator: torch.Generator) -> None:
        """The Mamba paper's initial values: A = -(1 … n) in every channel, time steps log-uniform, D = 1."""
        self.in_proj.init_weights(generator)
        self.conv.init_weights(generator)
        self.x_proj.init_weights(generator)
        fan_in_uniform(self.dt_proj.weight, self.config.dt_rank, generator)
        with torch.no_grad():
            c = self.config
            self.dt_bias.copy_(inverse_softplus_of_time_step(self.dt_bias.shape, c.dt_min, c.dt_max, generator))
            self.A_log.copy_(torch.arange(1, c.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        nn.init.normal_(self.out_proj.weight, std=self.out_std, generator=generator)

    def forward(self, u: Tensor, state: SSMState | CarriedLayer | None = None,
                segments: Tensor | None = None) -> Tensor:
        """u (b t d) → (b t d). `state`, if given, is read and updated."""
        x, z = self.in_proj(u)
        A = self.rates()

        def mix(x: Tensor, z: Tensor, ssm: Tensor | None, conv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            x, conv = self.conv(x, conv, segments)
            dt, B, C = self.x_proj(x)
            y, ssm = self.mix(x, self.dt_proj(dt), A, B, C, D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True,
                              initial_state=ssm, segments=segments, chunk_len=self.config.chunk_len)
            return y, ssm, conv

        return self.out_proj(mix(x, z, None, None)[0] if state is None else state.advance(mix, None, x, z))

    def rates(self) -> Tensor:
        """A (d_inner n): how fast each state decays, negative."""
        return -self.A_log.exp()

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> SSMState:
        """The state before the first token: zeros."""
        d_inner, d_state = self.A_log.shape
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return SSMState(conv=torch.zeros(batch_size, d_inner, self.config.d_conv - 1, device=device, dtype=dtype),
                        ssm=torch.zeros(batch_size, d_inner, d_state, device=device, dtype=dtype))
