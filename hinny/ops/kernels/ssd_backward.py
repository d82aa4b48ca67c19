"""SSD backward: everything within a chunk, parallel over chunks and groups (docs/ssd.md, "The kernels").

    ssd_boundaries (ssd_forward.py) leaves the states entering the chunks and the gradients of those leaving them; then
    ssd_gram       for each pair of tokens of a chunk, the gradient of C·B, summed over the heads of a group
    ssd_inputs     dx
    ssd_queries    dC  ┐ summed over the heads of a group in registers: no head writes a gradient of B or C of its own
    ssd_keys       dB  ┘
    ssd_finish     the gradients of dt, A, D and dt_bias, from a few numbers per token and head

Four kernels, not one, because each then has registers enough; they read the same x and dy. A decay's gradient takes
sums over pairs of tokens on either side of its step. The diagonal does not decay and is left out of these sums, so that
nothing large has to cancel. Letters and layouts as in ssd_forward.py; r heads of a group; tiles come by descriptor.
"""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ["t", "chunks", "size"]  # one compilation for all lengths


@triton.jit
def edges_of(documents, c, Q: tl.constexpr):
    """Documents of the token before chunk c and of its last token."""
    return tl.load(documents + c * Q - 1, mask=c > 0, other=0), tl.load(documents + c * Q + Q - 1)


@triton.jit(do_not_specialize=LENGTHS)
def ssd_gram(
    x, dy, B, C, steps, sums, documents, pairs, enclosed, crossed, chunks,
    H: tl.constexpr, G: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (c and block of the chunk's square, g and split, b): from the first half, across, from the second half.

    pairs (b c g split q q): the gradient of C·B, [from token, to token]; unwritten where no token of the block sees.
    Per head and token (b h c*q), what the pairs give to the sums of decays: enclosed those of the same half, crossed
    those of both.
    """
    SEG: tl.constexpr = documents is not None
    R: tl.constexpr = H // G // SPLIT
    HALF: tl.constexpr = Q // 2
    c, block, b = tl.program_id(0) // 3, tl.program_id(0) % 3, tl.program_id(2)
    source = tl.where(block == 2, HALF, 0)
    sink = tl.where(block == 0, 0, HALF)
    q = tl.arange(0, HALF)
    group = tl.program_id(1) // SPLIT
    bs = B.load([b, c * Q + source, group, 0]).reshape(HALF, BN)
    cs = C.load([b, c * Q + sink, group, 0]).reshape(HALF, BN)
    seen = (sink + q)[None, :] >= (source + q)[:, None]
    scores = tl.dot(bs, tl.trans(cs), input_precision=PRECISION)  # (q q), from and to
    scores = tl.where((sink + q)[None, :] == (source + q)[:, None], 0, scores)
    if SEG:
        base = documents + b.to(tl.int64) * (chunks * Q) + c * Q
        seen = seen & (tl.load(base + sink + q)[None, :] == tl.load(base + source + q)[:, None])
    total = tl.zeros((HALF, HALF), tl.float32)
    row = (b.to(tl.int64) * H + tl.program_id(1) * R) * (chunks * Q) + c * Q
    for r in range(R):
        h = tl.program_id(1) * R + r
        at = row + r * (chunks * Q)
        xs = x.load([b, c * Q + source, h, 0]).reshape(HALF, BP)
        dys = dy.load([b, c * Q + sink, h, 0]).reshape(HALF, BP)
        before, after = tl.load(sums + at + source + q), tl.load(sums + at + sink + q)
        step = tl.load(steps + at + source + q)
        decay = tl.exp2(tl.where(seen, after[None, :] - before[:, None], float("-inf")))  # (q q)
        products = tl.dot(xs, tl.trans(dys), input_precision=PRECISION) * (decay * step[:, None])
        total += products
        products *= scores
        lost, gained = tl.sum(products, 1), tl.sum(products, 0)
        if block == 1:
            tl.store(crossed + at + q, -lost)
            tl.store(crossed + at + HALF + q, gained)
        else:
            tl.store(enclosed + at + source + q, gained - lost)
    square = ((b.to(tl.int64) * chunks + c) * (G * SPLIT) + tl.program_id(1)) * (Q * Q)
    tl.store(pairs + square + (source + q)[:, None] * Q + (sink + q)[None, :], total.to(pairs.dtype.element_ty))


@triton.jit(do_not_specialize=LENGTHS)
def ssd_inputs(
    x, dy, B, C, dedges, steps, sums, D, documents, dx, direct, leaving, skipped, chunks,
    H: tl.constexpr, G: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (c, g and split, b): dx (b t h p); per head and token (b h c*q) direct = x·(gradient of step x),
    leaving = what its part in the leaving state gives to the sums of decays, skipped = dy·x."""
    SEG: tl.constexpr = documents is not None
    R: tl.constexpr = H // G // SPLIT
    c, b = tl.program_id(0), tl.program_id(2)
    group = tl.program_id(1) // SPLIT
    q = tl.arange(0, Q)
    bs = B.load([b, c * Q, group, 0]).reshape(Q, BN)
    cs = C.load([b, c * Q, group, 0]).reshape(Q, BN)
    scores = tl.dot(bs, tl.trans(cs), input_precision=PRECISION).to(bs.dtype)  # (q q), from and to
    seen = q[None, :] >= q[:, None]
    if SEG:
        base = documents + b.to(tl.int64) * (chunks * Q)
        own = tl.load(base + c * Q + q)
        _, end_document = edges_of(base, c, Q)
        seen = seen & (own[None, :] == own[:, None])
    row = (b.to(tl.int64) * H + tl.program_id(1) * R) * (chunks * Q) + c * Q
    for r in range(R):
        h = tl.program_id(1) * R + r
        at = row + r * (chunks * Q)
        xs = x.load([b, c * Q, h, 0]).reshape(Q, BP)
        dys = dy.load([b, c * Q, h, 0]).reshape(Q, BP)
        ds = dedges.load([(b * chunks + c) * H + h, 0, 0]).reshape(BP, BN)
        a, step, end = tl.load(sums + at + q), tl.load(steps + at + q), tl.load(sums + at + Q - 1)
        leave = tl.exp2(end - a)
        if SEG:
            leave = tl.where(own == end_document, leave, 0)
        left = tl.dot(bs, tl.trans(ds), input_precision=PRECISION) * leave[:, None]  # (q p)
        tl.store(leaving + at + q, step * tl.sum(xs.to(tl.float32) * left, 1))
        weights = scores.to(tl.float32) * tl.exp2(tl.where(seen, a[None, :] - a[:, None], float("-inf")))  # (q q)
        left = tl.dot(weights.to(dys.dtype), dys, left, input_precision=PRECISION)
        tl.store(direct + at + q, tl.sum(xs.to(tl.float32) * left, 1))
        left *= step[:, None]
        if D is not None:
            left += tl.load(D + h).to(tl.float32) * dys.to(tl.float32)
            tl.store(skipped + at + q, tl.sum(xs.to(tl.float32) * dys.to(tl.float32), 1))
        dx.store([b, c * Q, h, 0], left.to(dx.dtype).reshape(1, Q, 1, BP))


@triton.jit(do_not_specialize=LENGTHS)
def ssd_queries(
    dy, B, C, edges, dedges, steps, sums, documents, pairs, dC, entering, passing, chunks,
    H: tl.constexpr, G: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (c, g and split, b): dC (split b t g n); per head and token entering (b h c*q), per chunk passing
    (b c h): what the entering state's parts in the outputs and in the leaving state give to the sums of decays."""
    SEG: tl.constexpr = documents is not None
    R: tl.constexpr = H // G // SPLIT
    c, b = tl.program_id(0), tl.program_id(2)
    group, split = tl.program_id(1) // SPLIT, tl.program_id(1) % SPLIT
    q = tl.arange(0, Q)
    cs = C.load([b, c * Q, group, 0]).reshape(Q, BN)
    if SEG:
        base = documents + b.to(tl.int64) * (chunks * Q)
        own = tl.load(base + c * Q + q)
        first_document, end_document = edges_of(base, c, Q)
    total = tl.zeros((Q, BN), tl.float32)
    row = (b.to(tl.int64) * H + tl.program_id(1) * R) * (chunks * Q) + c * Q
    for r in range(R):
        h = tl.program_id(1) * R + r
        at, chunk = row + r * (chunks * Q), (b * chunks + c) * H + h
        dys = dy.load([b, c * Q, h, 0]).reshape(Q, BP)
        s = edges.load([chunk, 0, 0]).reshape(BP, BN)
        ds = dedges.load([chunk, 0, 0]).reshape(BP, BN)
        entry, keep = tl.exp2(tl.load(sums + at + q)), tl.exp2(tl.load(sums + at + Q - 1))
        if SEG:
            entry = tl.where(own == first_document, entry, 0)
            keep = tl.where(first_document == end_document, keep, 0)
        entered = tl.dot(cs, tl.trans(s), input_precision=PRECISION)  # (q p)
        scaled = dys.to(tl.float32) * entry[:, None]
        tl.store(entering + at + q, tl.sum(entered * scaled, 1))
        total = tl.dot(scaled.to(dys.dtype), s, total, input_precision=PRECISION)
        tl.store(passing + chunk, keep * tl.sum(s.to(tl.float32) * ds.to(tl.float32)))
    square = ((b.to(tl.int64) * chunks + c) * (G * SPLIT) + tl.program_id(1)) * (Q * Q)
    ks = tl.load(pairs + square + q[None, :] * Q + q[:, None], mask=q[:, None] >= q[None, :], other=0)  # to, from
    bs = B.load([b, c * Q, group, 0]).reshape(Q, BN)
    total = tl.dot(ks, bs, total, input_precision=PRECISION)
    dC.store([split * tl.num_programs(2) + b, c * Q, group, 0], total.to(dC.dtype).reshape(1, Q, 1, BN))


@triton.jit(do_not_specialize=LENGTHS)
def ssd_keys(
    x, C, dedges, steps, sums, documents, pairs, dB, chunks,
    H: tl.constexpr, G: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (c, g and split, b): dB (split b t g n)."""
    SEG: tl.constexpr = documents is not None
    R: tl.constexpr = H // G // SPLIT
    c, b = tl.program_id(0), tl.program_id(2)
    group, split = tl.program_id(1) // SPLIT, tl.program_id(1) % SPLIT
    q = tl.arange(0, Q)
    if SEG:
        base = documents + b.to(tl.int64) * (chunks * Q)
        own = tl.load(base + c * Q + q)
        _, end_document = edges_of(base, c, Q)
    total = tl.zeros((Q, BN), tl.float32)
    row = (b.to(tl.int64) * H + tl.program_id(1) * R) * (chunks * Q) + c * Q
    for r in range(R):
        h = tl.program_id(1) * R + r
        at = row + r * (chunks * Q)
        xs = x.load([b, c * Q, h, 0]).reshape(Q, BP)
        ds = dedges.load([(b * chunks + c) * H + h, 0, 0]).reshape(BP, BN)
        leave = tl.exp2(tl.load(sums + at + Q - 1) - tl.load(sums + at + q)) * tl.load(steps + at + q)
        if SEG:
            leave = tl.where(own == end_document, leave, 0)
        scaled = (xs.to(tl.float32) * leave[:, None]).to(xs.dtype)
        total = tl.dot(scaled, ds, total, input_precision=PRECISION)
    square = ((b.to(tl.int64) * chunks + c) * (G * SPLIT) + tl.program_id(1)) * (Q * Q)
    ks = tl.load(pairs + square + q[:, None] * Q + q[None, :], mask=q[None, :] >= q[:, None], other=0)  # from, to
    cs = C.load([b, c * Q, group, 0]).reshape(Q, BN)
    total = tl.dot(ks, cs, total, input_precision=PRECISION)
    dB.store([split * tl.num_programs(2) + b, c * Q, group, 0], total.to(dB.dtype).reshape(1, Q, 1, BN))


@triton.jit(do_not_specialize=LENGTHS)
def ssd_finish(
    dt, dt_bias, A, steps, direct, enclosed, crossed, entering, leaving, passing, skipped, ddt, dA, dbias, dD, t,
    chunks, row_stride, H: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    """ddt (b t h); dA, dbias, dD (b c h), to be summed over b and c: program (b c, block of heads).

    Without `crossed`, chunks have no halves between which pairs are told apart.
    """
    c = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    tokens = c * Q + tl.arange(0, Q)
    real = heads < H
    at = (b * H + heads[None, :]) * (chunks * Q) + tokens[:, None]
    mask = real[None, :]
    out = (b * chunks + c) * H + heads
    # of the decay at one token: pairs within the chunk and the entering state act from it on, what leaves up to it
    later = tl.load(enclosed + at, mask=mask, other=0)
    if crossed is not None:
        later += tl.load(crossed + at, mask=mask, other=0)
    later += tl.load(entering + at, mask=mask, other=0)
    earlier = tl.load(leaving + at, mask=mask, other=0)
    dlog = tl.cumsum(later, 0, reverse=True) + tl.cumsum(earlier, 0) - earlier
    dlog += tl.load(passing + out, mask=real, other=0)[None, :]
    step = tl.load(steps + at, mask=mask, other=0)
    rate = tl.load(A + heads, mask=real, other=0).to(tl.float32)
    gradient = tl.load(direct + at, mask=mask, other=0) + dlog * rate[None, :]
    inside = (tokens < t)[:, None] & mask
    if SOFTPLUS:
        raw = tl.load(dt + (b * t + tokens[:, None]) * row_stride + heads[None, :], mask=inside, other=0).to(tl.float32)
        if dt_bias is not None:
            raw += tl.load(dt_bias + heads, mask=real, other=0).to(tl.float32)[None, :]
        gradient *= 1 / (1 + tl.exp(-raw))
    gradient = tl.where(inside, gradient, 0)
    tl.store(ddt + (b * t + tokens[:, None]) * H + heads[None, :], gradient.to(ddt.dtype.element_ty), mask=inside)
    tl.store(dA + out, tl.sum(tl.where(inside, dlog * step, 0), 0), mask=real)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(gradient, 0), mask=real)
    if dD is not None:
        tl.store(dD + out, tl.sum(tl.load(skipped + at, mask=mask, other=0), 0), mask=real)
