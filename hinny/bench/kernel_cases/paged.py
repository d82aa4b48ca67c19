"""One token of decoding by attention over pages of keys, and writing keys there.

Bytes: each key and value of the rows read once. The 8B model's heads, 128 wide, all with keys of their own or four to
a key head; pages of 64 tokens, in random order.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text

PAGE = 64


def cases() -> list[Case]:
    """Many rows of middling length, few long ones, one very long one, and many short ones."""
    return [*(attention_case(b=b, h=32, g=g, p=128, keys=keys) for b, g, keys in (
        (32, 8, 16384), (8, 32, 16384), (8, 8, 32768), (1, 8, 131072), (1, 32, 16384), (64, 8, 1024))),
        *(write_case(tokens=tokens, g=8, p=128) for tokens in (32, 2048))]


def attention_case(*, b: int, h: int, g: int, p: int, keys: int, page: int = PAGE) -> Case:
    """One query a head and row."""
    return Case("paged_attention", shape_text(b=b, h=h, g=g, p=p, keys=keys),
                partial(_inputs, b=b, h=h, g=g, p=p, keys=keys, page=page), ops.paged_attention,
                moved=2 * (2 * b * keys * g * p + 2 * b * h * p), unit="TB/s")


def write_case(*, tokens: int, g: int, p: int, page: int = PAGE) -> Case:
    """Keys and values as slices of one projection's output, to random places."""
    return Case("write_pages", shape_text(tokens=tokens, g=g, p=p),
                partial(_written, tokens=tokens, g=g, p=p, page=page), _write,
                moved=2 * 4 * tokens * g * p, unit="TB/s", updated=("k_pages", "v_pages"))


def _inputs(draw: Draw, *, b: int, h: int, g: int, p: int, keys: int, page: int) -> Inputs:
    pages = -(-keys // page)
    return {"q": draw.normal(b, 1, h, p), "k_pages": draw.normal(b * pages, g, page, p),
            "v_pages": draw.normal(b * pages, g, page, p), "tables": _order(draw, b * pages).int().view(b, pages),
            "lengths": torch.full((b,), keys, dtype=torch.int32, device=draw.device)}


def _written(draw: Draw, *, tokens: int, g: int, p: int, page: int) -> Inputs:
    pages = 2 * -(-tokens // page)
    return {"projected": draw.normal(tokens, 2, g, p), "k_pages": draw.normal(pages, g, page, p),
            "v_pages": draw.normal(pages, g, page, p), "places": _order(draw, pages * page)[:tokens].contiguous()}


def _write(projected: Tensor, k_pages: Tensor, v_pages: Tensor, places: Tensor) -> Tensor:
    ops.write_pages(projected[:, 0], projected[:, 1], k_pages, v_pages, places)
    return k_pages[:1, 0, 0]


def _order(draw: Draw, n: int) -> Tensor:
    return torch.randperm(n, generator=draw.generator, device=draw.device)
