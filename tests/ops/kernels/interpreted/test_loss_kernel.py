"""Cross-entropy's kernels in the interpreter, in float32, against torch's in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import linear_cross_entropy, linear_cross_entropy_z, use_backend
from hinny.ops.kernels import launches, loss

V, D = 1000, 6


@pytest.fixture(autouse=True)
def short_tiles_and_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 256 logits and blocks of 4 rows, so that short inputs take several."""
    monkeypatch.setattr(loss, "MIN_ROWS", 4)
    use = {"UNROLL": 2, "THREADS": 32, "WIDTH": 4, "LOGIT_BYTES": 4 * 4 * 1024, "num_warps": 1, "num_stages": 1}
    with launches.trial({"loss_softmax": use}), use_backend("triton"):
        yield


def given(*shape: int, v: int = V) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"x": torch.randn(*shape, D, generator=random), "weight": torch.randn(v, D, generator=random),
            "targets": torch.randint(v, shape, generator=random)}


def gradients(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(total, inputs)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize(("shape", "v"), [((1,), 5), ((4,), 256), ((2, 5), V), ((3,), 1025)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_torchs_cross_entropy_with_every_gradient(shape: tuple[int, ...], v: int, reduction: str) -> None:
    inputs = given(*shape, v=v)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    found = gradients(linear_cross_entropy(**inputs, reduction=reduction), x, weight)
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    total = F.cross_entropy((x @ weight.T).flatten(0, -2), inputs["targets"].flatten(), reduction=reduction)
    close(found, gradients(total, x, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masked_rows_take_no_part_whatever_they_hold(reduction: str) -> None:
    inputs = given(2, 5)
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]])
    inputs["x"][~mask] = torch.nan
    inputs["targets"][~mask] = -100
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    found = gradients(linear_cross_entropy(**inputs, mask=mask, reduction=reduction), x, weight)
    x64, weight64 = (v.detach().double().requires_grad_() for v in (x, weight))
    total = F.cross_entropy(x64[mask] @ weight64.T, inputs["targets"][mask], reduction=reduction)
    close(found, gradients(total, x64, weight64))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("v", [200, V])
def test_the_z_loss_is_that_of_float64_with_every_gradient(reduction: str, masked: bool, v: int) -> None:
    inputs = given(2, 5, v=v)
    inputs["weight"] *= 2  # log-sum-exps from 8 to 20
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]]) if masked else None
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    total, z = linear_cross_entropy_z(**inputs, mask=mask, z_loss=0.05, reduction=reduction)
    x64, weight64 = (v.detach().double().requires_grad_() for v in (x, weight))
    logits, targets = (x64 if mask is None else x64[mask]) @ weight64.T, inputs["targets"]
    logits, targets = logits.flatten(0, -2), (targets if mask is None else targets[mask]).flatten()
    squares = 0.05 * torch.logsumexp(logits, 1) ** 2
    z64 = squares.mean() if reduction == "mean" else squares.sum()
    close([z], [z64.detach()])
    assert not z.requires_grad
    assert z > 1e-2 * total
    close(gradients(total, x, weight), gradients(F.cross_entropy(logits, targets, reduction=reduction) + z64,
                                                 x64, weight64))


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows_give_zero_and_zero_gradients(rows: int, reduction: str) -> None:
    inputs = given(rows)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    total = linear_cross_entropy(x, weight, inputs["targets"], torch.zeros(rows, dtype=torch.bool), reduction=reduction)
    assert total == 0
    for grad in torch.autograd.grad(total, (x, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_huge_logits_stay_finite() -> None:
    inputs = given(3)
    inputs["weight"] *= 1e4
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    found = gradients(linear_cross_entropy(**inputs), x, weight)
    total = F.cross_entropy(x.double() @ weight.double().T, inputs["targets"])
    for a, b in zip(found, gradients(total, x, weight), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def test_an_input_without_gradient_is_left_alone_and_none_at_all_gives_the_same_loss() -> None:
    inputs = given(6)
    whole = linear_cross_entropy(inputs["x"].requires_grad_(), inputs["weight"].requires_grad_(), inputs["targets"])
    expected = torch.autograd.grad(whole, (inputs["x"], inputs["weight"]))
    for name, b in zip(("x", "weight"), expected, strict=True):
        alone = {k: v.detach() for k, v in inputs.items()}
        alone[name].requires_grad_()
        loss_alone = linear_cross_entropy(**alone)
        assert torch.equal(torch.autograd.grad(loss_alone, alone[name])[0], b)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(**inputs), whole.detach())


@pytest.mark.parametrize(("target", "message"), [(V, "targets run from .* to 1000"), (-100, "targets run from -100")])
def test_a_target_outside_the_vocabulary_is_refused(target: int, message: str) -> None:
    inputs = given(5)
    inputs["targets"][3] = target
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**inputs)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_operator_says_what_it_returns(z_loss: float) -> None:
    inputs = given(5)
    torch.library.opcheck(torch.ops.hinny.linear_cross_entropy.default,
                          (inputs["x"].requires_grad_(), inputs["weight"].requires_grad_(), inputs["targets"], None,
                           torch.float32, z_loss, True, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("table", launches.tables())
def test_a_row_of_8192_logits_fills_a_tile_and_programs_are_no_larger_than_their_rows(table: str) -> None:
    """Of a large tile most threads would have nothing to do, and fewer rows would be at hand at once."""
    tiles = {}
    for v in (8192, 8193, 32000, 256000):
        use = launches.find(table, "loss_softmax", bits=16, v=v)
        tiles[v] = use["UNROLL"] * use["THREADS"] * use["WIDTH"]
    assert tiles[8192] == 8192
    assert all(tile < 2 * v for v, tile in tiles.items())
    assert list(tiles.values()) == sorted(tiles.values())
