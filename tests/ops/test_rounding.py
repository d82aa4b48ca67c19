"""Stochastic rounding: neighbours only, right on average, the same for one seed, and Philox as published."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hinny.ops import make_replay, rounding, ssd_update
from hinny.ops.rounding import round_stochastically

DTYPES = [torch.bfloat16, torch.float16]
ONE_SLOT = torch.zeros(1, dtype=torch.int64)


def rounded(values: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return round_stochastically(values[None], dtype, torch.tensor(seed), ONE_SLOT)[0]


@pytest.mark.parametrize(("rounds", "words"), [(7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
                                               (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))])
def test_the_bits_are_those_of_philox(monkeypatch: pytest.MonkeyPatch, rounds: int, words: tuple[int, ...]) -> None:
    """The known answers of Random123 for a key and a counter of zero."""
    monkeypatch.setattr(rounding, "ROUNDS", rounds)
    assert tuple(int(word) for word in rounding._philox(torch.tensor(0), ONE_SLOT, ONE_SLOT)) == words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-8, 3e-6, 1e-4, 0.1, 7.0, 3e4])
def test_the_mean_is_kept(dtype: torch.dtype, scale: float) -> None:
    """2^12 values, each rounded 64 times: neighbours alone, and errors of the mean and of each value as of coins."""
    values = (torch.randn(1, 2 ** 12, generator=torch.Generator().manual_seed(1)) * scale).clamp(-6e4, 6e4)
    copies = values.expand(64, 1, -1)
    errors = round_stochastically(copies, dtype, torch.tensor(3), torch.arange(64)).double() - copies.double()
    below, above = neighbours(values, dtype)
    down, up = below.double() - values.double(), above.double() - values.double()
    assert ((errors == down) | (errors == up)).all()
    variance = -down * up
    assert abs(float(errors.sum())) < 4 * float(64 * variance.sum()) ** 0.5
    fair = variance > (up - down) ** 2 / 64
    squares = errors.mean(0)[fair] ** 2 / (variance[fair] / 64)
    assert abs(float(squares.mean()) - 1) < 4 * float(squares.std()) / squares.numel() ** 0.5


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of `dtype` that is not above, and the smallest that is not below."""
    near = values.to(dtype)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    below = torch.where(near > values, torch.nextafter(near, -infinity), near)
    return below, torch.where(near < values, torch.nextafter(near, infinity), near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_goes_up_as_often_as_it_is_far_from_below(dtype: torch.dtype) -> None:
    places = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    for part in (1 / 8, 1 / 2, 0.9):
        for below in (1.0, -3.0, 2.0 ** -10):
            exponent = torch.tensor(below).frexp().exponent - 1
            unit = 2.0 ** (int(exponent) - places)
            found = rounded(torch.full((2 ** 14,), below + part * unit), dtype).double()
            assert set(found.tolist()) == {below, below + unit}
            share = float((found > below).double().mean())
            assert abs(share - part) < 5 * (part * (1 - part)) ** 0.5 / 2 ** 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_representable_stays(dtype: torch.dtype) -> None:
    bits = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    for seed in range(3):
        torch.testing.assert_close(rounded(every.float(), dtype, seed), every, rtol=0, atol=0, equal_nan=True)
    if dtype == torch.bfloat16:
        nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
        assert rounded(nans, dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_seed_gives_the_same_bits_and_another_gives_others(dtype: torch.dtype) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(values, dtype, 5), rounded(values, dtype, 5))
    for seed in (6, 5 + 2 ** 40, -5):
        assert not torch.equal(rounded(values, dtype, 5), rounded(values, dtype, seed))
    both = round_stochastically(values.expand(2, -1), dtype, torch.tensor(5), torch.tensor([0, 1]))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_in_16_bits_keeps_small_updates(dtype: torch.dtype, replayed: bool) -> None:
    """A state of 1 that grows by 2^-13 a token, 64 times: rounded to nearest, it stays 1."""
    inputs = {"x": torch.full((1, 1, 4, 16), 2.0 ** -13), "dt": torch.ones(1, 1, 4), "A": torch.zeros(4),
              "B": torch.ones(1, 1, 1, 32), "C": torch.ones(1, 1, 1, 32)}
    nearest, random = torch.ones(1, 4, 16, 32, dtype=dtype), torch.ones(1, 4, 16, 32, dtype=dtype)
    replay = make_replay(random, 1, torch.float32, 2) if replayed else None
    for step in range(64):
        ssd_update(nearest, **inputs)
        ssd_update(random, **inputs, seed=step, replay=replay)
    assert (nearest == 1).all()
    grown = random.double() - 1
    expected = 2.0 ** -7 - (2 * 2.0 ** -13 if replayed else 0)  # two tokens are still buffered
    assert abs(float(grown.mean()) - expected) < 5 * float(grown.std()) / grown.numel() ** 0.5
