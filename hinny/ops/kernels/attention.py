"""Causal attention within packed documents: no mask is made, and no tile of keys is read that no query sees.

    document_bounds              of each token: where its document begins and ends in its row
    attention_forward            a tile of queries walks the keys from its first document's begin to itself, with the
                                 softmax's maximum and sum kept along (arXiv 2205.14135, 2307.08691)
    attention_backward_delta     dy . y of each query and head
    attention_backward_keys      a tile of keys walks the queries that see it, of all heads that share it: dk, dv
    attention_backward_queries   a tile of queries walks its keys again: dq

A key j is seen by a query i if begin[i] <= j <= i. Both bounds grow along a row, so the tiles that need no comparison
lie in the middle of a walk over keys; the walk over queries compares everywhere, for want of registers. Scores are in
powers of two; `level` is the logarithm of a query's sum. Weights and their gradients are rounded to the inputs' type
before a product; sums are float32. Nothing is added by atomics, so two runs give the same bits, and the backward makes
the scores twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import differentiable

HEADS = (16, 128)
"""The fewest and the most dimensions of a head; powers of two."""
TYPES = (torch.bfloat16, torch.float16)
"""Of float32, tiles worth their launch do not fit the registers."""
NOTHING = tl.constexpr(-1e30)
"""The largest score of a query that has seen no key: finite, so that a difference of two is a number."""
LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2))
SCAN = 1024
"""Tokens that `document_bounds` takes at once."""


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether these kernels are launched for q (b t h p) and k (b s g p): 16 bits, as many keys as queries, heads of a
    width in HEADS.
    """
    p = q.shape[3]
    return q.dtype in TYPES and q.shape[1] == k.shape[1] and HEADS[0] <= p <= HEADS[1] and p & (p - 1) == 0


@triton.jit
def larger(a, b):
    """The larger of two numbers."""
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
    """The smaller of two numbers."""
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["t"])
def document_bounds(segments, begin, end, t, SPAN: tl.constexpr):
    """segments (b t) of any integers → begin, end (b t) int32: each token's document is [begin, end) of its row."""
    row = tl.program_id(0).to(tl.int64) * t
    carry = tl.zeros((), tl.int32)
    for start in range(0, t, SPAN):
        i = start + tl.arange(0, SPAN)
        here = tl.load(segments + row + i, mask=i < t, other=0)
        before = tl.load(segments + row + i - 1, mask=(i > 0) & (i < t), other=0)
        opens = tl.where((i > 0) & (i < t) & (here != before), i, carry)
        found = tl.associative_scan(opens, 0, larger)
        tl.store(begin + row + i, found, mask=i < t)
        carry = tl.max(found, 0)
    carry = t + tl.zeros((), tl.int32)
    for back in range(0, t, SPAN):
        i = (tl.cdiv(t, SPAN) - 1) * SPAN - back + tl.arange(0, SPAN)
        here = tl.load(segments + row + i, mask=i < t, other=0)
        behind = tl.load(segments + row + i + 1, mask=i + 1 < t, other=0)
        closes = tl.where((i + 1 < t) & (here != behind), i + 1, carry)
        found = tl.associative_scan(closes, 0, smaller, reverse=True)
        tl.store(end + row + i, found, mask=i < t)
        carry = tl.min(found, 0)


@triton.jit
def tile(x, first, rows, stride, P: tl.constexpr, N: tl.constexpr):
    """Rows first to first + N of x, whose rows are `stride` apart, P numbers of each; zeros from row `rows` on."""
    i, start = tl.arange(0, N), tl.zeros((), tl.int64) + first
    return tl.load(x + start * stride + i[:, None] * stride + tl.arange(0, P)[None, :],
                   mask=(first + i < rows)[:, None], other=0)


@triton.jit
def put_tile(x, value, first, rows, stride, P: tl.constexpr, N: tl.constexpr):
    """Stores value (N P) where `tile` would load it."""
    i, start = tl.arange(0, N), tl.zeros((), tl.int64) + first
    tl.store(x + start * stride + i[:, None] * stride + tl.arange(0, P)[None, :],
             value.to(x.dtype.element_ty), mask=(first + i < rows)[:, None])


@triton.jit
def seen(row, since, column):
    """Which of the keys `column` each query at `row`, whose document begins at `since`, sees."""
    return (since <= column) & (column <= row)


@triton.jit
def forward_walk(
    total, top, weight, query, k, v, row, since, low, high, t, stride, scale, MASKED: tl.constexpr, P: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The softmax's weighted values (M P), largest score and sum (M,), carried over the keys from low to high."""
    for first in tl.range(low, high, KEYS):
        key = tile(k, first, t, stride, P, KEYS)
        score = tl.dot(query, tl.trans(key)) * scale
        if MASKED:
            score = tl.where(seen(row[:, None], since[:, None], (first + tl.arange(0, KEYS))[None, :]), score,
                             float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        part = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(top - highest)
        weight = weight * shrink + tl.sum(part, 1)
        value = tile(v, first, t, stride, P, KEYS)
        total = tl.dot(part.to(value.dtype), value, total * shrink[:, None])
        top = highest
    return total, top, weight


@triton.jit(do_not_specialize=["t"])
def attention_forward(
    q, k, v, begin, y, level, t, heads, groups, scale, P: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):
    """q (b t heads P), k, v (b t groups P), begin (b t) → y as q, level (b heads t) float32. KEYS divides QUERIES."""
    # the last tiles have the longest walks: they begin first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    q += (batch * t * heads + head) * P
    y += (batch * t * heads + head) * P
    k += (batch * t * groups + group) * P
    v += (batch * t * groups + group) * P
    begin += batch * t
    row = first + tl.arange(0, QUERIES)
    query = tile(q, first, t, heads * P, P, QUERIES)
    since = tl.load(begin + row, mask=row < t, other=0)
    low = tl.load(begin + first) // KEYS * KEYS
    # from the last query's document on, keys are seen by every query, up to the diagonal
    free = tl.minimum(tl.cdiv(tl.load(begin + tl.minimum(first + QUERIES, t) - 1), KEYS) * KEYS, first)
    total = tl.zeros((QUERIES, P), tl.float32)
    top = tl.full((QUERIES,), NOTHING, tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    total, top, weight = forward_walk(total, top, weight, query, k, v, row, since, low, free, t, groups * P, scale,
                                      True, P, KEYS)
    total, top, weight = forward_walk(total, top, weight, query, k, v, row, since, free, first, t, groups * P, scale,
                                      False, P, KEYS)
    total, top, weight = forward_walk(total, top, weight, query, k, v, row, since, first,
                                      tl.minimum(first + QUERIES, t), t, groups * P, scale, True, P, KEYS)
    weight = tl.where(row < t, weight, 1)
    put_tile(y, total / weight[:, None], first, t, heads * P, P, QUERIES)
    tl.store(level + (batch * heads + head) * t + row, top + tl.log2(weight), mask=row < t)


@triton.jit(do_not_specialize=["t"])
def attention_backward_delta(dy, y, delta, t, heads, P: tl.constexpr, ROWS: tl.constexpr):
    """dy, y (b t heads P) → delta (b heads t) float32: the sum of dy y."""
    first = tl.program_id(0) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = (batch * t * heads + head) * P
    row = first + tl.arange(0, ROWS)
    gradient = tile(dy + start, first, t, heads * P, P, ROWS).to(tl.float32)
    value = tile(y + start, first, t, heads * P, P, ROWS).to(tl.float32)
    tl.store(delta + (batch * heads + head) * t + row, tl.sum(gradient * value, 1), mask=row < t)


@triton.jit(do_not_specialize=["t"])
def attention_backward_keys(
    q, k, v, dy, begin, end, level, delta, dk, dv, t, heads, groups, scale, P: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The forward's inputs, dy as q, end (b t), level and delta (b heads t) → dk, dv as k."""
    first = tl.program_id(0) * KEYS
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    share = heads // groups
    begin += batch * t
    end += batch * t
    start = (batch * t * groups + group) * P
    key = tile(k + start, first, t, groups * P, P, KEYS)
    value = tile(v + start, first, t, groups * P, P, KEYS)
    column = first + tl.arange(0, KEYS)
    high = tl.load(end + tl.minimum(first + KEYS, t) - 1)
    dkey = tl.zeros((KEYS, P), tl.float32)
    dvalue = tl.zeros((KEYS, P), tl.float32)
    for head in range(group * share, (group + 1) * share):
        mine = (batch * t * heads + head) * P
        line = (batch * heads + head) * t
        for low in tl.range(first, high, QUERIES):
            row = low + tl.arange(0, QUERIES)
            query = tile(q + mine, low, t, heads * P, P, QUERIES)
            gradient = tile(dy + mine, low, t, heads * P, P, QUERIES)
            # behind the last query: a level above all scores, so that its weights are zero
            peak = tl.load(level + line + row, mask=row < t, other=float("inf"))
            along = tl.load(delta + line + row, mask=row < t, other=0)
            since = tl.load(begin + row, mask=row < t, other=0)
            score = tl.dot(key, tl.trans(query)) * scale  # (KEYS, QUERIES)
            score = tl.where(seen(row[None, :], since[None, :], column[:, None]), score, float("-inf"))
            part = tl.exp2(score - peak[None, :])
            dvalue = tl.dot(part.to(gradient.dtype), gradient, dvalue)
            dpart = tl.dot(value, tl.trans(gradient))
            dscore = part * (dpart - along[None, :])
            dkey = tl.dot(dscore.to(query.dtype), query, dkey)
    put_tile(dk + start, dkey * scale * LN2, first, t, groups * P, P, KEYS)
    put_tile(dv + start, dvalue, first, t, groups * P, P, KEYS)


@triton.jit
def queries_walk(
    dquery, query, gradient, k, v, row, since, peak, along, low, high, t, stride, scale, MASKED: tl.constexpr,
    P: tl.constexpr, KEYS: tl.constexpr,
):
    """The gradient of a tile of queries (M P), before `scale`, with what keys low to high add."""
    for first in tl.range(low, high, KEYS):
        key = tile(k, first, t, stride, P, KEYS)
        value = tile(v, first, t, stride, P, KEYS)
        score = tl.dot(query, tl.trans(key)) * scale
        if MASKED:
            score = tl.where(seen(row[:, None], since[:, None], (first + tl.arange(0, KEYS))[None, :]), score,
                             float("-inf"))
        part = tl.exp2(score - peak[:, None])
        dpart = tl.dot(gradient, tl.trans(value))
        dscore = part * (dpart - along[:, None])
        dquery = tl.dot(dscore.to(key.dtype), key, dquery)
    return dquery


@triton.jit(do_not_specialize=["t"])
def attention_backward_queries(
    q, k, v, dy, begin, level, delta, dq, t, heads, groups, scale, P: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """As `attention_backward_keys` → dq as q. KEYS divides QUERIES."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (heads // groups)
    mine = (batch * t * heads + head) * P
    line = (batch * heads + head) * t
    k += (batch * t * groups + group) * P
    v += (batch * t * groups + group) * P
    begin += batch * t
    row = first + tl.arange(0, QUERIES)
    query = tile(q + mine, first, t, heads * P, P, QUERIES)
    gradient = tile(dy + mine, first, t, heads * P, P, QUERIES)
    peak = tl.load(level + line + row, mask=row < t, other=float("inf"))
    along = tl.load(delta + line + row, mask=row < t, other=0)
    since = tl.load(begin + row, mask=row < t, other=0)
    low = tl.load(begin + first) // KEYS * KEYS
    free = tl.minimum(tl.cdiv(tl.load(begin + tl.minimum(first + QUERIES, t) - 1), KEYS) * KEYS, first)
    dquery = tl.zeros((QUERIES, P), tl.float32)
    dquery = queries_walk(dquery, query, gradient, k, v, row, since, peak, along, low, free, t, groups * P, scale,
                          True, P, KEYS)
    dquery = queries_walk(dquery, query, gradient, k, v, row, since, peak, along, free, first, t, groups * P, scale,
                          False, P, KEYS)
    dquery = queries_walk(dquery, query, gradient, k, v, row, since, peak, along, first,
                          tl.minimum(first + QUERIES, t), t, groups * P, scale, True, P, KEYS)
    put_tile(dq + mine, dquery * scale * LN2, first, t, heads * P, P, QUERIES)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, float]:
    """t, heads, groups and the factor that makes a product of q and k a score in powers of two."""
    return q.shape[1], q.shape[2], k.shape[2], LOG2E / math.sqrt(q.shape[3])


def _launched(kernel: str, q: Tensor) -> dict[str, Any]:
    """The constants of a kernel's launch for heads as wide as q's."""
    return {"P": q.shape[3]} | launch(kernel, q.device, p=q.shape[3])


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the level of its softmax, and each token's document."""
    y, level, begin, end = results = _fake(q, k, v, segments)
    q, k, v, segments = (x.contiguous() for x in (q, k, v, segments))
    t, heads, groups, scale = _sizes(q, k)
    document_bounds[(q.shape[0],)](segments, begin, end, t, SPAN=SCAN, num_warps=4)
    use = _launched("attention_forward", q)
    attention_forward[triton.cdiv(t, use["QUERIES"]), heads, q.shape[0]](
        q, k, v, begin, y, level, t, heads, groups, scale, **use)
    return results


def _fake(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, t, heads, _ = q.shape
    bounds = [segments.new_empty(b, t, dtype=torch.int32) for _ in range(2)]
    return q.new_empty(q.shape), q.new_empty(b, heads, t, dtype=torch.float32), bounds[0], bounds[1]


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, level: Tensor, begin: Tensor, end: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = results = _fake_backward(dy, q, k, v, y, level, begin, end)
    dy, q, k, v = (x.contiguous() for x in (dy, q, k, v))
    b, (t, heads, groups, scale) = q.shape[0], _sizes(q, k)
    delta = torch.empty_like(level)
    use = _launched("attention_backward_delta", q)
    attention_backward_delta[triton.cdiv(t, use["ROWS"]), heads, b](dy, y, delta, t, heads, **use)
    use = _launched("attention_backward_keys", q)
    attention_backward_keys[triton.cdiv(t, use["KEYS"]), groups, b](
        q, k, v, dy, begin, end, level, delta, dk, dv, t, heads, groups, scale, **use)
    use = _launched("attention_backward_queries", q)
    attention_backward_queries[triton.cdiv(t, use["QUERIES"]), heads, b](
        q, k, v, dy, begin, level, delta, dq, t, heads, groups, scale, **use)
    return results


def _fake_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, level: Tensor, begin: Tensor, end: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(run: Any, ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*(run(dy, *ctx.saved_tensors) if dy is not None else (None,) * 3), None)


_attend = differentiable("packed_attention", _forward, _backward, fake=_fake, fake_backward=_fake_backward, save=_save,
                         gradients=_gradients)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    """`hinny.ops.attention` with segments, of tensors that `takes` takes; q, k and v of one type."""
    found: Tensor = _attend(q, k, v, segments)[0]
    return found


KERNELS = (attention_forward, attention_backward_delta, attention_backward_keys, attention_backward_queries)


def compilations(table: str) -> list[Compilation]:
    """Every kernel, with every configuration of a shipped table in bfloat16."""
    cases = [Compilation(f"document_bounds-{kind}", document_bounds, {
        "segments": f"*{kind}", "begin": "*i32", "end": "*i32", "t": "i32"}, {"SPAN": SCAN}) for kind in ("i32", "i64")]
    kinds = {"begin": "*i32", "end": "*i32", "level": "*fp32", "delta": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(("q", "k", "v", "y", "dy", "dq", "dk", "dv"), "*bf16")
    for kernel in KERNELS:
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            p, use = rule["when"].get("p", HEADS)[1], rule["use"]
            constants = {"P": p} | {key: size for key, size in use.items() if not key.startswith("num_")}
            signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
            cases.append(Compilation(f"{kernel.fn.__name__}-{number}-{p}", kernel, signature, constants,
                                     use["num_warps"], use["num_stages"]))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    sizes = {"attention_forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 4, 4)),
             "attention_backward_keys": ((64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 3)),
             "attention_backward_queries": ((128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 4, 2), (128, 64, 4, 2))}
    found = {kernel: [{"QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages}
                      for queries, keys, warps, stages in those] for kernel, those in sizes.items()}
    delta = [{"ROWS": rows, "num_warps": warps, "num_stages": 1} for rows, warps in ((64, 4), (128, 4), (32, 4))]
    return found | {"attention_backward_delta": delta}
