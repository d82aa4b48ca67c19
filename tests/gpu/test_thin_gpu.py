"""The kernels for few rows on a GPU, in chains in which each begins before the one before it has ended."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import add_norm, gated_rms_norm, thin_linear
from hinny.ops.kernels import thin

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(18560, 4096), (4096, 8192), (4096, 16384), (6144, 512), (48, 1024)])
@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
def test_a_product_of_few_rows_is_as_exact_as_its_type(m, n, k, activation):
    x, w = normal(m, k).to(BF16), (normal(n, k, seed=1) / k ** 0.5).to(BF16)
    assert thin.takes(x, w)
    with torch.no_grad():
        y = thin_linear(x, w, activation=activation)
    wanted = x.double() @ w.double().T
    wanted = {"gelu": F.gelu, "relu2": lambda v: v.relu().square(), None: lambda v: v}[activation](wanted)
    assert not y.isnan().any()
    assert far(y, wanted) < 2.5e-3


@pytest.mark.parametrize("m", [1, 5, 32])
@torch.no_grad()
def test_a_chain_recorded_as_a_graph_repeats_itself(m):
    """300 launches, each of which reads what the one before wrote: one that began too early would read old numbers."""
    w = [(normal(4096, 4096, seed=i) / 64).to(BF16) for i in range(3)]
    gain, x = normal(4096, seed=9), normal(m, 4096).to(BF16)
    before = torch.empty_like(x)

    def chain(rows: Tensor) -> Tensor:
        total, delta = rows, None
        for i in range(100):
            total, normed = add_norm(total, delta, gain, None, 1e-5)
            delta = gated_rms_norm(thin_linear(normed, w[i % 3]), normed, gain, 1e-5, 512)
        return total

    wanted = [chain(x * (i + 1)).clone() for i in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(before)
    for i in (2, 0, 1):
        before.copy_(x * (i + 1))
        graph.replay()
        assert torch.equal(found, wanted[i])
    plain, delta = x.double(), torch.zeros_like(x).double()
    for i in range(3):
        plain = plain + delta
        normed = plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()
        y = (normed @ w[i % 3].double().T * F.silu(normed)).unflatten(-1, (-1, 512))
        delta = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * gain.double()
    total, got = x, None
    for i in range(3):
        total, normed = add_norm(total, got, gain, None, 1e-5)
        got = gated_rms_norm(thin_linear(normed, w[i % 3]), normed, gain, 1e-5, 512)
    assert far(got, delta) < 2e-2


@torch.no_grad()
def test_a_layer_norm_of_few_rows_is_pytorchs():
    x, delta, weight, bias = normal(8, 4096).to(BF16), normal(8, 4096, seed=1).to(BF16), normal(4096), normal(4096)
    total, y = add_norm(x, delta, weight, bias, 1e-5)
    assert torch.equal(total, x + delta)
    wanted = F.layer_norm((x + delta).double(), (4096,), weight.double() + 1, bias.double(), 1e-5)
    assert far(y, wanted) < 2.5e-3
