"""Attention over pages by its kernels, against the definition in float64; nothing that is not a row's own is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hinny.ops import paged_attention, paged_attention_reference, use_backend, write_pages
from hinny.ops.kernels.launches import trial

LENGTHS = [0, 1, 37, 128, 300]
WRONG = 10 ** 6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_in_pages(lengths: list[int], g: int, page: int, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages with a row's keys where its table says, NaN elsewhere; tables that are wrong behind a row's last page."""
    used = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(9))
    pages = torch.full((2, len(order), g, page, p), torch.nan, dtype=torch.float64)
    tables = torch.full((len(lengths), max(used) + 1), WRONG, dtype=torch.int32)
    for row, length in enumerate(lengths):
        first = sum(used[:row])
        tables[row, :used[row]] = order[first:first + used[row]]
        keys = normal(2, length, g, p, seed=row)
        for i in range(length):
            pages[:, tables[row, i // page], :, i % page] = keys[:, i]
    return pages[0], pages[1], tables, torch.tensor(lengths, dtype=torch.int32)


@contextmanager
def launched(dot: int, block: int, programs: int) -> Iterator[None]:
    with use_backend("triton"), trial({"paged_attention_kernel": {
            "PROGRAMS": programs, "DOT": dot, "BLOCK": block, "LEAST": 2, "STAGES": 2, "num_warps": 4,
            "num_stages": 1}}):
        yield


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("programs", [1, 200])
@pytest.mark.parametrize(("t", "h", "g", "p", "page", "dot", "block"), [
    (1, 2, 2, 16, 64, 0, 32), (1, 2, 2, 40, 16, 0, 32), (1, 2, 2, 64, 64, 1, 64), (1, 8, 2, 128, 32, 1, 64),
    (4, 6, 2, 16, 16, 1, 16), (8, 10, 1, 24, 48, 1, 32)])
def test_rows_of_any_lengths_equal_the_definition(t: int, h: int, g: int, p: int, page: int, dot: int, block: int,
                                                  programs: int) -> None:
    pages, q = rows_in_pages(LENGTHS, g, page, p), normal(len(LENGTHS), t, h, p, seed=50)
    expected = paged_attention_reference(q, *pages)
    with launched(dot, block, programs):
        y = paged_attention(q.float(), pages[0].float(), pages[1].float(), *pages[2:])
    close(y, expected)
    assert (y[0] == 0).all(), "a row of no keys"


def test_queries_of_more_bits_than_the_pages_lose_none() -> None:
    k, v, *rest = rows_in_pages([40, 90], 2, 32, 16)
    q, k, v = normal(2, 2, 4, 16, seed=1).float(), k.half(), v.half()
    expected = paged_attention_reference(q.double(), k, v, *rest)
    with launched(1, 32, 8):
        close(paged_attention(q, k, v, *rest), expected)


def test_queries_and_pages_may_be_parts_of_larger_tensors() -> None:
    pages, q = rows_in_pages([33, 20], 2, 16, 16), normal(2, 1, 4, 16, seed=1)
    wide_q = torch.cat([q, torch.full_like(q, torch.nan)], 2).float()[:, :, :4]
    both = torch.stack(pages[:2], 1).float()
    tables = torch.cat([pages[2], pages[2]], 1)[:, :pages[2].shape[1]]
    assert not any(x.is_contiguous() for x in (wide_q, both[:, 0], tables))
    with launched(1, 16, 4):
        close(paged_attention(wide_q, both[:, 0], both[:, 1], tables, pages[3]), paged_attention_reference(q, *pages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_written_keys_are_where_they_belong_and_nothing_else_changes(dtype: torch.dtype) -> None:
    g, p, page = 3, 40, 16
    projected = normal(5, 2, g, p, seed=3).float()
    pages = normal(2, 4, g, page, p, seed=4).to(dtype)
    places, expected = torch.tensor([17, -1, 0, 63, 40]), pages.clone()
    for token, place in enumerate(places.tolist()):
        if place >= 0:
            expected[:, place // page, :, place % page] = projected[token].to(dtype)
    with use_backend("triton"):
        write_pages(projected[:, 0], projected[:, 1], pages[0], pages[1], places)
    assert torch.equal(pages, expected)
