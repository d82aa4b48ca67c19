"""What the backward pass computes again in place of keeping it.

    full          a block keeps its input alone, and runs again before its backward pass, but for its last product
    some kinds    the same for the blocks of these kinds
    selective     of a block that runs again, what costs the most does not: its linears give what they gave, and what
                  mixes tokens (attention, scan, SSD, convolution, their collectives) is passed over. Kept are the
                  block's input, what the linears give to gates and activations, and what the mixers save. Made again
                  are norms, gates, activations and casts, and given up are the linears' inputs that come of them

PyTorch's policies of selective checkpointing act on its own operators, one by one. The mixers are autograd functions
that launch kernels, which no policy sees, so those would all run twice; here they are passed over as wholes.
Names of modules and parameters stay: a block's `forward`, its linears' and its mixers' `mix` are set on the instances.
Gradients are the same bits as without, unless kernels of PyTorch's own are not deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hinny.errors import ConfigError
from hinny.layers import LAYERS, MLP
from hinny.layers.attention import Attention
from hinny.layers.conv import CausalConv
from hinny.layers.mamba1 import Mamba1
from hinny.layers.mamba2 import Mamba2
from hinny.model import Block
from hinny.objective import Objective
from hinny.parallel.tensor import projections
from hinny.pattern import SYMBOLS, parse
from hinny.state import CarriedLayer, LayerState

MIXERS = (Attention, CausalConv, Mamba1, Mamba2)
"""Modules with a seam `mix`: its first result is what the layer goes on with, the others are states for generation."""

UNREAD: dict[type[nn.Module], tuple[str, ...]] = {
    Attention: ("q", "k", "v", "o"), MLP: ("down",), Mamba2: ("in_proj.x", "in_proj.B", "in_proj.C", "in_proj.dt",
                                                              "out_proj"),
    Mamba1: ("in_proj.x", "in_proj.z", "x_proj.B", "x_proj.C", "dt_proj", "out_proj")}
"""Layer → linears whose products nothing reads when a block runs again: those that only `mix` reads, which is passed
over, and the last one, behind which nothing is saved. Where `mix` runs again too, the last one alone."""

PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten._scaled_mm.default: 0,
            torch.ops.aten.addmm.default: 1}
"""Matrix products under a linear → where their first factor stands among the arguments."""


def apply_recompute(objective: Objective, mode: str | list[str]) -> None:
    """Make blocks of `objective`, in place, keep less: "full", "selective", or the symbols of kinds of layer.

    Raises ConfigError for a kind that the model's pattern has not. After what replaces mixers, before FSDP.
    """
    kinds = list(LAYERS) if isinstance(mode, str) else mode
    if odd := [symbol for symbol in kinds if not isinstance(mode, str)
               and symbol not in parse(objective.model.config.pattern)]:
        names = ", ".join(f"{symbol} ({SYMBOLS.get(symbol, 'no kind of layer')})" for symbol in odd)
        raise ConfigError(f"parallel.recompute names {names}, which is not in model.pattern "
                          f"({objective.model.config.pattern}). Name kinds that are, or leave the key out.")
    chosen = tuple(LAYERS[symbol] for symbol in kinds)
    for block in objective.model.blocks:
        if isinstance(block.layer, chosen):
            block.forward = Recomputed(block, mode == "selective")  # type: ignore[method-assign]


class Recomputed:
    """A block's forward pass that runs again in the backward pass; `run` is the pass itself."""

    def __init__(self, block: Block, selective: bool) -> None:
        self.run: Callable[..., Tensor] = block.forward
        self.selective = selective
        self.made = _Made(block.layer, selective)

    def __call__(self, x: Tensor, state: LayerState | CarriedLayer, segments: Tensor | None) -> Tensor:
        """As Block.forward. Raises ValueError for a state where gradients are wanted: it would be updated twice. What a
        segment carries is not: it begins with the same tensors when it runs again.
        """
        if not torch.is_grad_enabled():
            return self.run(x, state, segments)
        if not (state is None or isinstance(state, CarriedLayer)):
            raise ValueError("a block that is recomputed cannot carry a state through a pass with gradients. "
                             "Use torch.no_grad(), or a model without recomputation.")
        # the model draws no random numbers
        return checkpoint(self.run, x, state, segments, use_reentrant=False, preserve_rng_state=False,
                          context_fn=self.made.contexts)


class _Kept(NamedTuple):
    """What a linear gave, or a mixer: its first result, and how many others there were, None if it gives no tuple."""

    tensor: Tensor
    wants_gradient: bool
    others: int | None


class _During:
    """The context of a block's pass, or of its repetition, which may be asked for more than once."""

    def __init__(self, made: _Made, kept: list[_Kept], replaying: bool) -> None:
        self.made, self.kept, self.replaying = made, kept, replaying
        self.next = 0
        self.before: _During | None = None

    def __enter__(self) -> None:
        self.before, self.made.now, self.next = self.made.now, self, 0

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None,
                 where: TracebackType | None) -> None:
        self.made.now = self.before

    def keep(self, made: Tensor, others: int | None) -> None:
        self.kept.append(_Kept(made.detach(), made.requires_grad, others))

    def again(self) -> _Kept:
        self.next += 1
        return self.kept[self.next - 1]


class _Made:
    """What of a layer is made once: sets `forward` of its projections, and `mix` of its mixers if `selective`."""

    def __init__(self, layer: nn.Module, selective: bool) -> None:
        self.now: _During | None = None
        self.replaced: list[nn.Module] = []
        unread = {layer.get_submodule(name) for name in UNREAD[type(layer)][0 if selective else -1:]}
        for projection in projections(layer):
            parts = list(projection.children()) or [projection]
            read = [part not in unread for part in parts]
            if selective or not any(read):
                self.replaced.append(projection)
                projection.forward = self._projection(projection.forward, read)
        for module in layer.modules():
            if selective and isinstance(module, MIXERS):
                module.mix = self._mixer(module.mix)

    def contexts(self) -> tuple[_During, _During]:
        """The contexts of a block's pass and of its repetition."""
        kept: list[_Kept] = []
        return _During(self, kept, replaying=False), _During(self, kept, replaying=True)

    def forget(self) -> None:
        """The projections run as their classes say."""
        for projection in self.replaced:
            del projection.forward
        self.replaced = []

    def _projection(self, forward: Callable[[Tensor], Any], read: list[bool]) -> Callable[[Tensor], Any]:
        def project(x: Tensor) -> Any:
            now = self.now
            if now is not None and now.replaying:
                with _Given([now.again().tensor if wanted else None for wanted in read]):
                    return forward(x)
            made = forward(x)
            if now is not None:
                parts = made if isinstance(made, tuple) else (made,)
                for part, wanted in zip(parts, read, strict=True):
                    if wanted:
                        now.keep(part, None)
            return made

        return project

    def _mixer(self, mix: Callable[..., Any]) -> Callable[..., Any]:
        def mixer(*args: Any, **options: Any) -> Any:
            now = self.now
            if now is None:
                return mix(*args, **options)
            if now.replaying:
                kept = now.again()
                assert kept.others is not None, "linears and mixers came in another order"
                first = kept.tensor.detach().requires_grad_(kept.wants_gradient)
                return (first, *(None,) * kept.others) if kept.others else first
            # what it saves is kept as it is, not made again with the block
            with saved_tensors_hooks(_itself, _itself):
                made = mix(*args, **options)
            first, *others = made if isinstance(made, tuple) else (made,)
            now.keep(first, len(others))
            return made

        return mixer


class _Given(TorchDispatchMode):
    """Inside, matrix products are not computed: `made` holds their values in turn. What autograd saves, it saves.

    None for values that nobody reads: they are NaN, so that it shows if somebody does.
    """

    def __init__(self, made: list[Tensor | None]) -> None:
        super().__init__()
        self.made = iter(made)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        first, second = args[PRODUCTS[func]:PRODUCTS[func] + 2]
        shape = (*first.shape[:-1], second.shape[-1])
        made = next(self.made)
        if made is not None:
            return made.view(shape)
        return torch.full((), torch.nan, dtype=first.dtype, device=first.device).expand(shape)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
