"""Attention within packed documents against its definition in float64, every gradient, in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hinny import ops
from hinny.ops.kernels import attention as kernels
from hinny.ops.kernels.launches import trial

TOLERANCE = 2e-6
SMALL = {"attention_forward": {"QUERIES": 32, "KEYS": 16, "num_warps": 4, "num_stages": 1},
         "attention_backward_delta": {"ROWS": 16, "num_warps": 4, "num_stages": 1},
         "attention_backward_keys": {"QUERIES": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1},
         "attention_backward_queries": {"QUERIES": 32, "KEYS": 16, "num_warps": 4, "num_stages": 1}}
"""Tiles so small that short rows have all kinds of them."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float().double()


def values(b: int, t: int, h: int, g: int, p: int) -> dict[str, Tensor]:
    return {"q": 2 * normal(b, t, h, p, seed=0), "k": normal(b, t, g, p, seed=1), "v": normal(b, t, g, p, seed=2)}


def results(run: Callable[..., Tensor], given: dict[str, Tensor], segments: Tensor, dtype: torch.dtype) -> dict:
    leaves = {name: v.to(dtype).requires_grad_() for name, v in given.items()}
    y = run(*leaves.values(), segments)
    grads = torch.autograd.grad(y, list(leaves.values()), normal(*y.shape, seed=3).to(dtype))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def definition(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    return ops.attention_reference(q, k, v, segments=segments)


def check(given: dict[str, Tensor], segments: Tensor, launches: dict | None = None,
          tolerance: float = TOLERANCE) -> None:
    expected = results(definition, given, segments, torch.float64)
    with trial(SMALL if launches is None else launches):
        found = results(kernels.attention, given, segments, torch.float32)
    for name, exact in expected.items():
        error = (found[name] - exact).norm() / exact.norm()
        assert error < tolerance, f"{name}: {error}"


def rows(*lengths: list[int]) -> Tensor:
    """Segments (b t): documents of these lengths in each row, their numbers coming back: 7, 3, 7, ..."""
    return torch.stack([torch.repeat_interleave(torch.tensor([7, 3] * len(row))[:len(row)], torch.tensor(row))
                        for row in lengths])


@pytest.mark.parametrize(("h", "g"), [(2, 2), (4, 2), (3, 1)])
def test_it_equals_the_definition_with_every_gradient(h: int, g: int) -> None:
    check(values(2, 75, h, g, 16), rows([20, 1, 54], [75]))


@pytest.mark.parametrize("lengths", [
    [1] * 40, [96], [32, 32, 32], [31, 33, 32], [64, 1], [1, 64], [3, 60, 2], [100, 29], [16, 16, 15, 1], [5], [1]])
def test_documents_may_begin_and_end_anywhere(lengths: list[int]) -> None:
    given = values(1, sum(lengths), 2, 1, 16)
    if sum(lengths) == 1 or set(lengths) == {1}:  # a weight of 1 whatever the score: no gradient but noise about zero
        with trial(SMALL):
            found = results(kernels.attention, given, rows(lengths), torch.float32)
        torch.testing.assert_close(found["y"].double(), given["v"].repeat_interleave(2, 2), rtol=1e-6, atol=1e-6)
        assert max(found[name].abs().max() for name in "qk") < 1e-5
        return
    check(given, rows(lengths))


@pytest.mark.parametrize("p", [32, 64, 128])
def test_heads_of_every_width_with_the_shipped_launches(p: int) -> None:
    check(values(1, 150, 1, 1, p), rows([90, 60]), {})


def test_in_16_bits_it_rounds_no_more_than_torch() -> None:
    given, segments = values(1, 200, 4, 2, 64), rows([70, 1, 129])
    given = {name: v.half().double() for name, v in given.items()}
    expected = results(definition, given, segments, torch.float64)
    found = results(kernels.attention, given, segments, torch.float16)
    with ops.use_backend("torch"):
        plain = results(lambda q, k, v, segments: ops.attention(q, k, v, segments=segments), given, segments,
                        torch.float16)
    for name, exact in expected.items():
        error, allowed = ((v[name] - exact).norm() / exact.norm() for v in (found, plain))
        assert error < 1.1 * allowed < 1e-3, f"{name}: {error} against {allowed}"


def test_rows_longer_than_what_the_bounds_take_at_once() -> None:
    lengths = [700, 400, 1, 1100, 23]
    segments = rows(lengths, lengths[::-1])
    begin, end = (torch.empty(segments.shape, dtype=torch.int32) for _ in range(2))
    kernels.document_bounds[2,](segments, begin, end, segments.shape[1], SPAN=kernels.SCAN)
    for row, found in enumerate((lengths, lengths[::-1])):
        edges = torch.tensor([0, *found]).cumsum(0)
        assert torch.equal(begin[row].long(), torch.repeat_interleave(edges[:-1], torch.tensor(found)))
        assert torch.equal(end[row].long(), torch.repeat_interleave(edges[1:], torch.tensor(found)))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_may_be_large_and_of_one_sign(sign: int) -> None:
    """Sums of exponentials would overflow, or vanish, without the largest score taken off."""
    given = values(1, 60, 1, 1, 16)
    given["q"], given["k"] = given["q"].abs() * 30, given["k"].abs() * sign
    scores = given["q"] @ given["k"].mT / 4
    assert scores.abs().max() > 200
    check(given, rows([25, 35]), tolerance=4e-5)  # such a score is off by 1e-5 in float32


def test_slices_and_a_gradient_that_lies_across_are_read_right() -> None:
    given, segments = values(2, 40, 2, 2, 16), rows([13, 27], [40])
    wide = torch.full((2, 40, 6, 16), torch.nan, dtype=torch.float32)
    for i, v in enumerate(given.values()):
        wide[:, :, 2 * i:2 * i + 2] = v
    slices = [wide[:, :, 2 * i:2 * i + 2].requires_grad_() for i in range(3)]
    with trial(SMALL):
        y = kernels.attention(*slices, segments)
        across = normal(16, 2, 40, 2, seed=4).float().permute(1, 2, 3, 0)
        found = torch.autograd.grad(y, slices, across)
    leaves = [v.clone().requires_grad_() for v in given.values()]
    expected = torch.autograd.grad(definition(*leaves, segments), leaves, across.double())
    for a, e in zip(found, expected, strict=True):
        assert (a - e).norm() < TOLERANCE * e.norm()


def test_the_operator_keeps_to_its_schema_and_can_be_traced() -> None:
    given, segments = values(1, 40, 2, 1, 16), rows([13, 27])
    leaves = [v.float().requires_grad_() for v in given.values()]
    with trial(SMALL):
        torch.library.opcheck(torch.ops.hinny.packed_attention.default, (*leaves, segments),
                              test_utils=("test_schema", "test_faketensor"))
        expected = kernels.attention(*leaves, segments)
        traced = torch.compile(kernels.attention, fullgraph=True, backend="aot_eager")(*leaves, segments)
        assert torch.equal(traced, expected)
        for a, e in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (traced, expected)), strict=True):
            assert torch.equal(a, e)


def test_the_op_takes_it_where_kernels_run_and_take_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    monkeypatch.setattr(kernels, "attention", lambda q, k, v, segments: taken.append(q.dtype) or q)
    segments = rows([3, 5], [8])
    for backend, dtype, p in (("triton", torch.bfloat16, 16), ("auto", torch.bfloat16, 16),
                              ("triton", torch.float32, 16), ("triton", torch.float16, 20)):
        q, k, v = (x.to(dtype) for x in values(2, 8, 2, 1, p).values())
        with ops.use_backend(backend):
            ops.attention(q, k, v, segments=segments)
            ops.attention(q, k, v)
            ops.attention(q[:, 3:], k, v, segments=segments)
    assert taken == [torch.bfloat16, torch.bfloat16]
