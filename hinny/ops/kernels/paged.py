"""Attention of a few queries a row over keys in pages: each key and value is read once, and that is the whole cost.

    paged_attention_kernel  a program has the queries of one key head of one row, and a share of the row's keys: tiles
                            of BLOCK keys stream through shared memory, STAGES - 1 of them on their way. Queries that
                            share a key head meet on the tensor cores (DOT), padded to ROWS; one query alone may be
                            multiplied as it is, each of the BLOCK places of a tile keeping a softmax of its own until
                            the end, so that the threads never wait for each other.
    paged_sum_kernel        adds the shares of a query where there are several.
    write_pages_kernel      a program has some numbers of one token's keys and values.

With EARLY a launch begins before the one in front of it has ended, and waits for that before it reads what that wrote.
How many shares there are is settled without knowing the rows' lengths, by what fills the GPU; how many of them a row
uses, at least LEAST tiles each, is settled by its length, and the other programs end at once.
Letters: b batch, t time, h heads, p head_dim, g groups (key heads), m pages of a table.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.decode import by_token
from hinny.ops.kernels.gates import LOG2_E
from hinny.ops.kernels.launches import launch, overlaps, rules
from hinny.ops.kernels.operators import on_its_device
from hinny.ops.kernels.waves import processors

LOWEST = tl.constexpr(-1e30)
"""Below every score; finite, so that the difference of two is a number."""

MOST_ROWS = {2: 32, 4: 16}
"""Bytes of a number → queries of one program; more would need registers that there are not."""

SPILLS = "the three parts of products of float32, with 256 columns of values"

MOST_SHARES = 256
CHUNK = tl.constexpr(64)
"""Shares that are added at once, at most."""


@triton.jit
def shares_used(length, shares, BLOCK: tl.constexpr, LEAST: tl.constexpr):
    """Of `shares` programs, how many have keys of a row of `length`."""
    return tl.minimum(shares, (length + (BLOCK * LEAST - 1)) // (BLOCK * LEAST))


@triton.jit
def numbers_of(table, start, length, page: tl.constexpr, BLOCK: tl.constexpr):
    """The pages of BLOCK keys: one number where they lie in one page, else one for each; 0 behind `length`."""
    if page % BLOCK == 0:
        return tl.load(table + start // page, mask=start < length, other=0)
    else:
        keys = start + tl.arange(0, BLOCK)
        return tl.load(table + keys // page, mask=keys < length, other=0)


@triton.jit
def places_of(numbers, stride, start, head, page: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr):
    """Where the BLOCK keys from `start` lie, one head's: a number to each, int64, BLOCK by 1."""
    if page % BLOCK == 0:
        first = numbers.to(tl.int64) * stride + (head * page + start % page) * p
        return first + (tl.arange(0, BLOCK) * p)[:, None]
    else:
        keys = start + tl.arange(0, BLOCK)
        return (numbers.to(tl.int64) * stride + (head * page + keys % page) * p)[:, None]


@triton.jit
def attend_rows(
    q, k_pages, v_pages, table, numbers, limits, length, first, last, head, scale, k_stride, v_stride,
    p: tl.constexpr, page: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):
    """q (ROWS P), each query with the keys below its limit, in tiles first to last → largest score, sum, values.

    numbers: the pages of the first tile.
    """
    columns = tl.arange(0, P)[None, :]
    inside = columns < p
    most = tl.full((ROWS,), LOWEST, tl.float32)
    # summed over its BLOCK places only at the end: one exchange between the threads less for each tile
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    acc = tl.zeros((ROWS, P), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        start = block * BLOCK
        keys = start + tl.arange(0, BLOCK)
        mask = (keys < length)[:, None] & inside
        k_at = places_of(numbers, k_stride, start, head, page, p, BLOCK) + columns
        v_at = places_of(numbers, v_stride, start, head, page, p, BLOCK) + columns
        numbers = numbers_of(table, start + BLOCK, length, page, BLOCK)
        k = tl.load(k_pages + k_at, mask=mask, other=0, eviction_policy="evict_first").to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (ROWS BLOCK)
        scores = tl.where(keys[None, :] < limits[:, None], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp2(most - new)
        weights = tl.exp2(scores - new[:, None])
        total = total * decay[:, None] + weights
        v = tl.load(v_pages + v_at, mask=mask, other=0, eviction_policy="evict_first").to(q.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        most = new
    return most, tl.sum(total, 1), acc


@triton.jit
def attend_alone(
    q, k_pages, v_pages, table, numbers, length, first, last, head, scale, k_stride, v_stride,
    p: tl.constexpr, page: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """q (P,), one query that sees all keys below `length`, in tiles first to last → largest score, sum, values.

    numbers: the pages of the first tile.
    """
    columns = tl.arange(0, P)[None, :]
    inside = columns < p
    most = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, P), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        start = block * BLOCK
        seen = start + tl.arange(0, BLOCK) < length
        mask = seen[:, None] & inside
        k_at = places_of(numbers, k_stride, start, head, page, p, BLOCK) + columns
        v_at = places_of(numbers, v_stride, start, head, page, p, BLOCK) + columns
        numbers = numbers_of(table, start + BLOCK, length, page, BLOCK)
        k = tl.load(k_pages + k_at, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(v_pages + v_at, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        scores = tl.where(seen, tl.sum(k * q[None, :], 1) * scale, float("-inf"))  # (BLOCK,)
        new = tl.maximum(most, scores)
        decay = tl.exp2(most - new)
        weights = tl.exp2(scores - new)
        total = total * decay + weights
        acc = acc * decay[:, None] + weights[:, None] * v
        most = new
    top = tl.max(most, 0)
    decay = tl.exp2(most - top)
    return top, tl.sum(total * decay, 0), tl.sum(acc * decay[:, None], 0)


@triton.jit
def leave(y, sums, partial, row, share, shares, columns, real, most, total, acc, p: tl.constexpr, SHARED: tl.constexpr):
    """Writes the outputs of queries, or a program's share of them: rows of y (b t h p), sums (rows shares 2), partial
    (rows shares p). row, real (whether it is one), most, total (ROWS 1) beside columns (1 P), or numbers beside (P,).
    """
    mask = real & (columns < p)
    if SHARED:
        place = row.to(tl.int64) * shares + share
        tl.store(partial + place * p + columns, acc, mask=mask)
        tl.store(sums + place * 2, most, mask=real)
        tl.store(sums + place * 2 + 1, total, mask=real)
    else:
        # a query that sees no key has a sum of zero
        out = acc / tl.where(total > 0, total, 1)
        tl.store(y + row.to(tl.int64) * p + columns, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["t", "width", "shares"])
def paged_attention_kernel(
    q, k_pages, v_pages, tables, lengths, y, sums, partial, t, width, shares, scale, q_stride, k_stride, v_stride,
    SIZES: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr, STAGES: tl.constexpr,
):
    """q (b t h p) by the stride of a token, pages by that of a page, tables by width; SIZES: h, g, p, page, P.

    scale: to scores in units of log 2. SHARED: leaves shares to `paged_sum_kernel`. WIDE: q and the pages differ in
    type, and are multiplied in float32. EARLY: this launch may begin before the one in front of it ends, which writes
    q and pages and neither tables nor lengths, and the next one before this one does.
    """
    h: tl.constexpr = SIZES[0]
    g: tl.constexpr = SIZES[1]
    p: tl.constexpr = SIZES[2]
    page: tl.constexpr = SIZES[3]
    P: tl.constexpr = SIZES[4]
    repeat: tl.constexpr = h // g
    if EARLY:
        gdc_launch_dependents()
    # programs that read the same keys are neighbours
    blocks = (t * repeat + ROWS - 1) // ROWS
    rest = tl.program_id(0) // blocks
    share = rest % shares
    head = rest // shares % g
    b = rest // shares // g
    length = tl.load(lengths + b)
    first = 0
    last = tl.cdiv(length, BLOCK)
    if SHARED:
        used = shares_used(length, shares, BLOCK, LEAST)
        first = share * last // tl.maximum(used, 1)
        last = (share + 1) * last // tl.maximum(used, 1)
    table = tables + b.to(tl.int64) * width
    numbers = numbers_of(table, first * BLOCK, length, page, BLOCK)
    if EARLY:
        # also a program that has no keys: the launch after next may count on this one's end
        gdc_wait()
    if SHARED:
        if share >= used:
            return
    token = b.to(tl.int64) * t
    columns = tl.arange(0, P)
    if DOT:
        rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
        real = (rows < t * repeat)[:, None]
        heads = head * repeat + rows % repeat
        q_at = (token + rows // repeat) * q_stride + heads * p
        queries = tl.load(q + q_at[:, None] + columns[None, :], mask=real & (columns < p)[None, :], other=0)
        if WIDE:
            queries = queries.to(tl.float32)
        limits = length - t + 1 + rows // repeat
        most, total, acc = attend_rows(queries, k_pages, v_pages, table, numbers, limits, length, first, last, head,
                                       scale, k_stride, v_stride, p, page, P, ROWS, BLOCK, STAGES, PRECISION)
        out = (token + rows // repeat) * h + heads
        leave(y, sums, partial, out[:, None], share, shares, columns[None, :], real, most[:, None], total[:, None],
              acc, p, SHARED)
    else:
        query = tl.load(q + token * q_stride + head * p + columns, mask=columns < p, other=0).to(tl.float32)
        most, total, acc = attend_alone(query, k_pages, v_pages, table, numbers, length, first, last, head, scale,
                                        k_stride, v_stride, p, page, P, BLOCK, STAGES)
        leave(y, sums, partial, token * h + head, share, shares, columns, True, most, total, acc, p, SHARED)


@triton.jit(do_not_specialize=["t", "shares"])
def paged_sum_kernel(
    y, sums, partial, lengths, t, shares, h: tl.constexpr, p: tl.constexpr, P: tl.constexpr, SHARES: tl.constexpr,
    EARLY: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
):
    """y (b t h p) from its shares, in order; SHARES: a power of 2 from `shares`. BLOCK, LEAST: the attention's."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    used = shares_used(tl.load(lengths + row // (t * h)), shares, BLOCK, LEAST)
    place = row.to(tl.int64) * shares
    columns = tl.arange(0, P)
    share = tl.arange(0, SHARES)
    here = share < used
    most = tl.load(sums + (place + share) * 2, mask=here, other=LOWEST)
    top = tl.max(most, 0)
    total = tl.sum(tl.load(sums + (place + share) * 2 + 1, mask=here, other=0) * tl.exp2(most - top), 0)
    acc = tl.zeros((P,), tl.float32)
    few_of: tl.constexpr = SHARES if SHARES < CHUNK else CHUNK
    for start in range(0, used, few_of):
        few = start + tl.arange(0, few_of)
        weight = tl.exp2(tl.load(sums + (place + few) * 2, mask=few < used, other=LOWEST) - top)
        at = partial + (place + few)[:, None] * p + columns[None, :]
        part = tl.load(at, mask=(few < used)[:, None] & (columns < p)[None, :], other=0)
        acc += tl.sum(part * weight[:, None], 0)
    out = acc / tl.where(total > 0, total, 1)
    tl.store(y + row.to(tl.int64) * p + columns, out.to(y.dtype.element_ty), mask=columns < p)


@triton.jit
def write_pages_kernel(
    k, v, k_pages, v_pages, places, k_row, v_row, k_stride, v_stride, SIZES: tl.constexpr, EARLY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """k, v (T g p) by the strides of a token, into pages by those of a page; SIZES: g, p, page.

    EARLY: this launch may begin before the one in front of it ends, which writes k and v and not the places, and the
    next one before this one does.
    """
    if EARLY:
        gdc_launch_dependents()
    g: tl.constexpr = SIZES[0]
    p: tl.constexpr = SIZES[1]
    page: tl.constexpr = SIZES[2]
    blocks: tl.constexpr = (g * p + WIDTH - 1) // WIDTH
    token = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.load(places + token)
    i = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    mask = (place >= 0) & (i < g * p)
    number = place // page
    to = (i // p * page + place % page) * p + i % p
    if EARLY:
        gdc_wait()
    key = tl.load(k + token * k_row + i, mask=mask, other=0)
    value = tl.load(v + token * v_row + i, mask=mask, other=0)
    tl.store(k_pages + number * k_stride + to, key.to(k_pages.dtype.element_ty), mask=mask)
    tl.store(v_pages + number * v_stride + to, value.to(v_pages.dtype.element_ty), mask=mask)


def launch_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """`hinny.ops.paged_attention` on checked arguments: one launch, or two where the rows' keys are shared out."""
    (b, t, h, p), (g, page), width = q.shape, k_pages.shape[1:3], tables.shape[1]
    y, queries = q.new_empty(q.shape), t * (h // g)
    q, q_stride = by_token(q)
    # what is multiplied: float32 where the types differ
    held = 4 if q.dtype != k_pages.dtype else q.element_size()
    use = launch("paged_attention_kernel", q.device, work=b * g, p=p, queries=queries, bytes=held)
    if queries > 1:
        use["DOT"] = 1
    rows, size = _rows(queries, held), _padded(p)
    groups = b * g * triton.cdiv(queries, rows)
    most = triton.cdiv(width * page, use["BLOCK"] * use["LEAST"])
    shares = max(1, min(use.pop("PROGRAMS") * max(processors(q.device), 1) // groups, most, MOST_SHARES))
    sums, partial = (q.new_empty(b * t * h * shares * of, dtype=torch.float32) if shares > 1 else None
                     for of in (2, p))
    early = overlaps(q.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    paged_attention_kernel[groups * shares,](
        q, k_pages, v_pages, tables, lengths, y, sums, partial, t, tables.stride(0), shares,
        LOG2_E.value / math.sqrt(p), q_stride, k_pages.stride(0), v_pages.stride(0), (h, g, p, page, size), shares > 1,
        q.dtype != k_pages.dtype, early, rows, _precision(q.device), **use, **options)
    if shares > 1:
        again = launch("paged_sum_kernel", q.device, p=p)
        paged_sum_kernel[b * t * h,](
            y, sums, partial, lengths, t, shares, h, p, triton.next_power_of_2(p), triton.next_power_of_2(shares),
            early, use["BLOCK"], use["LEAST"], **again, **options)
    return y


def launch_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, places: Tensor) -> None:
    """Changes the pages in place: `hinny.ops.write_pages` on checked arguments, in one launch."""
    (tokens, g, p), early = k.shape, overlaps(k.device)
    (k, k_row), (v, v_row) = by_token(k[None]), by_token(v[None])
    use = launch("write_pages_kernel", k.device, work=tokens)
    use["WIDTH"] = min(use["WIDTH"], triton.next_power_of_2(g * p))
    write_pages_kernel[tokens * triton.cdiv(g * p, use["WIDTH"]),](
        k, v, k_pages, v_pages, places, k_row, v_row, k_pages.stride(0), v_pages.stride(0),
        (g, p, k_pages.shape[2]), early, **use, **({"launch_pdl": True} if early else {}))


def _rows(queries: int, held: int) -> int:
    """Rows of a tile of queries of so many bytes a number: 16 is the least that tensor cores take."""
    return min(max(triton.next_power_of_2(queries), 16), MOST_ROWS[held])


def _padded(p: int) -> int:
    """Columns of a tile: a row of fewer than 64 has made wrong products on Hopper GPUs."""
    return max(triton.next_power_of_2(p), 64)


def _precision(device: torch.device) -> str:
    """How float32 is multiplied on tensor cores: in three parts; AMD GPUs have no such way."""
    return "tf32x3" if device.type == "cuda" and not torch.version.hip else "ieee"


paged_attention = on_its_device(launch_attention)
write_pages = on_its_device(launch_write)


def compilations(table: str) -> list[Compilation]:
    """The kernels with every configuration of a shipped table: the attention with and without shares, for one query
    and several, for pages as large as a tile, smaller, and of another type than the queries."""
    cases = []
    for number, rule in enumerate(rules(table)["paged_attention_kernel"]):
        p = rule["when"].get("p", [1, 256])[1]
        # a rule that does not name 2 bytes stands behind one that does
        kinds = ("bf16", "fp16") if rule["when"].get("bytes") == 2 else ("fp32",)
        for kind in kinds:
            cases += [_compilation(f"paged_attention_kernel-{number}-{kind}-{name}", rule["use"], p, kind, table, **of)
                      for name, of in _variants(rule["when"].get("queries", 0) == 1, kind)]
    for number, rule in enumerate(rules(table)["paged_sum_kernel"]):
        p = rule["when"].get("p", [1, 256])[1]
        constants = {"h": 32, "p": p, "P": p, "SHARES": 64, "EARLY": table == "sm90", "BLOCK": 64, "LEAST": 2}
        pointers = {"y": "*bf16", "sums": "*fp32", "partial": "*fp32", "lengths": "*i32"}
        cases.append(_compiled(f"paged_sum_kernel-{number}", paged_sum_kernel, pointers, constants, rule["use"], ()))
    for number, rule in enumerate(rules(table)["write_pages_kernel"]):
        constants = {"SIZES": (8, 128, 64), "EARLY": table == "sm90"}
        pointers = dict.fromkeys(("k", "v", "k_pages", "v_pages"), "*bf16") | {"places": "*i64"}
        cases.append(_compiled(f"write_pages_kernel-{number}", write_pages_kernel, pointers, constants, rule["use"],
                               ("k_row", "v_row", "k_stride", "v_stride")))
    return cases


def _variants(alone: bool, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Name → what differs from one share of several, 16 rows of queries, a tile a page."""
    found: list[tuple[str, dict[str, Any]]] = [("whole", {"shares": False}), ("small_pages", {"page": 16})]
    if not alone:
        found += [("rows", {"rows": MOST_ROWS[2]})] if kind != "fp32" else []
        # whatever is of float32 takes the launches of float32
        found += [("mixed", {"query": "bf16"})] if kind == "fp32" else []
    return found


def _compilation(name: str, use: dict[str, int], p: int, kind: str, table: str, shares: bool = True, page: int = 64,
                 rows: int = 16, query: str = "") -> Compilation:
    query = query or kind
    constants: dict[str, Any] = {
        "SIZES": (32, 8, p, page, _padded(p)), "SHARED": shares, "WIDE": query != kind, "EARLY": table == "sm90",
        "ROWS": rows, "PRECISION": "tf32x3"} | ({} if shares else {"sums": None, "partial": None})
    pointers = {"q": f"*{query}", "y": f"*{query}", "k_pages": f"*{kind}", "v_pages": f"*{kind}", "tables": "*i32",
                "lengths": "*i32", "sums": "*fp32", "partial": "*fp32"}
    use = {key: value for key, value in use.items() if key != "PROGRAMS"}
    found = _compiled(name, paged_attention_kernel, pointers, constants, use, ("q_stride", "k_stride", "v_stride"))
    return replace(found, may_spill=SPILLS) if kind == "fp32" and p > 128 else found


def _compiled(name: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], use: dict[str, int],
              even: tuple[str, ...]) -> Compilation:
    use = dict(use)
    warps, stages = use.pop("num_warps"), use.pop("num_stages")
    constants = constants | use
    signature = {v: pointers.get(v, "fp32" if v == "scale" else "i32") for v in kernel.arg_names if v not in constants}
    aligned = tuple(v for v in signature if v in pointers or v in even)
    return Compilation(name, kernel, signature, constants, warps, stages, aligned)


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    sizes = [(0, 32, 4, 4), (0, 64, 2, 4), (0, 64, 3, 4), (0, 64, 3, 8), (1, 64, 2, 4), (1, 64, 3, 4), (1, 64, 4, 4),
             (1, 64, 3, 2), (1, 128, 2, 4), (1, 128, 2, 8)]
    return {
        "paged_attention_kernel": [
            {"PROGRAMS": programs, "DOT": dot, "BLOCK": block, "LEAST": 2, "STAGES": stages, "num_warps": warps,
             "num_stages": 1} for programs in (3, 16) for dot, block, stages, warps in sizes],
        "paged_sum_kernel": [{"num_warps": warps, "num_stages": 1} for warps in (1, 2, 4)],
        "write_pages_kernel": [{"WIDTH": width, "num_warps": warps, "num_stages": 1}
                               for width, warps in ((512, 1), (1024, 1), (1024, 4), (2048, 4))],
    }
