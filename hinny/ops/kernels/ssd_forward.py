"""SSD forward: one program walks the chunks of one head with the state in registers (docs/ssd.md, "The kernels").

    ssd_prepare     dt, A → step sizes, and sums of log2 decays within each chunk; by head, padded to whole chunks
    ssd_boundaries  the walk without outputs: the state (or its gradient, backwards) at the edges of chunks or parts
    ssd_forward     the walk: y and the final state; a part begins with what the parts before it left, folded together

A sequence is walked in one part if there are enough sequences and heads to fill the GPU, else in several at once.
Letters: b batch, t time, h heads, p head_dim, g groups, n state, q tokens of a chunk, c chunks. Tiles in comments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hinny.ops.kernels.gates import LOG2_E, softplus

GAP = tl.constexpr(-160.0)  # as a power of two: nothing, in float32, so what came before is forgotten
LENGTHS = ["t", "chunks", "parts", "part_chunks"]  # one compilation for all lengths


@triton.jit(do_not_specialize=LENGTHS)
def ssd_prepare(
    dt, dt_bias, A, documents, steps, sums, flags, t, chunks, row_stride,
    H: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    """dt (b t h) → steps, sums (b h c*q) float32; sums are inclusive, of dt A log2(e) since the chunk's start.

    With documents (b c*q) sums drop by GAP where one begins: then kernels that know of no documents keep them apart.
    flags (b h) become zero: those of `hopper_forward`.
    """
    c = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    tokens = c * Q + tl.arange(0, Q)
    real = heads < H
    inside = (tokens < t)[:, None] & real[None, :]
    step = tl.load(dt + (b * t + tokens[:, None]) * row_stride + heads[None, :], mask=inside, other=0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + heads, mask=real, other=0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(inside, step, 0)
    rate = tl.load(A + heads, mask=real, other=0).to(tl.float32) * LOG2_E
    out = (b * H + heads[None, :]) * (chunks * Q) + tokens[:, None]
    tl.store(steps + out, step, mask=real[None, :])
    log_decay = step * rate[None, :]
    if documents is not None:
        at = documents + b * (chunks * Q) + tokens
        begins = tl.load(at) != tl.load(at - 1, mask=tokens > 0, other=0)
        log_decay += tl.where(begins, GAP, 0.0)[:, None]
    tl.store(sums + out, tl.cumsum(log_decay, 0), mask=real[None, :])
    if flags is not None:
        tl.store(flags + b * H + heads, 0, mask=real & (c == 0))


@triton.jit
def tile(base, rows, columns, stride, t, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """A (rows columns) tile of a matrix with t rows of `stride` elements; zero outside."""
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if COLUMNS % WIDTH == 0:
        return tl.load(at) if EVEN else tl.load(at, mask=(rows < t)[:, None], other=0)
    return tl.load(at, mask=(rows < t)[:, None] & (columns < COLUMNS)[None, :], other=0)


@triton.jit
def folded(state, local, local_sums, documents, part, parts, length, end, tiles, real, PN: tl.constexpr,
           REVERSE: tl.constexpr, SEG: tl.constexpr):
    """`state` (p n) taken through the parts before `part` (after it, if REVERSE): decayed, with what each one added.

    A part has `length` tokens, the last one fewer, up to `end`.
    """
    count = parts - 1 - part if REVERSE else part
    for i in range(count):
        j = parts - 1 - i if REVERSE else i
        keep = tl.exp2(tl.load(local_sums + j))
        if SEG:
            before = tl.load(documents + j * length - 1, mask=j > 0, other=0)
            keep = tl.where(before == tl.load(documents + tl.minimum((j + 1) * length, end) - 1), keep, 0)
        state = state * keep + tl.load(local + j.to(tl.int64) * PN + tiles, mask=real, other=0)
    return state


@triton.jit
def walk(
    state, values, keys, steps, sums, documents, edges, tiles, real, t, first, last, p, n,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    Q: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, SEG: tl.constexpr, PRECISION: tl.constexpr,
):
    """The state (p n) after chunks first … last-1, and the sum of their log2 decays.

    Forward, tokens add step * value key^T and reach the chunk's end; REVERSE, they add value key^T from its start.
    With `edges` (c h p n) the state before each chunk (after it, if REVERSE) is stored there.
    """
    q = tl.arange(0, Q)
    total = 0.0
    for i in range(first, last):
        c = first + last - 1 - i if REVERSE else i
        tokens = c * Q + q
        x = tile(values, tokens, p, H * P, t, P, BP, EVEN)
        k = tile(keys, tokens, n, G * N, t, N, BN, EVEN)
        a = tl.load(sums + tokens)
        end = tl.load(sums + c * Q + Q - 1)
        keep = tl.exp2(end)
        weight = tl.exp2(a) if REVERSE else tl.exp2(end - a) * tl.load(steps + tokens)
        if SEG:
            own = tl.load(documents + tokens)
            before = tl.load(documents + c * Q - 1, mask=c > 0, other=0)
            after = tl.load(documents + c * Q + Q - 1)
            weight = tl.where(own == (before if REVERSE else after), weight, 0)
            keep = tl.where(before == after, keep, 0)
        if edges is not None:
            tl.store(edges + c.to(tl.int64) * (H * P * N) + tiles, state.to(edges.dtype.element_ty), mask=real)
        added = (tl.trans(x).to(tl.float32) * weight[None, :]).to(x.dtype)  # (p q)
        state = tl.dot(added, k, state * keep, input_precision=PRECISION)
        total += end
    return state, total


@triton.jit(do_not_specialize=LENGTHS)
def ssd_boundaries(
    x, B, dy, C, steps, sums, documents, initial, dfinal, edges, dedges, local, local_sums, dinitial,
    t, chunks, parts, part_chunks,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    Q: tl.constexpr, EVEN: tl.constexpr, LOCAL: tl.constexpr, PRECISION: tl.constexpr,
):
    """Walks of the states (x, B) and, backwards, of their gradients (dy, C): program (h p-block, part, direction b).

    LOCAL: every part but the last to be walked, which none comes after, starts from zero and leaves its end to `local`
    (direction b h part p n) and the sum of its decays to `local_sums`, nothing else. Without:
    states entering the chunks go to `edges` (b c h p n), gradients of those leaving them to `dedges`, and the gradient
    of the initial state to `dinitial`.
    """
    BLOCKS: tl.constexpr = (P + BP - 1) // BP
    SEG: tl.constexpr = documents is not None
    h, part = tl.program_id(0) // BLOCKS, tl.program_id(1)
    batch = tl.num_programs(2) if dy is None else tl.num_programs(2) // 2
    backwards = tl.program_id(2) >= batch
    if LOCAL:
        part += backwards.to(tl.int32)
    b = (tl.program_id(2) % batch).to(tl.int64)
    p = tl.program_id(0) % BLOCKS * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = b * H + h
    side = tl.program_id(2).to(tl.int64) * H + h
    steps += head * (chunks * Q)
    sums += head * (chunks * Q)
    if SEG:
        documents += b * chunks * Q
    tiles = p[:, None] * N + n[None, :]
    real = (p[:, None] < P) & (n[None, :] < N)
    first = part * part_chunks
    last = tl.minimum(first + part_chunks, chunks)
    state = tl.zeros((BP, BN), tl.float32)
    values = b * t * (H * P) + h * P
    keys = b * t * (G * N) + (h // (H // G)) * N
    if not backwards:
        if not LOCAL:
            if initial is not None:
                state = tl.load(initial + head * (P * N) + tiles, mask=real, other=0).to(tl.float32)
            if local is not None:
                state = folded(state, local + side * parts * (P * N), local_sums + side * parts, documents, part, parts,
                               part_chunks * Q, chunks * Q, tiles, real, P * N, False, SEG)
        state, total = walk(
            state, x + values, B + keys, steps, sums, documents,
            None if LOCAL else edges + (b * chunks * H + h) * (P * N),
            tiles, real, t, first, last, p, n, H, G, P, N, BP, BN, Q, EVEN, False, SEG, PRECISION)
        if LOCAL:
            tl.store(local + (side * parts + part) * (P * N) + tiles, state, mask=real)
            tl.store(local_sums + side * parts + part, total)
    elif dy is not None:
        if not LOCAL:
            if dfinal is not None:
                state = tl.load(dfinal + head * (P * N) + tiles, mask=real, other=0).to(tl.float32)
            if local is not None:
                state = folded(state, local + side * parts * (P * N), local_sums + side * parts, documents, part, parts,
                               part_chunks * Q, chunks * Q, tiles, real, P * N, True, SEG)
        state, total = walk(
            state, dy + values, C + keys, steps, sums, documents,
            None if LOCAL else dedges + (b * chunks * H + h) * (P * N),
            tiles, real, t, first, last, p, n, H, G, P, N, BP, BN, Q, EVEN, True, SEG, PRECISION)
        if LOCAL:
            tl.store(local + (side * parts + part) * (P * N) + tiles, state, mask=real)
            tl.store(local_sums + side * parts + part, total)
        elif dinitial is not None:
            if part == 0:
                tl.store(dinitial + head * (P * N) + tiles, state, mask=real)


@triton.jit(do_not_specialize=LENGTHS)
def ssd_forward(
    x, B, C, steps, sums, D, z, initial, documents, local, local_sums, y, ungated, final, t, chunks, parts, part_chunks,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    Q: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):
    """y (b t h p) and, by the last part, the final state (b h p n) float32: program (h, part, b).

    With z, y is gated by silu(z), and `ungated` (b t h p) is kept for the backward.
    """
    SEG: tl.constexpr = documents is not None
    h, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    head = b * H + h
    values = b * t * (H * P) + h * P
    keys = b * t * (G * N) + (h // (H // G)) * N
    steps += head * (chunks * Q)
    sums += head * (chunks * Q)
    if SEG:
        documents += b * chunks * Q
    tiles = p[:, None] * N + n[None, :]
    real = (p[:, None] < P) & (n[None, :] < N)
    state = tl.zeros((BP, BN), tl.float32)
    if initial is not None:
        state = tl.load(initial + head * (P * N) + tiles, mask=real, other=0).to(tl.float32)
    if local is not None:
        state = folded(state, local + head * parts * (P * N), local_sums + head * parts, documents, part, parts,
                       part_chunks * Q, chunks * Q, tiles, real, P * N, False, SEG)
    first = part * part_chunks
    last = tl.minimum(first + part_chunks, chunks)
    # a chunk's sums and steps are small loads that nothing hides: fetched one chunk ahead
    a, end, step = tl.load(sums + first * Q + q), tl.load(sums + first * Q + Q - 1), tl.load(steps + first * Q + q)
    for c in range(first, last):
        tokens = c * Q + q
        cs = tile(C + keys, tokens, n, G * N, t, N, BN, EVEN)  # (q n)
        bs = tile(B + keys, tokens, n, G * N, t, N, BN, EVEN)  # (q n)
        xs = tile(x + values, tokens, p, H * P, t, P, BP, EVEN)  # (q p)
        entry, leave, keep = tl.exp2(a), tl.exp2(end - a) * step, tl.exp2(end)
        seen = q[:, None] >= q[None, :]
        if SEG:
            own = tl.load(documents + tokens)
            before = tl.load(documents + c * Q - 1, mask=c > 0, other=0)
            after = tl.load(documents + c * Q + Q - 1)
            entry = tl.where(own == before, entry, 0)
            leave = tl.where(own == after, leave, 0)
            keep = tl.where(before == after, keep, 0)
            seen = seen & (own[:, None] == own[None, :])
        out = tl.dot(cs, tl.trans(state.to(cs.dtype)), input_precision=PRECISION) * entry[:, None]  # (q p)
        scores = tl.dot(cs, tl.trans(bs), input_precision=PRECISION)  # (q q)
        scores *= tl.exp2(tl.where(seen, a[:, None] - a[None, :], float("-inf"))) * step[None, :]
        out = tl.dot(scores.to(xs.dtype), xs, out, input_precision=PRECISION)
        if D is not None:
            out += tl.load(D + h).to(tl.float32) * xs.to(tl.float32)
        at = values + tokens.to(tl.int64)[:, None] * (H * P) + p[None, :]
        inside = (tokens < t)[:, None] & (p < P)[None, :]
        if z is not None:
            tl.store(ungated + at, out.to(ungated.dtype.element_ty), mask=inside)
            gate = tl.load(z + at, mask=inside, other=0).to(tl.float32)
            out *= gate / (1 + tl.exp(-gate))
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
        added = (tl.trans(xs).to(tl.float32) * leave[None, :]).to(xs.dtype)  # (p q)
        state = tl.dot(added, bs, state * keep, input_precision=PRECISION)
        ahead = tl.minimum(c + 1, last - 1) * Q
        a, end, step = tl.load(sums + ahead + q), tl.load(sums + ahead + Q - 1), tl.load(steps + ahead + q)
    if part == parts - 1:
        tl.store(final + head * (P * N) + tiles, state, mask=real)
