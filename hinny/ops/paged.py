"""Attention over keys that lie in pages of a pool, as sequences that grow side by side keep them; writing keys there.

What `attention` computes (its definition holds here) for the last few tokens of every row of a batch, in place where
the keys are. Nothing about the rows is known to the host, so that a CUDA graph serves rows of any lengths. Each key
and value is read once, and that is the whole cost of decoding: 16,384 tokens of 8 heads of 128 are 64 MiB in bfloat16.

No gradients: these ops are for inference alone and raise where gradients would be recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hinny.ops import backend
from hinny.ops.attention import attention_reference
from hinny.ops.inputs import check_rank, check_shapes, wide, without_autocast

PAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Each query's weighted mean of the values of its row, up to its own position.

    q (b t h p); k_pages, v_pages (pages g page p), query head i reads key/value head i // (h/g); tables (b m) int32:
    the pages of each row in order; lengths (b,) int32, 0 to m*page: the keys of each row, the queries being at the
    last t of these. Query i sees the first lengths - t + 1 + i keys; zeros where that is none, so that a row of length
    0 is padding. What lies behind a row's length is never read, nor what its table says behind its last used page.
    Returns y (b t h p) in q's dtype; the softmax is in float32 (float64 if q is).
    Raises ValueError for arguments that do not fit; numbers in tables and lengths are checked on the CPU alone.
    """
    _check(q, k_pages, v_pages, tables, lengths)
    if (chosen := backend.chosen(q)) == "triton":
        from hinny.ops.kernels import paged

        return paged.paged_attention(q, k_pages, v_pages, tables, lengths)
    if chosen == "reference":
        return paged_attention_reference(q, k_pages, v_pages, tables, lengths)
    (b, t, h, p), (g, page), dtype = q.shape, k_pages.shape[1:3], wide(q.dtype)
    places = tables.clamp(min=0).flatten()
    with without_autocast(q):
        k, v = (pages.index_select(0, places).view(b, -1, g, page, p).transpose(1, 2).flatten(2, 3).to(dtype)
                for pages in (k_pages, v_pages))  # (b g m*page p)
        position = torch.arange(k.shape[2], device=q.device)
        last = lengths[:, None] - t + torch.arange(t, device=q.device)  # (b t)
        seen = (position <= last[..., None])[:, None, :, None]  # (b 1 t 1 m*page)
        # nothing times what nobody wrote may be NaN: such values are put away, not only their weights
        v = v.masked_fill((position >= lengths[:, None])[:, None, :, None], 0)
        queries = q.to(dtype).view(b, t, g, h // g, p).transpose(1, 2)  # (b g t h/g p)
        scores = torch.einsum("bgtrp,bgsp->bgtrs", queries, k) / p ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        weights = torch.where(seen, weights, 0)  # a query that sees nothing has weights of NaN
        y = torch.einsum("bgtrs,bgsp->btgrp", weights, v)
    return y.reshape(b, t, h, p).to(q.dtype)


def paged_attention_reference(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor,
                              lengths: Tensor) -> Tensor:
    """The definition of `paged_attention`: row by row, its keys cut out of its pages, by `attention_reference`."""
    _check(q, k_pages, v_pages, tables, lengths)
    y, t, page = torch.zeros_like(q), q.shape[1], k_pages.shape[2]
    for row, length in enumerate(lengths.tolist()):
        if not length:
            continue
        used = tables[row, :-(-length // page)].tolist()
        k, v = (torch.cat([pages[number] for number in used], 1)[:, :length].transpose(0, 1)[None]
                for pages in (k_pages, v_pages))  # (1 length g p)
        sighted = min(t, length)
        y[row, t - sighted:] = attention_reference(q[row:row + 1, t - sighted:], k.to(wide(q.dtype)),
                                                   v.to(wide(q.dtype)))[0]
    return y


def write_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, places: Tensor) -> None:
    """Changes `k_pages` and `v_pages` in place: puts the keys and values of T tokens where they belong.

    k, v (T g p), which may be slices of one projection's output; k_pages, v_pages (pages g page p); places (T,) int64:
    page number * page + place within the page, all different; a negative one: the token is left out.
    Raises ValueError for arguments that do not fit; places beyond the pool are refused on the CPU alone.
    """
    check_rank("write_pages", "k", k, "T g p")
    _check_pages("write_pages", k_pages, v_pages, k)
    tokens, g, p = k.shape
    check_shapes("write_pages", v=(v, (tokens, g, p)), k_pages=(k_pages, (len(k_pages), g, k_pages.shape[2], p)),
                 places=(places, (tokens,)))
    if places.dtype != torch.int64:
        raise ValueError(f"write_pages: places are {places.dtype}; they must be torch.int64.")
    if not places.is_contiguous():
        raise ValueError("write_pages: places are a strided view; pass places.contiguous().")
    room = len(k_pages) * k_pages.shape[2]
    if places.device.type == "cpu" and int(places.max()) >= room:
        raise ValueError(f"write_pages: a place is {int(places.max())}; the pages have {room}.")
    _refuse_gradients("write_pages", k, v, k_pages, v_pages)
    if backend.chosen(k) == "triton":
        from hinny.ops.kernels import paged

        return paged.write_pages(k, v, k_pages, v_pages, places)
    # the tokens that are left out repeat what the first of the others writes: nothing waits for the device
    live = places >= 0
    source = torch.where(live, torch.arange(tokens, device=k.device), live.int().argmax())
    page = k_pages.shape[2]
    number, place = places[source].clamp(min=0) // page, places[source].clamp(min=0) % page
    for pages, new in ((k_pages, k), (v_pages, v)):
        # where all are left out, page 0 gets what it has
        pages[number, :, place] = torch.where(live.any(), new[source].to(pages.dtype), pages[number, :, place])


def _check(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor) -> None:
    op = "paged_attention"
    check_rank(op, "q", q, "b t h p")
    check_rank(op, "tables", tables, "b m")
    _check_pages(op, k_pages, v_pages, q)
    (b, _, h, p), (g, page) = q.shape, k_pages.shape[1:3]
    check_shapes(op, k_pages=(k_pages, (len(k_pages), g, page, p)), tables=(tables, (b, tables.shape[1])),
                 lengths=(lengths, (b,)))
    if h % g:
        raise ValueError(f"{op}: q has {h} heads and the pages {g}; the pages' heads must divide q's.")
    for name, numbers in (("tables", tables), ("lengths", lengths)):
        if numbers.dtype != torch.int32:
            raise ValueError(f"{op}: {name} are {numbers.dtype}; they must be torch.int32.")
        if numbers.stride(-1) != 1 and numbers.shape[-1] > 1:
            raise ValueError(f"{op}: {name} are a strided view; pass {name}.contiguous().")
    room = tables.shape[1] * page
    if lengths.device.type == "cpu" and not 0 <= int(lengths.min()) <= int(lengths.max()) <= room:
        raise ValueError(f"{op}: lengths are {int(lengths.min())} to {int(lengths.max())}; they must be 0 to {room}, "
                         "the keys that a row's pages hold.")
    _refuse_gradients(op, q, k_pages, v_pages)


def _check_pages(op: str, k_pages: Tensor, v_pages: Tensor, tokens: Tensor) -> None:
    """Raises ValueError for pools that are no pages of keys and values; a page may be part of a larger one."""
    check_rank(op, "k_pages", k_pages, "pages g page p")
    check_shapes(op, v_pages=(v_pages, tuple(k_pages.shape)))
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dtype not in PAGE_DTYPES and not pages.dtype == tokens.dtype == torch.float64:
            raise ValueError(f"{op}: {name} are {pages.dtype} beside {tokens.dtype}; they must be one of "
                             f"{PAGE_DTYPES}, or float64 beside float64.")
        if not pages[:1].is_contiguous():
            raise ValueError(f"{op}: each of {name} must be contiguous; the strides are {pages.stride()}.")
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"{op}: k_pages are {k_pages.dtype} and v_pages {v_pages.dtype}; they must be alike.")


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        raise RuntimeError(f"{op} is for inference and has no gradients; call it under torch.no_grad().")
