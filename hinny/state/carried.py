"""What one segment of a sequence gives the next one in training: SSM states and convolution inputs, no gradients.

Backpropagation is cut between segments (state passing, arXiv 2507.02782). What a segment begins with is never changed,
so a layer that runs again for its backward pass reads what its forward pass read; what it leaves is kept beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class CarriedLayer:
    """A Mamba layer's part: conv (b ch w-1) and ssm as in SSMState, None before the first token, which is zeros."""

    conv: Tensor | None = None
    ssm: Tensor | None = None
    left: tuple[Tensor, Tensor] | None = None
    """conv and ssm behind the segment's last token, detached; None before the layer has run."""

    def advance(self, mix: Callable[..., tuple[Tensor, Tensor, Tensor]], step: Callable[..., Tensor] | None,
                *tokens: Tensor) -> Tensor:
        """As SSMState.advance, but what was there stays, and `step`, which would change it, is not used."""
        y, ssm, conv = mix(*tokens, self.ssm, self.conv)
        # selective recomputation passes over what mixes tokens when a block runs again: there are no states then
        if ssm is not None and conv is not None:
            self.left = conv.detach(), ssm.detach()
        return y

    def onward(self, begins: Tensor | None) -> CarriedLayer:
        """As Carried.onward."""
        assert self.left is not None, "a layer hands on what it left, so it must have run"
        if begins is None:
            return CarriedLayer(*self.left)
        conv, ssm = (part.masked_fill(begins.view(-1, *[1] * (part.dim() - 1)), 0) for part in self.left)
        return CarriedLayer(conv, ssm)


@dataclass
class Carried:
    """What all layers of a model carry into one segment; None for those that carry nothing (attention, MLP)."""

    layers: list[CarriedLayer | None]

    def onward(self, begins: Tensor | None = None) -> Carried:
        """What the next segment begins with, after every layer has run.

        begins (b,) bool: rows whose next token begins another document, and so finds zeros; None: no row's does.
        """
        return Carried([None if layer is None else layer.onward(begins) for layer in self.layers])
