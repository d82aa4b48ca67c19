"""Training in segments as it is defined: the whole sequence as one graph, in which what passes an edge is detached."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hinny import ops
from hinny.layers import MLP
from hinny.layers.attention import Attention
from hinny.layers.mamba1 import Mamba1
from hinny.layers.mamba2 import Mamba2
from hinny.model import Model


class Plain:
    """A model, token by token.

    documents (b t): the number of changes before each token. length: of a segment.
    """

    def __init__(self, model: Model, documents: Tensor, length: int) -> None:
        self.model, self.documents, self.length = model, documents, length

    def logits(self, tokens: Tensor) -> Tensor:
        kinds = {Mamba1: self.mamba1, Mamba2: self.mamba2, Attention: self.attention, MLP: lambda mlp, x: mlp(x)}
        x = self.model.embedding(tokens)
        for block in self.model.blocks:
            x = x + kinds[type(block.layer)](block.layer, block.norm(x))
        return F.linear(self.model.norm(x), self.model.output_weight)

    def conv(self, conv: Any, x: Tensor) -> Tensor:
        outputs = []
        for t in range(x.shape[1]):
            y = conv.bias
            for k in range(min(conv.weight.shape[1], t + 1)):
                seen = x[:, t - k] if (t - k) // self.length == t // self.length else x[:, t - k].detach()
                y = y + conv.weight[:, -1 - k] * seen * (self.documents[:, t - k] == self.documents[:, t])[:, None]
            outputs.append(F.silu(y))
        return torch.stack(outputs, 1)

    def enter(self, state: Tensor, t: int) -> Tensor:
        """The state (b ...) that token t finds."""
        if t and t % self.length == 0:
            state = state.detach()
        goes_on = self.documents[:, t] == self.documents[:, max(t - 1, 0)]
        return state * goes_on.view(-1, *[1] * (state.dim() - 1))

    def mamba1(self, layer: Any, u: Tensor) -> Tensor:
        x, z = layer.in_proj(u)
        x = self.conv(layer.conv, x)
        dt, B, C = layer.x_proj(x)
        dt, A = F.softplus(layer.dt_proj(dt) + layer.dt_bias), -layer.A_log.exp()
        state, outputs = u.new_zeros(len(u), *A.shape), []
        for t in range(u.shape[1]):
            decay = (dt[:, t, :, None] * A).exp()
            state = decay * self.enter(state, t) + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1) + layer.D * x[:, t])
        return layer.out_proj(torch.stack(outputs, 1) * F.silu(z))

    def mamba2(self, layer: Any, u: Tensor) -> Tensor:
        z, x, B, C, dt = layer.in_proj(u)
        c = layer.config
        (b, t, _), heads = u.shape, len(layer.A_log)
        x, B, C = (self.conv(conv, part) for conv, part in zip(layer.convs, (x, B, C), strict=True))
        x = x.view(b, t, heads, c.head_dim)
        B, C = (part.view(b, t, c.n_groups, c.d_state).repeat_interleave(heads // c.n_groups, 2) for part in (B, C))
        dt, A = F.softplus(dt + layer.dt_bias), -layer.A_log.exp()
        state, outputs = u.new_zeros(b, heads, c.head_dim, c.d_state), []
        for i in range(t):
            decay = (dt[:, i] * A).exp()[..., None, None]
            state = decay * self.enter(state, i) + torch.einsum("bh,bhp,bhn->bhpn", dt[:, i], x[:, i], B[:, i])
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, i]) + layer.D[:, None] * x[:, i])
        y = (torch.stack(outputs, 1).flatten(2) * F.silu(z)).unflatten(-1, (c.n_groups, -1))
        y = y * torch.rsqrt((y ** 2).mean(-1, keepdim=True) + layer.norm_eps)
        return layer.out_proj(y.flatten(2) * layer.norm["weight"])

    def attention(self, layer: Any, x: Tensor) -> Tensor:
        c, (b, t, _) = layer.config, x.shape
        places = torch.arange(t)
        segment = places // self.length
        same = (self.documents[:, :, None] == self.documents[:, None]) & (segment[:, None] == segment)
        sees = same & (places[:, None] >= places)
        position = sees.sum(-1) - 1  # tokens of its document and segment before it
        q, k, v = (part.view(b, t, -1, c.head_dim) for part in (layer.q(x), layer.k(x), layer.v(x)))
        q, k = (ops.rope(part, position, base=c.rope_base, rope_dim=c.rope_dim) for part in (q, k))
        k, v = (part.repeat_interleave(c.n_heads // c.n_kv_heads, 2) for part in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q, k) / c.head_dim ** 0.5
        weights = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
        return layer.o(torch.einsum("bhts,bshp->bthp", weights, v).flatten(2))
