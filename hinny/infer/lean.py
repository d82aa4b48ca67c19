"""One token of one sequence on a CPU, in as few operations as it takes.

A small model's token costs a CPU the calls, and little else; a larger one's the reading of its weights. Layers are made
for any number of tokens and sequences, and check what they are given: some hundred calls each. Here each of them is a
function of one vector, with its constants made before, and the states change in the pool. The results are those of the
layers (tests/infer/test_lean.py).

Letters: d model, ch channels of the convolution, w its window, h heads of p, g groups of r heads, n state, m pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinny.infer.pool import Pages, Pool, Slots
from hinny.infer.prepare import Packed, Product
from hinny.layers import LAYERS
from hinny.layers.attention import Attention
from hinny.model import Model
from hinny.ops.rope import rope_rates

LARGE, LONGEST = 1 << 18, 2048
"""Numbers of a matrix from which, and columns up to which, PyTorch's product of two matrices with two vectors at once
reads faster than that of one with one: 18 to 20 GB/s where that reads 9 to 11, by one thread."""
SYMBOLS = {kind: symbol for symbol, kind in LAYERS.items()}
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu2": lambda x: x.relu_().square_()}


class Place:
    """Where the token stands: what all layers of a pass share."""

    def __init__(self, slot: int, pages: Sequence[int], start: int, page: int) -> None:
        """start: tokens before this one; page: tokens of a page."""
        self.slot, self.length = slot, start + 1
        self.number, self.row = divmod(start, page)
        used = list(pages[:self.number + 1])
        self.page = used[-1] if used else -1
        self._first = used[0] if used and used == list(range(used[0], used[0] + len(used))) else None
        self._used = used
        self._start = start
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}

    def used(self, pool: Tensor) -> Tensor:
        """The pages (m g page p) up to the token's: where they lie, if one behind the other, or copies."""
        if self._first is not None:
            return pool[self._first:self._first + len(self._used)]
        return pool.index_select(0, torch.tensor(self._used))

    def turns(self, rates: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the token's angles times the amplitude, (rope_dim/2,) each."""
        found = self._turns.get(id(rates))
        if found is None:
            angles = rates * self._start
            found = self._turns[id(rates)] = angles.cos() * amplitude, angles.sin() * amplitude
        return found


class Lean:
    """A model's tokens one by one."""

    def __init__(self, model: Model, pool: Pool, words: int) -> None:
        """For what `fits`; words: that may be chosen."""
        self._words, self._head = model.embedding.weight.detach(), _product(model.output_weight[:words])
        self._layers = [(_norm(block.norm), _MADE[SYMBOLS[type(block.layer)]](block.layer, layer))
                        for block, layer in zip(model.blocks, pool.layers, strict=True)]
        self._norm = _norm(model.norm)

    def logits(self, token: int, place: Place) -> Tensor:
        """(words,), of the token behind this one; the states are those behind this one."""
        x = self._words[token].clone()
        for norm, layer in self._layers:
            x.add_(layer(norm(x), place))
        return self._head(self._norm(x))


def fits(model: Model, pool: Pool) -> bool:
    """Whether `Lean` is for this model: prepared, on a CPU, all in float32 or all in float64, the states too."""
    kinds = {weight.dtype for weight in model.parameters()} | {layer.ssm.dtype for layer in pool.layers
                                                              if isinstance(layer, Slots)}
    places = {weight.device.type for weight in model.parameters()}
    return (places == {"cpu"} and len(kinds) == 1 and kinds <= {torch.float32, torch.float64}
            and all(_is_as_prepared(block.layer) for block in model.blocks))


def _is_as_prepared(layer: nn.Module) -> bool:
    """Whether `prepare` has joined its products, and nobody has put another mixer, or listens."""
    matrices = [child for child in layer.modules() if isinstance(child, Packed | Product)]
    if isinstance(layer, Attention) and "projected" not in vars(layer):
        return False
    return (bool(matrices) and all(one.scale is None for one in matrices) and "mix" not in vars(layer)
            and not layer._forward_hooks)


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x (k,) → weight x (n,)."""
    n, k = weight.shape
    weight = weight.detach()
    if n * k < LARGE or k > LONGEST or n % 2 or not weight.is_contiguous():
        return partial(torch.mv, weight)
    halves = weight.view(2, n // 2, k)
    return lambda x: torch.bmm(halves, x.as_strided((2, k, 1), (0, 1, k))).view(n)


def _norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """x (d,) → (d,)."""
    weight, eps = cast(Tensor, norm.weight).detach(), cast(float, norm.eps)
    if norm.bias is not None:
        gain, bias = weight + 1, cast(Tensor, norm.bias).detach()
        return lambda x: F.layer_norm(x, gain.shape, gain, bias, eps)
    d = len(weight)
    return lambda x: (x * weight).mul_(1 / math.sqrt(float(torch.dot(x, x)) / d + eps))


class _Convolution:
    """The next inputs (ch,) → silu(convolved) (ch,), and the window of a slot one further."""

    def __init__(self, convs: Sequence[Any], slots: Slots) -> None:
        self.weight = torch.cat([conv.weight.detach() for conv in convs])
        self.bias = torch.cat([conv.bias.detach() for conv in convs])
        self.held = slots.conv

    def __call__(self, x: Tensor, slot: int) -> Tensor:
        held = self.held[slot]
        window = torch.cat((held, x[:, None]), 1)
        held.copy_(window[:, 1:])
        return F.silu(window.mul_(self.weight).sum(1).add_(self.bias), inplace=True)


class _Mamba2:
    def __init__(self, layer: Any, slots: Slots) -> None:
        self.into, self.out = _product(layer.in_proj.weight), _product(layer.out_proj.weight)
        inner, ch, h = layer.in_proj.sizes[0], sum(layer.in_proj.sizes[1:4]), layer.in_proj.sizes[4]
        self.parts, self.channels = (inner, ch, h), layer.in_proj.sizes[1:4]
        self.convolved = _Convolution(layer.convs, slots)
        self.rates, self.bias, self.D = layer.rates().detach(), layer.dt_bias.detach(), layer.D.detach()[:, None]
        self.gain, self.eps, self.group = layer.norm["weight"].detach(), layer.norm_eps, layer.group_size
        _, self.h, self.p, self.n = slots.ssm.shape
        self.g = self.channels[1] // self.n
        self.states = slots.ssm

    def __call__(self, u: Tensor, place: Place) -> Tensor:
        """u (d,) → (d,), and the slot's state."""
        z, channels, dt = self.into(u).split(self.parts)
        x, B, C = self.convolved(channels, place.slot).split(self.channels)
        dt = F.softplus(dt + self.bias)
        x, state = x.view(self.h, self.p), self.states[place.slot]
        state.mul_((dt * self.rates).exp_()[:, None, None])
        groups = state.view(self.g, -1, self.n)
        groups.addcmul_((x * dt[:, None]).view(self.g, -1, 1), B.view(self.g, 1, self.n))
        y = torch.bmm(groups, C.view(self.g, self.n, 1)).view(self.h, self.p).addcmul_(self.D, x)
        y = y.view(-1, self.group).mul_(F.silu(z).view(-1, self.group))
        scale = torch.linalg.vector_norm(y, dim=1, keepdim=True).square_().div_(self.group).add_(self.eps).rsqrt_()
        return self.out(y.mul_(scale).view(-1).mul_(self.gain))


class _Mamba1:
    def __init__(self, layer: Any, slots: Slots) -> None:
        self.into, self.out = _product(layer.in_proj.weight), _product(layer.out_proj.weight)
        self.steps, self.bias = _product(layer.dt_proj.weight), layer.dt_bias.detach()
        self.chosen, self.sizes = _product(layer.x_proj.weight), layer.x_proj.sizes
        self.convolved = _Convolution([layer.conv], slots)
        self.rates, self.D, self.states = layer.rates().detach(), layer.D.detach(), slots.ssm

    def __call__(self, u: Tensor, place: Place) -> Tensor:
        """u (d,) → (d,), and the slot's state."""
        x, z = self.into(u).chunk(2)
        x = self.convolved(x, place.slot)
        dt, B, C = self.chosen(x).split(self.sizes)
        dt = F.softplus(self.steps(dt).add_(self.bias))
        state = self.states[place.slot]
        state.mul_((dt[:, None] * self.rates).exp_()).addcmul_((x * dt)[:, None], B[None])
        return self.out(torch.mv(state, C).addcmul_(self.D, x).mul_(F.silu(z)))


class _Attention:
    def __init__(self, layer: Any, pages: Pages) -> None:
        joined = layer.projected.__self__.weight
        self.into, self.out, c = _product(joined), _product(layer.o.weight), layer.config
        self.h, self.g, self.p = c.n_heads, c.n_kv_heads, c.head_dim
        self.pages, self.turned = pages, c.rope_dim if c.positions == "rope" else 0
        self.rates = rope_rates(c.rope_base, self.turned, joined.dtype, joined.device,
                                layer.stretch) if self.turned else None
        self.amplitude = 1.0 if layer.stretch is None else layer.stretch.amplitude
        self.scale = self.p ** -0.5 * (c.score_scale or 1.0)

    def __call__(self, u: Tensor, place: Place) -> Tensor:
        """u (d,) → (d,); its key and value are in their page."""
        heads = self.into(u).view(-1, self.p)
        if self.rates is not None:
            self._turn(heads[:self.h + self.g, :self.turned], *place.turns(self.rates, self.amplitude))
        q, k, v = heads.split((self.h, self.g, self.g))
        self.pages.k[place.page][:, place.row].copy_(k)
        self.pages.v[place.page][:, place.row].copy_(v)
        keys, values = place.used(self.pages.k), place.used(self.pages.v)
        # page by page (m g r page): to put keys one behind the other would copy them all
        scores = torch.matmul(q.mul_(self.scale).view(self.g, -1, self.p), keys.transpose(2, 3))
        scores = scores.permute(1, 2, 0, 3).flatten(2)
        scores[..., place.length:] = -torch.inf
        weights = scores.softmax(-1).unflatten(2, (len(keys), -1)).permute(2, 0, 1, 3)
        return self.out(torch.matmul(weights, values).sum(0).view(-1))

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """x (heads rope_dim), in place: as `hinny.ops.rope`."""
        first, second = x.chunk(2, -1)
        across = second * sin
        second.mul_(cos).addcmul_(first, sin)
        first.mul_(cos).sub_(across)


class _MLP:
    def __init__(self, layer: Any, nothing: None) -> None:
        self.gate = None if layer.gate is None else _product(layer.gate.weight)
        self.up, self.down = _product(layer.up.weight), _product(layer.down.weight)
        self.act = None if layer.gate is not None else ACTIVATIONS[layer.up.activation]

    def __call__(self, u: Tensor, place: Place) -> Tensor:
        """u (d,) → (d,)."""
        wide = self.up(u)
        if self.act is not None:
            return self.down(self.act(wide))
        assert self.gate is not None
        return self.down(F.silu(self.gate(u), inplace=True).mul_(wide))


_MADE: dict[str, Callable[[Any, Any], Callable[[Tensor, Place], Tensor]]] = {
    "M": _Mamba2, "1": _Mamba1, "*": _Attention, "-": _MLP}
