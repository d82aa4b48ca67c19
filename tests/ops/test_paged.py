"""Attention over pages against plain attention of each row by itself, in float64; writing keys where tables say."""

from __future__ import annotations

import pytest
import torch
from op_checks import normal
from torch import Tensor

from hinny.ops import attention, attention_reference, paged_attention, use_backend, write_pages

G, P, PAGE = 2, 6, 4
Rows = list[tuple[Tensor, Tensor]]


def grown(lengths: list[int], page: int = PAGE, seed: int = 0) -> tuple[Rows, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Keys and values of rows, each (length g p), and the same written into pages in random order, piece by piece.

    Where nothing was written there is NaN, and the tables' entries there are negative.
    """
    rows = [(normal(n, G, P, seed=seed + 2 * i), normal(n, G, P, seed=seed + 2 * i + 1))
            for i, n in enumerate(lengths)]
    used = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(used) + 1, generator=torch.Generator().manual_seed(seed))
    k_pages, v_pages = (torch.full((len(order), G, page, P), torch.nan, dtype=torch.float64) for _ in "kv")
    tables = torch.full((len(lengths), max(used) + 1), -1, dtype=torch.int32)
    for row, (k, v) in enumerate(rows):
        tables[row, :used[row]] = order[sum(used[:row]):sum(used[:row + 1])]
        position = torch.arange(len(k))
        places = tables[row].long()[position // page] * page + position % page
        for piece in zip(k.split(3), v.split(3), places.split(3), strict=True):
            if len(piece[0]):
                write_pages(*piece[:2], k_pages, v_pages, piece[2])
    return rows, (k_pages, v_pages, tables, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("t", "h"), [(1, 2), (1, 6), (3, 4)])
def test_a_row_attends_to_its_own_keys_alone(t: int, h: int, backend: str) -> None:
    rows, pages = grown([3, 4, 5, 17])
    q = normal(4, t, h, P, seed=70)
    with use_backend(backend):
        y = paged_attention(q, *pages)
    for row, (k, v) in enumerate(rows):
        expected = attention_reference(q[row:row + 1], k[None], v[None])
        torch.testing.assert_close(y[row:row + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_row_of_no_keys_is_padding(backend: str) -> None:
    rows, pages = grown([0, 9, 0])
    q = normal(3, 1, 2, P, seed=70)
    q[[0, 2]] = torch.nan
    with use_backend(backend):
        y = paged_attention(q, *pages)
    assert (y[[0, 2]] == 0).all()
    torch.testing.assert_close(y[1:2], attention(q[1:2], *(x[None] for x in rows[1])), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_queries_before_the_first_key_give_zeros(backend: str) -> None:
    """A row of fewer tokens than its neighbours has its queries last."""
    rows, pages = grown([2, 8])
    q = normal(2, 4, 2, P, seed=70)
    with use_backend(backend):
        y = paged_attention(q, *pages)
    assert (y[0, :2] == 0).all()
    torch.testing.assert_close(y[:1, 2:], attention_reference(q[:1, 2:], *(x[None] for x in rows[0])), rtol=1e-12,
                               atol=1e-12)


def test_a_table_says_which_pages_a_row_has_and_rows_may_share_them() -> None:
    rows, (k_pages, v_pages, tables, _) = grown([9, 4])
    tables = tables[[0, 0, 1]]
    lengths = torch.tensor([9, 6, 4], dtype=torch.int32)
    q = normal(1, 1, 2, P, seed=70).expand(3, -1, -1, -1)
    y = paged_attention(q, k_pages, v_pages, tables, lengths)
    for row, (of, length) in enumerate(((0, 9), (0, 6), (1, 4))):
        k, v = (x[None, :length] for x in rows[of])
        torch.testing.assert_close(y[row:row + 1], attention_reference(q[:1], k, v), rtol=1e-12, atol=1e-12)


def test_pages_of_few_bits_are_read_in_the_precision_of_the_softmax() -> None:
    _, (k_pages, v_pages, *rest) = grown([9, 14])
    low = k_pages.bfloat16(), v_pages.bfloat16()
    q = normal(2, 1, 4, P, seed=70).float()
    y = paged_attention(q, *low, *rest)
    expected = paged_attention(q.double(), *(x.double() for x in low), *rest)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_of_a_wider_pool_can_be_read_and_written() -> None:
    _, (k_pages, v_pages, *rest) = grown([7, 3])
    pool = torch.full((len(k_pages), 3, 2, G, PAGE, P), torch.nan, dtype=torch.float64)
    pool[:, 1, 0], pool[:, 1, 1] = k_pages, v_pages
    q = normal(2, 1, 2, P, seed=70)
    assert torch.equal(paged_attention(q, pool[:, 1, 0], pool[:, 1, 1], *rest),
                       paged_attention(q, k_pages, v_pages, *rest))
    new = normal(1, 2, G, P, seed=8)
    write_pages(new[:, 0], new[:, 1], pool[:, 1, 0], pool[:, 1, 1], torch.tensor([2]))
    assert torch.equal(pool[0, 1, :, :, 2], new[0])
    assert pool[:, [0, 2]].isnan().all()


@pytest.mark.parametrize("places", [[5, -1, 0, 11], [-1, -3, -1, -1], [-1, 7, 3, 2]])
def test_written_keys_are_where_they_belong_and_nothing_else_changes(places: list[int]) -> None:
    projected = normal(4, 3, G, P, seed=3)  # keys and values as slices of what a projection gives
    pages = normal(2, 3, G, PAGE, P, seed=4)
    expected = pages.clone()
    for token, place in enumerate(places):
        if place >= 0:
            expected[:, place // PAGE, :, place % PAGE] = projected[token, 1:]
    write_pages(projected[:, 1], projected[:, 2], pages[0], pages[1], torch.tensor(places))
    assert torch.equal(pages, expected)


def test_what_does_not_fit_is_refused() -> None:
    _, pages = grown([5, 2])
    k_pages, v_pages, tables, lengths = pages
    q = normal(2, 1, 2, P, seed=1)
    with pytest.raises(ValueError, match=r"tables are torch\.int64; they must be torch\.int32"):
        paged_attention(q, k_pages, v_pages, tables.long(), lengths)
    with pytest.raises(ValueError, match="lengths are 2 to 13; they must be 0 to 12"):
        paged_attention(q, k_pages, v_pages, tables, lengths.where(lengths < 3, 13))
    with pytest.raises(ValueError, match="q has 3 heads and the pages 2"):
        paged_attention(normal(2, 1, 3, P, seed=1), *pages)
    with pytest.raises(ValueError, match="v_pages has shape"):
        paged_attention(q, k_pages, v_pages[1:], tables, lengths)
    with pytest.raises(ValueError, match="each of k_pages must be contiguous"):
        paged_attention(q, k_pages.transpose(1, 2).contiguous().transpose(1, 2), v_pages, tables, lengths)
    with pytest.raises(ValueError, match=r"float32, torch\.bfloat16.* or float64 beside float64"):
        paged_attention(q.float(), *pages)
    with pytest.raises(ValueError, match="a place is 16; the pages have 16"):
        write_pages(q[:, 0], q[:, 0], k_pages, v_pages, torch.tensor([0, 16]))
    with pytest.raises(ValueError, match=r"pass places\.contiguous"):
        write_pages(q[:, 0], q[:, 0], k_pages, v_pages, torch.zeros(2, 2, dtype=torch.int64)[:, 0])
    with pytest.raises(ValueError, match=r"pass tables\.contiguous"):
        paged_attention(q, k_pages, v_pages, tables.t().contiguous().t(), lengths)
    with pytest.raises(ValueError, match=r"places are torch\.int32"):
        write_pages(q[:, 0], q[:, 0], k_pages, v_pages, torch.zeros(2, dtype=torch.int32))


def test_gradients_are_refused() -> None:
    _, pages = grown([5])
    q = normal(1, 1, 2, P, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        paged_attention(q, *pages)
    with pytest.raises(RuntimeError, match="no gradients"):
        write_pages(q[:, 0], q[:, 0], *pages[:2], torch.tensor([0]))
