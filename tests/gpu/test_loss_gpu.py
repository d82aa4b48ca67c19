"""Cross-entropy's kernels on a GPU: loss and gradients against float64, beside the torch form in the same type."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import linear_cross_entropy, linear_cross_entropy_z, use_backend
from hinny.ops.kernels import launches

pytestmark = pytest.mark.gpu
D = 64
FLOOR = 1e-6


def draw(rows: int, v: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, D, device="cuda", generator=random)
    weight = torch.randn(v, D, device="cuda", generator=random) / 4
    return x.to(dtype), weight.to(dtype), torch.randint(v, (rows,), device="cuda", generator=random)


def run(backend: str, x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None,
        reduction: str = "mean", autocast: bool = False) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with use_backend(backend), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        total = linear_cross_entropy(x, weight, targets, mask, reduction=reduction)
    return [total.detach(), *torch.autograd.grad(total, (x, weight))]


def exact(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, reduction: str) -> list[Tensor]:
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    rows, wanted = (x, targets) if mask is None else (x[mask], targets[mask])
    total = F.cross_entropy(rows @ weight.T, wanted, reduction=reduction)
    return [total.detach(), *torch.autograd.grad(total, (x, weight))]


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("v", [17, 50257])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_z_loss_is_that_of_float64_with_every_gradient(v: int, reduction: str) -> None:
    x, weight, targets = draw(300, v)
    mask = torch.arange(300, device="cuda") % 3 > 0
    found = [t.detach().requires_grad_() for t in (x, weight)]
    with use_backend("triton"):
        total, z = linear_cross_entropy_z(*found, targets, mask, z_loss=0.02, reduction=reduction)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = x64[mask] @ weight64.T
    squares = 0.02 * logits.logsumexp(1) ** 2
    z64 = squares.mean() if reduction == "mean" else squares.sum()
    total64 = F.cross_entropy(logits, targets[mask], reduction=reduction) + z64
    assert error(z, z64.detach()) < 1e-5
    for a, b in zip([total.detach(), *torch.autograd.grad(total, found)],
                    [total64.detach(), *torch.autograd.grad(total64, (x64, weight64))], strict=True):
        assert error(a, b) < 1e-4


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 700), v=st.sampled_from([17, 1000, 8192, 16000, 50257]),
       dtype=st.sampled_from(["bf16", "fp32", "autocast"]),
       masked=st.booleans(), reduction=st.sampled_from(["mean", "sum"]), seed=st.integers(0, 9))
def test_loss_and_gradients_are_as_exact_as_the_torch_form(
    rows: int, v: int, dtype: str, masked: bool, reduction: str, seed: int
) -> None:
    x, weight, targets = draw(rows, v, seed, torch.bfloat16 if dtype == "bf16" else torch.float32)
    mask = None
    if masked:
        mask = torch.rand(rows, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) < 0.7
        mask[rows // 2] = True
        x[~mask] = torch.nan
    call = functools.partial(run, x=x, weight=weight, targets=targets, mask=mask, reduction=reduction,
                             autocast=dtype == "autocast")
    expected = exact(x, weight, targets, mask, reduction)
    for found, plain, right in zip(call("triton"), call("torch"), expected, strict=True):
        assert found.dtype == plain.dtype
        assert error(found, right) <= 1.5 * error(plain, right) + FLOOR


def test_many_blocks_give_what_one_gives_and_two_runs_the_same_bits() -> None:
    x, weight, targets = draw(1000, 5003, dtype=torch.bfloat16)
    mask = torch.rand(1000, device="cuda") < 0.7
    whole = run("triton", x, weight, targets, mask)
    for a, b in zip(run("triton", x, weight, targets, mask), whole, strict=True):
        assert torch.equal(a, b)
    use = launches.find(launches.generation(x.device), "loss_softmax", bits=16, v=5003)
    with launches.trial({"loss_softmax": use | {"LOGIT_BYTES": 1}}):
        blocks = run("triton", x, weight, targets, mask)
    for a, b in zip(blocks, whole, strict=True):
        # cuBLAS may add up in another order for 128 rows, before logits are rounded
        assert error(a, b.double()) < 2 ** -8


@pytest.mark.parametrize("target", [-1, 1000, -100, 2 ** 40])
def test_a_target_outside_the_vocabulary_is_refused_and_a_masked_one_is_not(target: int) -> None:
    x, weight, targets = draw(300, 1000)
    expected = run("triton", x[:-1], weight, targets[:-1])
    targets[-1] = target
    with pytest.raises(ValueError, match="targets run from"):
        run("triton", x, weight, targets)
    found = run("triton", x, weight, targets, torch.arange(300, device="cuda") < 299)
    assert error(found[0], expected[0].double()) < 2 ** -8


def test_blocks_past_2_to_the_31_logits() -> None:
    """Of the last rows: the torch form has them alone, and each row's loss and gradient is its own."""
    x, weight, targets = draw(8704, 256000, dtype=torch.bfloat16)
    last = slice(-64, None)
    only = torch.zeros(8704, dtype=torch.bool, device="cuda")
    only[last] = True
    use = launches.find(launches.generation(x.device), "loss_softmax", bits=16, v=256000)
    with launches.trial({"loss_softmax": use | {"LOGIT_BYTES": 2 ** 33}}):
        found = run("triton", x, weight, targets, only, reduction="sum")
        whole = run("triton", x, weight, targets, reduction="sum")
    plain = run("torch", x[last], weight, targets[last], reduction="sum")
    for a, b in ((found[0], plain[0]), (found[1][last], plain[1]), (whole[1][last], plain[1]), (found[2], plain[2])):
        assert error(a, b.double()) < 2 ** -7
    assert (found[1][:-64] == 0).all()


def test_it_compiles_into_one_graph() -> None:
    x, weight, targets = draw(200, 1000, dtype=torch.bfloat16)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x * 1, weight, targets)

    found = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        total = call(x, weight)
        found.append([total, *torch.autograd.grad(total, (x, weight))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_it_is_captured_in_a_graph() -> None:
    x, weight, targets = draw(200, 1000, dtype=torch.bfloat16)
    with torch.no_grad(), use_backend("triton"):
        expected = linear_cross_entropy(x, weight, targets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total = linear_cross_entropy(x, weight, targets)
    graph.replay()
    assert torch.equal(total, expected)
