"""A model made ready for decoding: the same weights, in fewer and larger products, and its forward pass.

Parts of a layer that read the same input become rows of one matrix, of which the parts' own parameters are views: no
weight is there twice. A layer does not know it: its projections are replaced, as mixers may be. Once prepared, a model
is for inference alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.infer.sums import Sums
from hinny.layers import LAYERS
from hinny.layers.linear import Linear, SplitLinear
from hinny.model import Model
from hinny.ops.thin import ThinActivation
from hinny.state import LayerState

SYMBOLS = {kind: symbol for symbol, kind in LAYERS.items()}


class Product(nn.Module):
    """A projection, and the activation behind it, by `ops.thin_linear`."""

    def __init__(self, weight: nn.Parameter, activation: ThinActivation | None = None) -> None:
        super().__init__()
        self.weight, self.activation = weight, activation

    def forward(self, x: Tensor) -> Tensor:
        """x (b t k) → (b t n)."""
        return ops.thin_linear(x, self.weight, activation=self.activation)


class Packed(nn.Module):
    """Projections of one input as one product. Takes the weights of `parts` over: they become views of its own."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        weights = [cast(nn.Parameter, part.weight) for part in parts]
        self.sizes = [len(weight) for weight in weights]
        self.weight = nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
        for weight, view in zip(weights, self.weight.detach().split(self.sizes), strict=True):
            weight.data = view

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t k) → a view of the product for each part."""
        return ops.thin_linear(x, self.weight).split(self.sizes, -1)


@torch.no_grad()
def prepare(model: Model) -> None:
    """Change `model` in place. Weights that are no plain tensors of one type, quantised ones, stay as they are."""
    for block in model.blocks:
        _PREPARE[SYMBOLS[type(block.layer)]](block.layer)


def _mamba(layer: nn.Module) -> None:
    for name, child in list(layer.named_children()):
        if isinstance(child, SplitLinear) and _plain(*child.children()):
            setattr(layer, name, Packed(list(child.children())))
        elif isinstance(child, Linear) and _plain(child):
            setattr(layer, name, Product(cast(nn.Parameter, child.weight)))
    rates = cast(Tensor, layer.rates())  # type: ignore[operator]
    layer.rates = partial(_same, rates)  # type: ignore[assignment]


def _attention(layer: nn.Module) -> None:
    q, k, v, o = (cast(nn.Module, getattr(layer, name)) for name in "qkvo")
    if _plain(q, k, v):
        # the method itself: a module of its name would hide behind the class's
        layer.projected = Packed([q, k, v]).forward  # type: ignore[assignment]
    if _plain(o):
        layer.o = Product(cast(nn.Parameter, o.weight))


def _mlp(layer: nn.Module) -> None:
    up, down = cast(nn.Module, layer.up), cast(nn.Module, layer.down)
    if _plain(down):
        layer.down = Product(cast(nn.Parameter, down.weight))
    if layer.gate is None and _plain(up):
        kind: ThinActivation = "relu2" if layer.activation is ops.relu2 else "gelu"
        layer.up, layer.activation = Product(cast(nn.Parameter, up.weight), kind), _same
    elif layer.gate is not None and _plain(up, cast(nn.Module, layer.gate)):
        layer.up = Product(cast(nn.Parameter, up.weight))
        layer.gate = Product(cast(nn.Parameter, cast(nn.Module, layer.gate).weight))


def _same(x: Tensor) -> Tensor:
    return x


def _plain(*parts: nn.Module) -> bool:
    """Whether the weights of `parts` are ordinary matrices of one type, which may be joined."""
    weights = [part.weight for part in parts]
    return (all(type(weight) is nn.Parameter and type(weight.data) is Tensor for weight in weights)
            and len({weight.dtype for weight in weights}) == 1)


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
