"""Attention over pages by its kernels on a GPU: against the torch form in float64, beside that form's own error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hinny.ops import paged_attention, use_backend, write_pages
from hinny.ops.kernels.launches import trial
from hinny.ops.kernels.paged import candidates

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
fast = settings(max_examples=8, deadline=None, database=None, derandomize=True)
SHARED = 64
"""Programs a multiprocessor: enough for many shares of a row."""


def normal(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def in_pages(lengths: list[int], g: int, page: int, p: int, dtype: torch.dtype,
             seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages of keys in random order, NaN behind each row's length; tables negative behind a row's last page."""
    b, m = len(lengths), -(-max(*lengths, 1) // page) + 1
    order = torch.randperm(b * m + 2, generator=torch.Generator().manual_seed(seed))[:b * m].view(b, m).cuda()
    held = torch.tensor(lengths, device="cuda")
    position = torch.arange(m * page, device="cuda").view(1, m, 1, page, 1)
    behind = position >= held.view(-1, 1, 1, 1, 1)
    pages = torch.full((2, b * m + 2, g, page, p), torch.nan, device="cuda", dtype=dtype)
    for which in range(2):
        keys = normal(b, m, g, page, p, seed=seed + which, dtype=dtype).masked_fill(behind, torch.nan)
        pages[which, order] = keys
    tables = torch.where(behind[:, :, 0, 0, 0], -7, order).int()
    return pages[0], pages[1], tables, held.int()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check(q: Tensor, pages: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """The kernel's weights are rounded to the pages' type before they meet the values: as much again as the result's
    rounding, at most."""
    exact = paged_attention(q.double(), pages[0].double(), pages[1].double(), *pages[2:])
    with use_backend("torch"):
        near = paged_attention(q, *pages)
    with use_backend("triton"):
        y, again = (paged_attention(q, *pages) for _ in range(2))
    assert torch.equal(y, again)
    assert y.isfinite().all()
    assert error(y, exact) <= 2 * error(near, exact) + 3e-6
    assert (y[pages[3] == 0] == 0).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("h", "g", "p", "page", "dtype", "tokens"), [
    (4, 4, 128, 64, BF16, [1]), (8, 2, 128, 64, BF16, [1, 2, 4]), (6, 6, 64, 64, FP16, [1, 5]),
    (10, 2, 40, 16, BF16, [1, 3]), (16, 1, 256, 32, BF16, [1, 8]), (4, 2, 128, 64, FP32, [1, 8]),
    (3, 3, 24, 48, FP32, [1, 2]), (4, 2, 256, 16, FP32, [1])])
def test_rows_of_any_lengths(h: int, g: int, p: int, page: int, dtype: torch.dtype, tokens: list[int],
                             shared: bool) -> None:
    @fast
    @given(lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 500, 1111, 3000]), min_size=1,
                            max_size=7), t=st.sampled_from(tokens), seed=st.integers(0, 99))
    def run(lengths: list[int], t: int, seed: int) -> None:
        pages = in_pages(lengths, g, page, p, dtype, seed)
        q = normal(len(lengths), t, h, p, seed=seed + 9, dtype=dtype)
        if not shared:
            check(q, pages)
            return
        (use, *_) = (of for of in candidates()["paged_attention_kernel"] if of["DOT"])
        small = {"BLOCK": 32, "num_warps": 8 if p > 128 else 4, "STAGES": 2, "PROGRAMS": SHARED}
        with trial({"paged_attention_kernel": {**use, **small}}):
            check(q, pages)

    run()


@pytest.mark.parametrize("use", candidates()["paged_attention_kernel"], ids=lambda of: "-".join(map(str, of.values())))
def test_every_candidate(use: dict[str, int]) -> None:
    for h, g, t in ((4, 4, 1), (8, 2, 1), (8, 2, 4)):
        pages = in_pages([0, 1, 64, 700, 5000], g, 64, 128, BF16, 3)
        with trial({"paged_attention_kernel": use}):
            check(normal(5, t, h, 128, seed=1, dtype=BF16), pages)


def test_a_graph_serves_rows_of_other_lengths_than_it_was_captured_with() -> None:
    k, v, tables, lengths = in_pages([3000, 3000, 3000], 2, 64, 128, BF16, 5)
    q, new = normal(3, 1, 8, 128, seed=1, dtype=BF16), normal(3, 2, 2, 128, seed=2, dtype=BF16)
    places = torch.full((3,), -1, device="cuda")

    def step() -> Tensor:
        write_pages(new[:, 0], new[:, 1], k, v, places)
        return paged_attention(q, k, v, tables, lengths)

    with use_backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                y = step()
    torch.cuda.synchronize()
    for held in ([17, 0, 2049], [1, 64, 3000]):
        lengths.copy_(torch.tensor(held))
        last = (lengths - 1).clamp(min=0).long()
        numbers = tables.gather(1, last[:, None] // 64)[:, 0].long()
        places.copy_(torch.where(lengths > 0, numbers * 64 + last % 64, -1))
        expected_k, expected_v = k.clone(), v.clone()
        with use_backend("torch"):
            write_pages(new[:, 0], new[:, 1], expected_k, expected_v, places)
            expected = paged_attention(q, expected_k, expected_v, tables, lengths)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-3)
        assert torch.equal(k.view(torch.int16), expected_k.view(torch.int16))


@pytest.mark.parametrize(("dtype", "pages_dtype"), [(BF16, BF16), (FP32, BF16), (BF16, FP32)])
@pytest.mark.parametrize(("tokens", "g", "p", "page"), [(1, 8, 128, 64), (300, 3, 40, 16)])
def test_written_keys_are_where_they_belong(tokens: int, g: int, p: int, page: int, dtype: torch.dtype,
                                            pages_dtype: torch.dtype) -> None:
    projected = normal(tokens, 3, g, p, seed=1, dtype=dtype)
    pages = normal(2, 40, g, page, p, seed=2, dtype=pages_dtype)
    places = torch.randperm(40 * page, generator=torch.Generator().manual_seed(3))[:tokens].cuda()
    places[tokens // 2:tokens // 2 + 3:2] = -1
    expected = pages.clone()
    with use_backend("torch"):
        write_pages(projected[:, 1], projected[:, 2], expected[0], expected[1], places)
    with use_backend("triton"):
        write_pages(projected[:, 1], projected[:, 2], pages[0], pages[1], places)
    assert torch.equal(pages, expected)


def test_queries_of_another_type_than_the_pages() -> None:
    for query, held in ((FP32, BF16), (BF16, FP32), (FP16, BF16)):
        pages = in_pages([0, 40, 700], 2, 64, 64, held, 1)
        check(normal(3, 2, 4, 64, seed=4, dtype=query), pages)
