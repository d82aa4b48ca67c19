"""The kernel that looks for the likeliest tokens, beside a search by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hinny.ops.kernels.likeliest import likeliest


def rows(n: int, v: int) -> torch.Tensor:
    """Numbers of a few values: many are equal to the largest."""
    return torch.randint(-4, 4, (n, v), generator=torch.Generator().manual_seed(v)).float()


@pytest.mark.parametrize(("n", "v"), [(1, 1), (1, 5000), (2, 131072), (3, 70001), (9, 40000)])
def test_the_first_of_the_largest_is_found(n: int, v: int) -> None:
    logits = rows(n, v)
    for _ in range(2):  # its counts are zeros again
        best, tokens = likeliest(logits)
        np.testing.assert_array_equal(tokens.numpy(), np.argmax(logits.numpy(), axis=1))
        assert torch.equal(best, logits.amax(1))


def test_rows_may_lie_apart_and_have_any_signs() -> None:
    wide = rows(4, 9000)
    logits = wide[:, :4500]
    logits[0] -= 100
    logits[1] = -0.0
    logits[1, 40] = 0.0
    logits[2] = float("-inf")
    best, tokens = likeliest(logits)
    assert best.tolist()[:3] == [logits[0].max(), 0.0, float("-inf")]
    assert tokens.tolist() == [int(logits[0].argmax()), 0, 0, int(np.argmax(logits[3].numpy()))]


@pytest.mark.parametrize("place", [0, 4321])
def test_nan_is_above_all(place: int) -> None:
    logits = rows(2, 5000)
    logits[1, 17] = float("inf")
    logits[1, place] = float("nan")
    logits[0, 3] = float("inf")
    best, tokens = likeliest(logits)
    assert best[0] == float("inf")
    assert best[1].isnan()
    assert tokens.tolist() == [3, place]
