"""Rotary positions (arXiv 2104.09864 section 3.2): pairs of dimensions turn by angles proportional to the position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hinny.ops import backend
from hinny.ops.inputs import check_rank, wide, without_autocast

FEW = 64
"""Tokens of decoding steps: with so many, launches and not their work take the time."""


@dataclass(frozen=True)
class Stretch:
    """How angles change so that sequences may be `factor` times as long as the `trained_len` tokens of training.

    fast, slow: None interpolates every pair (arXiv 2306.15595). Else YaRN (arXiv 2309.00071): pairs that turn `fast`
    times or more within trained_len keep their rates, those that turn `slow` times or less are interpolated, and those
    between in part.
    """

    factor: float
    trained_len: int
    fast: float | None = None
    slow: float | None = None

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines: YaRN's 0.1 ln(factor) + 1 on queries and keys alike."""
        return 1.0 if self.fast is None else 0.1 * math.log(self.factor) + 1.0

    def kept(self, base: float, rope_dim: int) -> Tensor:
        """(rope_dim/2,) float64: the share of each pair's rate that stays as it was trained."""
        if self.fast is None or self.slow is None:
            return torch.zeros(rope_dim // 2, dtype=torch.float64)
        # the pair, as a fraction of all, that turns so often within the trained length, rounded outwards
        first, last = (rope_dim * math.log(self.trained_len / (turns * 2 * math.pi)) / (2 * math.log(base))
                       for turns in (self.fast, self.slow))
        first, last = max(math.floor(first), 0), min(math.ceil(last), rope_dim - 1)
        ramp = (torch.arange(rope_dim // 2, dtype=torch.float64) - first) / max(last - first, 0.001)
        return 1.0 - ramp.clamp(0.0, 1.0)


def rope(x: Tensor, position: Tensor, *, base: float, rope_dim: int, stretch: Stretch | None = None) -> Tensor:
    """x (b t h p) with its first rope_dim dimensions rotated in pairs by an angle proportional to position.

    The pair (i, i + rope_dim/2) turns by position * base^(-2i/rope_dim), or as `stretch` changes that rate, and is
    multiplied by the stretch's amplitude; position (t,) or (b t) ints.
    The other dimensions pass. Angles are float32 at least; the result has x's dtype.
    Raises ValueError if rope_dim is odd or more than p, or position has another shape.
    """
    check_rank("rope", "x", x, "b t h p")
    b, t, _, p = x.shape
    if rope_dim % 2 or not 0 <= rope_dim <= p:
        raise ValueError(f"rope: rope_dim is {rope_dim}; it must be even and at most the head's {p} dimensions.")
    if tuple(position.shape) not in ((t,), (b, t)):
        raise ValueError(f"rope: position has shape {tuple(position.shape)}; it must be ({t},) or ({b}, {t}).")
    dtype, rates = wide(x.dtype), rope_rates(base, rope_dim, wide(x.dtype), x.device, stretch)
    amplitude = 1.0 if stretch is None else stretch.amplitude
    recorded = torch.is_grad_enabled() and x.requires_grad
    few = x.is_cuda and rope_dim and not recorded and b * t <= FEW and amplitude == 1.0
    if few and backend.chosen(x) == "triton":
        from hinny.ops.kernels import thin

        return thin.rope(x, position.expand(b, t), rates)
    with without_autocast(x):
        angles = position.to(dtype)[..., None] * rates  # ([b] t rope_dim/2)
        cos, sin = angles.cos(), angles.sin()
        if amplitude != 1.0:
            cos, sin = cos * amplitude, sin * amplitude
        if rope_dim and backend.chosen(x) == "triton":
            from hinny.ops.kernels import rope as kernels  # here alone: Triton is imported where it runs

            return kernels.rope(x, cos, sin)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        rotated, rest = x.split([rope_dim, p - rope_dim], -1)
        first, second = rotated.to(dtype).chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([turned.to(x.dtype), rest], -1)


@cache
def rope_rates(base: float, rope_dim: int, dtype: torch.dtype, device: torch.device,
               stretch: Stretch | None = None) -> Tensor:
    """(rope_dim/2,): the angle of each pair from one position to the next."""
    rates = base ** -(torch.arange(0, rope_dim, 2, dtype=dtype, device=device) / max(rope_dim, 1))
    if stretch is None:
        return rates
    kept = stretch.kept(base, rope_dim).to(device=device, dtype=dtype)
    return rates * (kept + (1.0 - kept) / stretch.factor)
