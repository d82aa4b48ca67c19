"""A language model: an embedding, a list of layers read off the pattern, a norm and a head.

One class serves the Transformer, Mamba, Mamba-2 and the hybrid: they differ in their recipe alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hinny import pattern
from hinny.config import ModelConfig
from hinny.layers import LAYERS, NORMS
from hinny.state import Carried, CarriedLayer, LayerState, State


class Block(nn.Module):
    """One layer in the residual stream: x + layer(norm(x))."""

    def __init__(self, config: ModelConfig, symbol: str) -> None:
        super().__init__()
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps)
        self.layer = LAYERS[symbol](config)

    def forward(self, x: Tensor, state: LayerState | CarriedLayer, segments: Tensor | None) -> Tensor:
        """x (b t d) → (b t d)."""
        return x + self.layer(self.norm(x), state, segments)


class Model(nn.Module):
    """Tokens (b t) → logits (b t v). Parameters are float32 until converted; the meta device is fine."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, symbol) for symbol in pattern.parse(config.pattern))
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter; the same seed gives the same weights on every machine with this PyTorch."""
        generator = torch.Generator().manual_seed(seed)
        for part in self.parts().values():
            self.init_part(part, generator)

    def parts(self) -> dict[str, nn.Module]:
        """What has weights, by name, in the order in which they are drawn."""
        layers = {f"layers.{i}": block for i, block in enumerate(self.layers)}
        head = {} if self.head is None else {"head": self.head}
        return {"embedding": self.embedding, **layers, "norm": self.norm, **head}

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """Fill the parameters of one of `parts`, the next numbers of `generator`."""
        if isinstance(part, Block):
            part.norm.init_weights(generator)
            part.layer.init_weights(generator)
        elif part is self.norm:
            self.norm.init_weights(generator)
        else:
            nn.init.normal_(cast(Tensor, part.weight), std=self.config.init_std, generator=generator)

    def forward(self, tokens: Tensor, state: State | None = None, segments: Tensor | None = None) -> Tensor:
        """tokens (b t) int64 → logits (b t v).

        With `state` the tokens continue the sequences that it holds, each at its own position, and it is updated. With
        `segments` (b t), a document number for each token, no layer sees across a change of number.
        """
        return F.linear(self.hidden(tokens, state, segments), self.output_weight)

    def hidden(self, tokens: Tensor, state: State | Carried | None = None, segments: Tensor | None = None) -> Tensor:
        """What the head reads: (b t d) after the last norm. Arguments as in `forward`.

        With a `Carried` state the tokens are a segment of longer sequences, whose documents `segments` may tell apart:
        Mamba layers go on from what it holds and leave in it what the next segment needs, attention sees the segment.
        """
        if isinstance(state, State) and segments is not None:
            raise ValueError("state and segments exclude each other: a state continues one document in each row; "
                             "give the packed documents as rows of their own.")
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream has the type of the products, as in the paper's code
            x = x.to(torch.get_autocast_dtype(x.device.type))
        states: Sequence[LayerState | CarriedLayer] = [None] * len(self.layers) if state is None else state.layers
        for block, layer_state in zip(self.blocks, states, strict=True):
            x = block(x, layer_state, segments)
        if isinstance(state, State):
            state.advance(tokens.shape[1])
        return self.norm(x)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix (v d): the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def init_state(self, batch_size: int, device: torch.device | str | None = None, capacity: int = 0) -> State:
        """The state of `batch_size` sequences before their first token, on the weights' device unless another is given.

        capacity: tokens that the first pass makes room for at once; more may follow.
        """
        device = self.embedding.weight.device if device is None else device
        state = State([block.layer.init_state(batch_size, device) for block in self.blocks],
                      torch.zeros(batch_size, dtype=torch.int64, device="cpu"))
        state.reserve(capacity)
        return state

    def carry(self) -> Carried:
        """What the first segment of sequences carries: nothing yet, in each layer that has a state."""
        return Carried([CarriedLayer() if symbol in pattern.CARRYING else None
                        for symbol in pattern.parse(self.config.pattern)])

    @property
    def blocks(self) -> list[Block]:
        """The layers with their norms, in order."""
        return cast(list[Block], list(self.layers))
