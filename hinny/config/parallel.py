"""[parallel]: how a run is spread over processes, and what it recomputes. No key changes what is computed."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from hinny.config.section import Positive, Section
from hinny.errors import ConfigError

SYMBOLS = "M1*-"

DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")
"""The dimensions of the mesh, outermost first: ranks that are next to each other share the layers' inner products."""


class ParallelConfig(Section):
    """One process without this section; the product of the five sizes is the number of processes."""

    replicate: Positive = 1
    """Copies of the whole model that see different sequences (HSDP's outer dimension)."""
    shard: Positive | None = None
    """Ranks that share weights, gradients and optimiser and see different sequences (FSDP); what the other sizes leave
    over without it."""
    context: Positive = 1
    """Ranks that share the tokens of each sequence."""
    tensor: Positive = 1
    """Ranks that share the heads, channels and words of each layer (with sequence parallelism between layers)."""
    pipeline: Positive = 1
    """Stages of layers, cut at the `|` in model.pattern."""
    schedule: Literal["1f1b", "gpipe"] | None = None
    """Order of the stages' passes; 1f1b without it. Only with pipeline above 1."""
    recompute: Literal["full", "selective"] | list[str] | None = None
    """What the backward pass computes again instead of keeping: whole layers; all but matrix products and attention;
    whole layers of some kinds, by symbol; nothing without it."""
    compile: bool = False
    """torch.compile of every layer."""
    float8: bool = False
    """Matrix products of the layers' linears in float8 (torchao, dynamic scales). The one key that rounds more."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.schedule is not None and self.pipeline == 1:
            raise ValueError("schedule has no effect with pipeline = 1; remove it.")
        if isinstance(self.recompute, list):
            odd = [symbol for symbol in self.recompute if symbol not in SYMBOLS or len(symbol) != 1]
            if odd or not self.recompute:
                raise ValueError(f"recompute ({', '.join(self.recompute) or 'an empty list'}) must name layer kinds by "
                                 f'symbol ({", ".join(SYMBOLS)}), or be "full" or "selective".')
        return self

    def sizes(self, world: int) -> dict[str, int]:
        """Dimension of the mesh → size, for `world` processes; ConfigError with the equation if they do not fit."""
        given = {name: getattr(self, name) for name in DIMENSIONS}
        others = math.prod(size for name, size in given.items() if name != "shard")
        if given["shard"] is None and world % others == 0:
            given["shard"] = world // others
        if given["shard"] is None or others * given["shard"] != world:
            equation = " x ".join(f"{name} {given[name] or 'what is left'}" for name in DIMENSIONS)
            product = f"{others} x what is left" if given["shard"] is None else str(others * given["shard"])
            raise ConfigError(f"[parallel]: {equation} = {product}, but there are {world} processes. Start as many as "
                              "the product (torchrun --nproc-per-node N), or change the sizes.")
        return given
