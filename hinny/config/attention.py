"""The [model.attention] section of a recipe, and how its positions reach past the trained length."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hinny.config.section import Positive, Section


class RopeScaling(Section):
    """Rotary positions for sequences longer than the trained ones.

    interpolation: every position divided by the factor (arXiv 2306.15595). yarn: fast pairs turn as before, slow ones
    are interpolated, those between in part, and cosines and sines grow by 0.1 ln(factor) + 1 (arXiv 2309.00071).
    """

    method: Literal["interpolation", "yarn"]
    factor: Annotated[float, Field(gt=1.0)]
    trained_len: Positive
    """Tokens of the sequences that the model was trained on before any scaling; it reaches to factor times as many."""
    beta_fast: Annotated[float, Field(gt=0.0)] | None = None
    """yarn: pairs that turn at least so often within trained_len are left as they are; 32 without it."""
    beta_slow: Annotated[float, Field(gt=0.0)] | None = None
    """yarn: pairs that turn at most so often are interpolated in full; 1 without it."""

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        for key in ("beta_fast", "beta_slow"):
            if self.method == "interpolation" and getattr(self, key) is not None:
                raise ValueError(f'{key} has no effect with method = "interpolation"; remove it.')
        if self.method == "yarn" and self.fast <= self.slow:
            raise ValueError(f"beta_fast ({self.fast:g}) must be above beta_slow ({self.slow:g}).")
        return self

    @property
    def fast(self) -> float:
        """Turns within trained_len from which on a pair is left as it is."""
        return 32.0 if self.beta_fast is None else self.beta_fast

    @property
    def slow(self) -> float:
        """Turns within trained_len up to which a pair is interpolated in full."""
        return 1.0 if self.beta_slow is None else self.beta_slow

    @property
    def reach(self) -> int:
        """Tokens up to which positions are told as training knew them."""
        # as it is written: 1.15 is 115 hundredths
        return math.floor(Fraction(str(self.factor)) * self.trained_len)


class AttentionConfig(Section):
    """Causal grouped-query attention, pattern symbol `*`."""

    n_heads: Positive
    n_kv_heads: Positive
    """Key/value heads (the paper's KV groups); equal to n_heads for multi-head attention."""
    head_dim: Positive
    positions: Literal["none", "rope"]
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of head_dim that is rotated; only with positions = "rope"."""
    rope_base: Annotated[float, Field(gt=1.0)] | None = None
    rope_scaling: RopeScaling | None = None
    """How positions beyond the trained ones are told; as trained without it."""
    score_scale: Annotated[float, Field(gt=0.0)] | None = None
    """Factor of the scores besides 1 / sqrt(head_dim); 1 without it. Above 1 it sharpens attention over more keys than
    were trained on, as log-n scaling does for attention without positions (arXiv 2202.12172)."""

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads}).")
        given = [k for k in ("rope_fraction", "rope_base", "rope_scaling") if getattr(self, k) is not None]
        if self.positions == "none" and given:
            raise ValueError(f'{given[0]} has no effect with positions = "none"; remove it or set positions = "rope".')
        if self.positions == "rope" and not {"rope_fraction", "rope_base"} <= set(given):
            raise ValueError('positions = "rope" needs both rope_fraction and rope_base.')
        if self.positions == "rope" and (self.rope_dim < 2 or self.rope_dim % 2):
            raise ValueError(f"rope_fraction ({self.rope_fraction}) of head_dim ({self.head_dim}) rotates "
                             f"{self.rope_dim} dimensions; it must be an even number of at least 2.")
        return self

    @property
    def rope_dim(self) -> int:
        """How many of the head's dimensions are rotated."""
        return int(self.head_dim * (self.rope_fraction or 0.0))
