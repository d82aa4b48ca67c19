"""Linear layers: torch's by name and parameters, and parts that are replaced or listened to are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import PATTERNS, small_model
from torch import Tensor, nn

from hinny.layers.linear import Linear, SplitLinear


def split() -> SplitLinear:
    made = SplitLinear(8, {"x": 4, "dt": 3})
    made.init_weights(torch.Generator().manual_seed(0))
    return made.double()


def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_parts_are_torchs_linear_layers_with_their_names() -> None:
    made = split()
    assert list(made.state_dict()) == ["x.weight", "dt.weight"]
    assert all(isinstance(part, nn.Linear) and part.bias is None for part in made.children())
    for part, y in zip(made.children(), made(x()), strict=True):
        assert torch.equal(y, F.linear(x(), part.weight))
        assert torch.equal(y, part(x()))


def test_the_weights_are_those_that_stand_there_when_it_runs() -> None:
    """As FSDP and tensor parallelism put them, behind the parameters."""
    made, shard = split(), torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
    object.__setattr__(made.x, "weight", shard)
    first, second = made(x())
    assert torch.equal(first, F.linear(x(), shard))
    assert second.shape == (2, 5, 3)
    (first.sum() + second.sum()).backward()
    assert shard.grad is not None
    assert made.dt.weight.grad is not None


class _Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_part_of_another_class_is_called() -> None:
    made, expected = split(), split()(x())
    other = _Doubled(8, 3).double()
    other.load_state_dict(made.dt.state_dict())
    made.dt = other
    first, second = made(x())
    assert torch.equal(first, expected[0])
    assert torch.equal(second, 2 * expected[1])


@pytest.mark.parametrize("listen", [
    lambda part, told: part.register_forward_hook(lambda *given: told.append(given[2].shape)),
    lambda part, told: part.register_forward_pre_hook(lambda *given: told.append(given[1][0].shape)),
    lambda part, told: part.register_full_backward_hook(lambda *given: told.append(given[2][0].shape))])
def test_hooks_of_a_part_run(listen: Callable[..., Any]) -> None:
    made, told = split(), []
    listen(made.dt, told)
    sum(y.sum() for y in made(x().requires_grad_())).backward()
    assert len(told) == 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_projection_of_a_layer_is_ours(pattern: str) -> None:
    model = small_model(pattern)
    found = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    assert found
    assert {type(module) for module in found} == {Linear}
