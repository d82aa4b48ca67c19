"""Sampling: what each option keeps, and that options without effect are refused."""

from __future__ import annotations

import pytest
import torch

from hinny.errors import RequestError
from hinny.infer.sampler import Sampling, sample

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


def _draws(sampling: Sampling, n: int = 4000) -> torch.Tensor:
    return sample(LOGITS.expand(n, -1), sampling, sampling.generator())


def test_greedy_takes_the_likeliest() -> None:
    assert sample(LOGITS, Sampling(), None).tolist() == [1]


def test_draws_follow_the_distribution() -> None:
    shares = torch.bincount(_draws(Sampling(temperature=1.0, seed=1)), minlength=4) / 4000
    torch.testing.assert_close(shares, LOGITS.exp()[0], rtol=0, atol=0.03)


def test_temperature_sharpens() -> None:
    shares = torch.bincount(_draws(Sampling(temperature=0.5, seed=1)), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([1.0, 16, 4, 9]) / 30, rtol=0, atol=0.03)


def test_top_k_keeps_k() -> None:
    assert set(_draws(Sampling(temperature=1.0, top_k=2, seed=1)).tolist()) == {1, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.41, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p: float, kept: set[int]) -> None:
    assert set(_draws(Sampling(temperature=1.0, top_p=top_p, seed=1)).tolist()) == kept


def test_a_seed_repeats_itself() -> None:
    first, again = (_draws(Sampling(temperature=1.0, seed=5), 50) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, _draws(Sampling(temperature=1.0, seed=6), 50))


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(temperature=1.0, top_k=0),
                                     dict(temperature=1.0, top_p=0.0), dict(temperature=1.0, top_p=1.5),
                                     dict(top_k=5), dict(top_p=0.9), dict(seed=1)])
def test_an_option_acts_or_raises(options: dict) -> None:
    with pytest.raises(RequestError):
        Sampling(**options)
