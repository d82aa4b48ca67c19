"""The likeliest token of a row: the first of equal ones, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

from hinny import ops


def test_the_first_of_equal_ones_is_taken() -> None:
    best, tokens = ops.likeliest(torch.tensor([[1.0, 3.0, 2.0, 3.0], [-1.0, -2.0, -1.0, -5.0]]))
    assert best.tolist() == [3.0, -1.0]
    assert tokens.tolist() == [1, 0]
    assert tokens.dtype == torch.int64


def test_nan_is_told() -> None:
    best, tokens = ops.likeliest(torch.tensor([[1.0, float("nan"), 2.0]]))
    assert best.isnan().all()
    assert tokens.tolist() == [1]


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(ValueError, match="n v"):
        ops.likeliest(torch.zeros(3))
    with pytest.raises(RuntimeError, match="no gradients"):
        ops.likeliest(torch.zeros(1, 3, requires_grad=True))
