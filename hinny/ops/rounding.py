"""Stochastic rounding: a value goes up with the probability of its distance from below, so that the mean is kept.

A state in 16 bits that is rounded to nearest forgets every update smaller than half a unit in its last place; rounded
like this, many such updates add up to what they should (Gupta et al., arXiv 1502.02551). The random bits are Philox
4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of a seed and of the element's place, so one
seed gives the same bits on every device and backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
"""The fewest rounds of Philox 4x32 that its authors found to pass every test of BigCrush."""
SHARED = 8
"""Neighbours along the last axis that share one Philox block: four words, 16 bits for each of them."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def as_seed(op: str, seed: int | Tensor | None, state: Tensor) -> Tensor | None:
    """A seed for rounding `state` as one int64 on its device. Raises ValueError if there is nothing to round."""
    if seed is None:
        return None
    if state.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: a seed is for stochastic rounding to bfloat16 or float16; the state is {state.dtype}.")
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=state.device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"{op}: seed has {seed.numel()} elements of {seed.dtype}; it must be one of torch.int64.")
    return seed


def round_stochastically(values: Tensor, dtype: torch.dtype, seed: Tensor, streams: Tensor) -> Tensor:
    """`values` in bfloat16 or float16, up or down at random with the mean kept.

    values (s ... n) floating, taken as float32; seed: one int64; streams (s,) int64 below 2^32: rows of one number get
    the same random bits. What is representable stays as it is, also infinities and NaN. The mean is exact for normal
    results and within 2^-17 units in the last place for subnormal ones. Differentiable in nothing.
    """
    values = values.float()
    noise = _noise(seed, streams, values.shape)
    if dtype == torch.bfloat16:
        # float32 with its low half cut off is bfloat16: a carry out of the low half is "up", whatever the exponent
        bits = values.contiguous().view(torch.int32).to(torch.int64)
        bits = (bits + noise) & ~0xFFFF
        rounded = ((bits + 2 ** 31) % 2 ** 32 - 2 ** 31).to(torch.int32).view(torch.float32)
        return torch.where(values.isnan(), values, rounded).to(dtype)
    # in units of the last place, which below float16's smallest normal number stay 2^-24
    exponent = (values.contiguous().view(torch.int32) & 0x7F800000).clamp(min=113 << 23)
    unit = exponent - (10 << 23)
    scaled = values * ((254 << 23) - unit).view(torch.float32)
    below = scaled.floor()
    up = (scaled - below) * 2.0 ** 16 > noise.float()
    return ((below + up) * unit.view(torch.float32)).to(dtype)


def _noise(seed: Tensor, streams: Tensor, shape: torch.Size) -> Tensor:
    """Uniform integers of 0 ... 2^16 - 1 for a tensor (s ... n) of `shape`, as int64."""
    s, n = shape[0], shape[-1]
    blocks = -(-n // SHARED)
    count = blocks * (shape.numel() // (s * n))
    places = torch.arange(count, device=streams.device).expand(s, count)
    words = _philox(seed, places, streams[:, None].expand(s, count))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return halves.view(*shape[:-1], blocks * SHARED)[..., :n]


def _philox(seed: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    """The four 32-bit words, as int64, of Philox 4x32 at the counters (first, second, 0, 0) with a 64-bit key."""
    counters = [first & _WORD, second & _WORD, torch.zeros_like(first), torch.zeros_like(first)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(ROUNDS):
        # the products overflow int64 and wrap: their 64 bits are right, and the masks take off the sign
        low, high = ((counter * factor) for counter, factor in zip(counters[::2], _MULTIPLIERS, strict=True))
        counters = [((high >> 32) & _WORD) ^ counters[1] ^ key[0], high & _WORD,
                    ((low >> 32) & _WORD) ^ counters[3] ^ key[1], low & _WORD]
        key = [(part + step) & _WORD for part, step in zip(key, _KEY_STEPS, strict=True)]
    return counters
