"""A model made ready for decoding: the same weights, in fewer and larger products, and its forward pass.

Parts of a layer that read the same input become rows of one matrix, of which the parts' own parameters are views: no
weight is there twice. A layer does not know it: its projections are replaced, as mixers may be. Once prepared, a model
is for inference alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.infer.quantise import replace_rows, scaled_rows
from hinny.infer.sums import Sums
from hinny.layers import LAYERS
from hinny.layers.linear import Linear, SplitLinear
from hinny.model import Model
from hinny.ops.thin import ThinActivation
from hinny.state import LayerState

SYMBOLS = {kind: symbol for symbol, kind in LAYERS.items()}


class Product(nn.Module):
    """A projection, and the activation behind it, by `ops.thin_linear`. Takes the weight of `part` over."""

    scale: Tensor | None

    def __init__(self, part: nn.Module, activation: ThinActivation | None = None) -> None:
        super().__init__()
        self.activation = activation
        data, scale = _rows(part)
        self.weight = cast(nn.Parameter, part.weight) if scale is None else nn.Parameter(data, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b t k) → (b t n)."""
        return ops.thin_linear(x, self.weight, scale=self.scale, activation=self.activation)


class Packed(nn.Module):
    """Projections of one input as one product. Takes the weights of `parts` over: they become views of its own."""

    scale: Tensor | None

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        held = [_rows(part) for part in parts]
        scales = [scale for _, scale in held if scale is not None]
        self.sizes = [len(data) for data, _ in held]
        self.weight = nn.Parameter(torch.cat([data for data, _ in held]), requires_grad=False)
        self.register_buffer("scale", torch.cat(scales) if scales else None, persistent=False)
        views = self.weight.detach().split(self.sizes)
        if self.scale is None:
            for part, view in zip(parts, views, strict=True):
                cast(nn.Parameter, part.weight).data = view
        else:
            for part, view, scale in zip(parts, views, self.scale.split(self.sizes), strict=True):
                replace_rows(part.weight, view, scale)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t k) → a view of the product for each part."""
        return ops.thin_linear(x, self.weight, scale=self.scale).split(self.sizes, -1)


class Several(nn.Module):
    """Projections of one input as few products: neighbours whose weights have one type are one."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.products = nn.ModuleList([Packed(list(some)) for _, some in groupby(parts, _type)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t k) → a view of its product for each part."""
        return tuple(view for product in self.products for view in product(x))


@torch.no_grad()
def prepare(model: Model) -> None:
    """Change `model` in place. Weights of other forms than `ops.thin_linear` takes, as int4's, stay as they are."""
    for block in model.blocks:
        _PREPARE[SYMBOLS[type(block.layer)]](block.layer)


def _mamba(layer: nn.Module) -> None:
    for name, child in list(layer.named_children()):
        if isinstance(child, SplitLinear) and _alike(*child.children()):
            setattr(layer, name, Packed(list(child.children())))
        elif isinstance(child, SplitLinear) and None not in map(_type, child.children()):
            setattr(layer, name, Several(list(child.children())))
        elif isinstance(child, Linear) and _alike(child):
            setattr(layer, name, Product(child))
    rates = cast(Tensor, layer.rates())  # type: ignore[operator]
    layer.rates = partial(_same, rates)  # type: ignore[assignment]


def _attention(layer: nn.Module) -> None:
    q, k, v, o = (cast(nn.Module, getattr(layer, name)) for name in "qkvo")
    if _alike(q, k, v):
        # the method itself: a module of its name would hide behind the class's
        layer.projected = Packed([q, k, v]).forward  # type: ignore[assignment]
    if _alike(o):
        layer.o = Product(o)


def _mlp(layer: nn.Module) -> None:
    up, down = cast(nn.Module, layer.up), cast(nn.Module, layer.down)
    if _alike(down):
        layer.down = Product(down)
    if layer.gate is None and _alike(up):
        kind: ThinActivation = "relu2" if layer.activation is ops.relu2 else "gelu"
        layer.up, layer.activation = Product(up, kind), _same
    elif layer.gate is not None and _alike(up, cast(nn.Module, layer.gate)):
        layer.up, layer.gate = Product(up), Product(cast(nn.Module, layer.gate))


def _same(x: Tensor) -> Tensor:
    return x


def _rows(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight of `part` as it is held, (n k), and the scales of its rows (n,) if it is quantised."""
    weight = cast(nn.Parameter, part.weight)
    return scaled_rows(weight) or (weight.detach(), None)


def _type(part: nn.Module) -> torch.dtype | None:
    """The type in which the weight of `part` is held; None for one that `ops.thin_linear` cannot take."""
    weight = cast(nn.Parameter, part.weight)
    if type(weight) is nn.Parameter and type(weight.data) is Tensor:
        return weight.dtype
    found = scaled_rows(weight)
    return None if found is None else found[0].dtype


def _alike(*parts: nn.Module) -> bool:
    """Whether the weights of `parts` are matrices of one type, which may be joined."""
    kinds = {_type(part) for part in parts}
    return len(kinds) == 1 and None not in kinds


_PREPARE = {"M": _mamba, "1": _mamba, "*": _attention, "-": _mlp}


@torch.no_grad()
def hidden(model: Model, tokens: Tensor, layers: Sequence[LayerState], sums: Sums | None = None) -> Tensor:
    """`Model.hidden`, where every sum in the residual stream is made together with the norm behind it.

    tokens (b t); layers: the states of the layers, which are updated. sums: of a model that `tensor_parallel` has cut:
    for few rows the ranks' sum is made there too.
    """
    x, delta = model.embedding(tokens), None
    if sums is not None and sums.takes(x):
        return _hidden_of_ranks(model, x, layers, sums)
    for block, state in zip(model.blocks, layers, strict=True):
        x, normed = block.norm.after(x, delta)
        delta = block.layer(normed, state, None)
    return model.norm.after(x, delta)[1]


def _hidden_of_ranks(model: Model, x: Tensor, layers: Sequence[LayerState], sums: Sums) -> Tensor:
    """`hidden` from the embedded tokens on."""
    n, normed = len(layers), model.blocks[0].norm(x)
    for number, (block, state) in enumerate(zip(model.blocks, layers, strict=True), 1):
        # past the hook behind the layer, which would sum
        delta = cast(Callable[..., Tensor], block.layer.forward)(normed, state, None)
        norm = model.norm if number == n else model.blocks[number].norm
        # a pass's last sum and the next one's first are neighbours too
        place = 2 if number == n and n % 2 else number % 2
        x, normed = sums.add_norm(norm, x, delta, place)
    return normed
