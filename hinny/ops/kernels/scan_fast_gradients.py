"""Selective scan on a Hopper GPU, in Gluon: all gradients in one walk back, 8 tokens and 32 or 64 channels at a time.

`scan_fast_walk` has left the states before each 8 tokens. A program takes these blocks from the last to the first, and
of each block 16 states at a time: their 8 tokens forwards from the state before them, then backwards with the state's
gradient, which stays in shared memory from block to block. So no gradients of states pass through memory.

    over channels   dB and dC: products on the tensor cores, of 8 states by a warp's 8 channels with these channels' 8
                    tokens. Only the column of the token at hand is used of each, and the rest is for free. In tf32,
                    products that go into sums which are rounded to bfloat16. Warps are added at the block's end.
    over states     dx and ddt: within a lane over the 16s, at the block's end over the 8 lanes and rows.
    over tokens     dA: in shared memory.

Shapes, where 8 c are the 8 channels of each of 8 warps: states and their gradients are tiles (8 n, 8 8c), two at once.
On an H100 at b 4, t 4096, d 2048, n 128: 4.9 ms; 254 registers, none spilled, one program a multiprocessor. Programs of
4 warps, two a multiprocessor, wait for each other's warps at no barrier; not timed.
Letters: b batch, t time, d channels, n states.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hinny.ops.kernels.scan_fast_walk import channel_values, decay_steps, sigmoid, step_sizes

LN_2 = gl.constexpr(0.6931471805599453)
WARP_CHANNELS = 8
"""Channels of a warp: the layouts are made for them, and for 4 or 8 warps."""

PRODUCT = gl.constexpr("{ .reg .f32 z; mov.f32 z, 0f00000000; "
                       "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$6,$5,$7}, {$8,$9}, "
                       "{z,z,z,z}; }")
PRODUCT_NUMBERS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r")


@gluon.constexpr_function
def layout(name: str, N: int, W: int) -> Any:
    """How a tile lies in the registers of W warps, by the basis of its indices' bits: registers, lanes, warps.

    S      (8 n, 8c W): a lane has two channels next to each other, as the product's second operand wants them
    S2     (16 n, 8c W): the same twice, below each other
    K      (8 n, 8 t): the tokens of a row in one lane, where S has that row
    V      (8 t, N n): B and C on their way to K
    RT, R  (N n, W warps, 8 t), and with its last two as one: the warps in registers
    G      (64, 8c W): 8 tokens times 8 rows, the rows in registers
    P      (8 t, 8c W): x, dt, dy, z
    """
    basis = gl.DistributedLinearLayout
    of_warps = [1 << i for i in range(W.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[0, 8 * i] for i in of_warps]
    bits = [1 << i for i in range(N.bit_length() - 1)]
    if name == "S":
        return basis([[0, 1]], lanes, warps, [], [8, 8 * W])
    if name == "S2":
        return basis([[0, 1], [8, 0]], lanes, warps, [], [16, 8 * W])
    if name == "K":
        return basis([[0, 1], [0, 2], [0, 4]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[0, 0] for _ in warps], [],
                     [8, 8])
    if name == "V":
        wide = [[0, i] for i in bits[2:]]
        return basis(wide[len(warps):], [[1, 0], [2, 0], [4, 0], [0, 1], [0, 2]], wide[:len(warps)], [], [8, N])
    if name == "G":
        # 4 W lanes along channels, and what is left of lanes and warps along tokens
        tokens = [[8, 0], [16, 0], [32, 0]]
        along = [[0, 2 * i] for i in (1, 2, 4, 8, 16)[:2 + len(warps)]]
        return basis([[0, 1], [1, 0], [2, 0], [4, 0]], along + tokens[:5 - len(along)], tokens[5 - len(along):], [],
                     [64, 8 * W])
    if name == "P":
        return gl.BlockedLayout([1, 2], [8 // W, 4 * W], [W, 1], [1, 0])
    tall = [[i, 0, 0] for i in bits[4:]]
    parts = ([[0, 0, 1], [0, 0, 2], *([0, i, 0] for i in of_warps), *tall[len(warps):]],
             [[0, 0, 4], *([i, 0, 0] for i in bits[:4])], (tall + [[0, 0, 0]] * 3)[:len(warps)])
    if name == "RT":
        return basis(*parts, [], [N, W, 8])
    flat = [[[i, warp * 8 + token] for i, warp, token in part] for part in parts]
    return basis(*flat, [], [N, 8 * W])


@gluon.jit
def in_tf32(x):
    return gl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def over_channels(low, high, values):
    """Tiles (8 n, 8 8c) twice and values (8 t, 8 8c) in tf32 → (8 n, 8 8t) twice: sums over each warp's 8 channels."""
    return gl.inline_asm_elementwise(
        PRODUCT, PRODUCT_NUMBERS, [low.to(gl.int32, bitcast=True), high.to(gl.int32, bitcast=True), values],
        dtype=(gl.float32, gl.float32), is_pure=True, pack=2)


@gluon.jit
def columns(tile, layout: gl.constexpr):
    """The 8 columns of a tile (8 8), all of a row in one lane."""
    even, odd = tile.reshape([8, 4, 2]).split()
    a, b = even.reshape([8, 2, 2]).split()
    c, e = odd.reshape([8, 2, 2]).split()
    a0, a1 = a.split()
    b0, b1 = b.split()
    c0, c1 = c.split()
    e0, e1 = e.split()
    # column 4 i + 2 j + k: even has k = 0, a has j = 0, a0 has i = 0
    return (gl.convert_layout(a0, layout, assert_trivial=True), gl.convert_layout(c0, layout, assert_trivial=True),
            gl.convert_layout(b0, layout, assert_trivial=True), gl.convert_layout(e0, layout, assert_trivial=True),
            gl.convert_layout(a1, layout, assert_trivial=True), gl.convert_layout(c1, layout, assert_trivial=True),
            gl.convert_layout(b1, layout, assert_trivial=True), gl.convert_layout(e1, layout, assert_trivial=True))


@gluon.jit
def halves(tile, layout: gl.constexpr):
    """A tile (16 c) as its first and last eight rows."""
    low, high = tile.reshape([2, 8, tile.shape[1]]).permute([1, 2, 0]).split()
    return gl.convert_layout(low, layout, assert_trivial=True), gl.convert_layout(high, layout, assert_trivial=True)


@gluon.jit
def both(low, high):
    """The tile of its halves."""
    return gl.join(low, high).permute([2, 0, 1]).reshape([16, low.shape[1]])


@gluon.jit
def stacked(tiles):
    """Eight tiles (8 c) below each other."""
    a = gl.join(gl.join(tiles[0], tiles[4]), gl.join(tiles[2], tiles[6]))
    b = gl.join(gl.join(tiles[1], tiles[5]), gl.join(tiles[3], tiles[7]))
    return gl.join(a, b).permute([2, 3, 4, 0, 1]).reshape([64, tiles[0].shape[1]])


@gluon.jit
def rows_of(buffer, layout: gl.constexpr):
    out = ()
    for i in gl.static_range(8):
        out += (buffer.index(i).load(layout),)
    return out


@gluon.jit
def sums_over_rows(buffer, tiles, wide: gl.constexpr, narrow: gl.constexpr):
    """Of eight tiles (8 c) the sums over rows (8 c), through shared memory."""
    buffer.store(stacked(tiles))
    return gl.convert_layout(gl.sum(buffer.load(wide).reshape([8, 8, tiles[0].shape[1]]), 1), narrow,
                             assert_trivial=True)


@gluon.jit
def forwards(a0, a1, h0, h1, B0, B1, steps, inputs, dout_part, token):
    """Two tiles of states through 8 tokens: each token's decays, the states they leave of those before, and dC."""
    dC0 = gl.zeros_like(h0)
    dC1 = gl.zeros_like(h0)
    decays0 = ()
    decays1 = ()
    kept0 = ()
    kept1 = ()
    for i in gl.static_range(8):
        decay0 = gl.exp2(a0 * steps[i][None, :])
        decay1 = gl.exp2(a1 * steps[i][None, :])
        keep0 = decay0 * h0
        keep1 = decay1 * h1
        h0 = keep0 + B0[i][:, None] * inputs[i][None, :]
        h1 = keep1 + B1[i][:, None] * inputs[i][None, :]
        decays0 += (decay0,)
        decays1 += (decay1,)
        kept0 += (keep0,)
        kept1 += (keep1,)
        found0, found1 = over_channels(h0, h1, dout_part)
        dC0 = gl.where((token == i)[None, :], found0, dC0)
        dC1 = gl.where((token == i)[None, :], found1, dC1)
    return (decays0, decays1), (kept0, kept1), (dC0, dC1)


@gluon.jit
def backwards(
    a0, a1, g, da, B0, B1, C0, C1, steps, douts, decays, kept, dinputs, ddecays, input_part, token,
):
    """The gradient of two tiles of states back through 8 tokens: it, dA, dB, and the sums over states so far of the
    gradients of dt x and of the decays' exponents, in units of a."""
    g0, g1 = g
    da0, da1 = da
    dB0 = gl.zeros_like(g0)
    dB1 = gl.zeros_like(g0)
    more_inputs = ()
    more_decays = ()
    for i in gl.static_range(7, -1, -1):
        g0 = g0 + C0[i][:, None] * douts[i][None, :]
        g1 = g1 + C1[i][:, None] * douts[i][None, :]
        found0, found1 = over_channels(g0, g1, input_part)
        dB0 = gl.where((token == i)[None, :], found0, dB0)
        dB1 = gl.where((token == i)[None, :], found1, dB1)
        more_inputs += (dinputs[i] + g0 * B0[i][:, None] + g1 * B1[i][:, None],)
        slope0 = g0 * kept[0][i]
        slope1 = g1 * kept[1][i]
        more_decays += (ddecays[i] + slope0 * a0 + slope1 * a1,)
        da0 += slope0 * steps[i][None, :]
        da1 += slope1 * steps[i][None, :]
        g0 = g0 * decays[0][i]
        g1 = g1 * decays[1][i]
    dinputs = ()
    ddecays = ()
    for i in gl.static_range(8):
        dinputs += (more_inputs[7 - i],)
        ddecays += (more_decays[7 - i],)
    return (g0, g1), (da0, da1), (dB0, dB1), dinputs, ddecays


@gluon.jit(do_not_specialize=["t", "begin", "length"])
def scan_fast_gradients(
    x, dt, z, rates, B, C, D, dt_bias, first_tokens, dy, edges, starts, dx, ddt, parts, channel_parts, ends,
    t, begin, length, d, n: gl.constexpr, N: gl.constexpr, W: gl.constexpr, SOFTPLUS: gl.constexpr,
):
    """Walks `length` tokens from `begin` on back, of program (8 W channels, b), from edges (b e n d) of those tokens.

    dx, ddt (b t d). parts (d/8W 2 b length n): dB and dC of a program's channels. channel_parts (b n+2 d): dA of state
    n-1 to 0, dD, and the gradient of dt_bias. starts, ends (b n d): the gradient that reaches the state behind these
    tokens, and the one before them. rates (n d).
    """
    BD: gl.constexpr = 8 * W
    NB: gl.constexpr = N // 8
    S: gl.constexpr = layout("S", N, W)
    S2: gl.constexpr = layout("S2", N, W)
    K: gl.constexpr = layout("K", N, W)
    V: gl.constexpr = layout("V", N, W)
    R: gl.constexpr = layout("R", N, W)
    G: gl.constexpr = layout("G", N, W)
    P: gl.constexpr = layout("P", N, W)
    SN: gl.constexpr = gl.SliceLayout(1, S)
    SD: gl.constexpr = gl.SliceLayout(0, S)
    RS: gl.constexpr = gl.SliceLayout(1, layout("RT", N, W))
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, W, [1, 0])
    b = gl.program_id(1).to(gl.int64)
    c0 = gl.program_id(0) * BD
    s_g = gl.allocate_shared_memory(gl.float32, [NB // 2, 16, BD], swizzled)
    s_dA = gl.allocate_shared_memory(gl.float32, [NB // 2, 16, BD], swizzled)
    tiles_B = gl.allocate_shared_memory(gl.float32, [NB // 2, 16, BD], swizzled)
    tiles_C = gl.allocate_shared_memory(gl.float32, [NB // 2, 16, BD], swizzled)
    wide_B = tiles_B._reinterpret(gl.float32, [N, BD], swizzled)
    wide_C = tiles_C._reinterpret(gl.float32, [N, BD], swizzled)
    # the same memory again, when dB and dC have been read
    rows_B = tiles_B._reinterpret(gl.float32, [64, BD], swizzled)
    rows_C = tiles_C._reinterpret(gl.float32, [64, BD], swizzled)
    s_B = gl.allocate_shared_memory(gl.float32, [NB, 8, 8], whole)
    s_C = gl.allocate_shared_memory(gl.float32, [NB, 8, 8], whole)
    tokens_B = s_B._reinterpret(gl.float32, [N, 8], whole).permute([1, 0])
    tokens_C = s_C._reinterpret(gl.float32, [N, 8], whole).permute([1, 0])
    s_decay = gl.allocate_shared_memory(gl.float32, [8, BD], flat)
    s_input = gl.allocate_shared_memory(gl.float32, [8, BD], flat)
    s_dout = gl.allocate_shared_memory(gl.float32, [8, BD], flat)
    tile_decay = s_decay._reinterpret(gl.float32, [8, BD], whole)
    tile_input = s_input._reinterpret(gl.float32, [8, BD], whole)
    tile_dout = s_dout._reinterpret(gl.float32, [8, BD], whole)

    jn = gl.arange(0, 8, SN)
    ch = c0 + gl.arange(0, BD, SD)
    inside = (ch < d)[None, :]
    state = jn[:, None] * d + ch[None, :]
    token = gl.arange(0, BD, SD) % 8
    j2 = gl.arange(0, 16, gl.SliceLayout(1, S2))
    ch2 = c0 + gl.arange(0, BD, gl.SliceLayout(0, S2))
    for r in range(NB // 2):
        entering = gl.zeros([16, BD], gl.float32, S2)
        s_dA.index(r).store(entering)
        if starts is not None:
            entering = gl.load(starts + (b * n + 16 * r) * d + j2[:, None] * d + ch2[None, :],
                               mask=(16 * r + j2 < n)[:, None] & (ch2 < d)[None, :], other=0)
        s_g.index(r).store(entering)

    rows = gl.arange(0, 8, gl.SliceLayout(1, P))
    cp = c0 + gl.arange(0, BD, gl.SliceLayout(0, P))
    inside_p = (cp < d)[None, :]
    bias = channel_values(dt_bias, cp, cp < d)[None, :]
    skip = channel_values(D, cp, cp < d)[None, :]
    here = rows[:, None] * d + cp[None, :]
    rows_v = gl.arange(0, 8, gl.SliceLayout(1, V))
    jv = gl.arange(0, N, gl.SliceLayout(0, V))
    here_v = rows_v[:, None] * n + jv[None, :]
    jr = gl.arange(0, N, gl.SliceLayout(1, RS))
    tr = gl.arange(0, 8, gl.SliceLayout(0, RS))
    dskip = gl.zeros([8, BD], gl.float32, P)
    dbias = gl.zeros([8, BD], gl.float32, P)
    half = gl.num_programs(1).to(gl.int64) * length * n
    parts += gl.program_id(0).to(gl.int64) * 2 * half + b * length * n
    E = (length + 7) // 8
    edge = (b * E + E - 1) * n * d
    a0_next = gl.load(rates + state, mask=(jn < n)[:, None] & inside, other=0)
    a1_next = gl.load(rates + 8 * d + state, mask=(8 + jn < n)[:, None] & inside, other=0)
    h0_next = gl.load(edges + edge + state, mask=(jn < n)[:, None] & inside, other=0)
    h1_next = gl.load(edges + edge + 8 * d + state, mask=(8 + jn < n)[:, None] & inside, other=0)
    for back in range(E):
        e = E - 1 - back
        first = e * 8
        at = b * t + begin + first
        mask = (first + rows < length)[:, None] & inside_p
        mask_v = (first + rows_v < length)[:, None] & (jv < n)[None, :]
        raw_dt = gl.load(dt + at * d + here, mask=mask, other=0)
        value = gl.load(x + at * d + here, mask=mask, other=0).to(gl.float32)
        dout = gl.load(dy + at * d + here, mask=mask, other=0).to(gl.float32)
        if z is not None:
            gate = gl.load(z + at * d + here, mask=mask, other=0).to(gl.float32)
            dout *= gate * sigmoid(gate)
        tokens_B.store(gl.load(B + at * n + here_v, mask=mask_v, other=0).to(gl.float32))
        tokens_C.store(gl.load(C + at * n + here_v, mask=mask_v, other=0).to(gl.float32))
        step = step_sizes(raw_dt, bias, mask, SOFTPLUS)
        tile_decay.store(decay_steps(step, first_tokens, at + rows, first + rows < length))
        tile_input.store(step * value)
        tile_dout.store(dout)
        dskip += dout * value
        input_part = in_tf32(tile_input.load(S))
        dout_part = in_tf32(tile_dout.load(S))
        dinputs = ()
        ddecays = ()
        for _ in gl.static_range(8):
            dinputs += (gl.zeros([8, BD], gl.float32, S),)
            ddecays += (gl.zeros([8, BD], gl.float32, S),)
        edge = (b * E + e) * n * d
        edge_before = (b * E + gl.maximum(e - 1, 0)) * n * d
        for j in range(NB // 2):
            steps = rows_of(s_decay, SD)
            inputs = rows_of(s_input, SD)
            douts = rows_of(s_dout, SD)
            a0 = a0_next
            a1 = a1_next
            h0 = h0_next
            h1 = h1_next
            # the next states', on their way while these are run: behind the last, the first of the block before
            following = (j + 1) % (NB // 2)
            edge_there = gl.where(following == 0, edge_before, edge)
            mask0 = (16 * following + jn < n)[:, None] & inside
            mask1 = (16 * following + 8 + jn < n)[:, None] & inside
            rates_there = rates + 16 * following * d
            edges_there = edges + (edge_there + 16 * following * d)
            a0_next = gl.load(rates_there + state, mask=mask0, other=0)
            a1_next = gl.load(rates_there + 8 * d + state, mask=mask1, other=0)
            h0_next = gl.load(edges_there + state, mask=mask0, other=0)
            h1_next = gl.load(edges_there + 8 * d + state, mask=mask1, other=0)
            B0 = columns(s_B.index(2 * j).load(K), SN)
            B1 = columns(s_B.index(2 * j + 1).load(K), SN)
            C0 = columns(s_C.index(2 * j).load(K), SN)
            C1 = columns(s_C.index(2 * j + 1).load(K), SN)
            decays, kept, dC = forwards(a0, a1, h0, h1, B0, B1, steps, inputs, dout_part, token)
            g = halves(s_g.index(j).load(S2), S)
            da = halves(s_dA.index(j).load(S2), S)
            g, da, dB, dinputs, ddecays = backwards(a0, a1, g, da, B0, B1, C0, C1, steps, douts, decays, kept, dinputs,
                                                    ddecays, input_part, token)
            s_g.index(j).store(both(g[0], g[1]))
            s_dA.index(j).store(both(da[0], da[1]))
            tiles_B.index(j).store(both(dB[0], dB[1]))
            tiles_C.index(j).store(both(dC[0], dC[1]))
        found_B = gl.convert_layout(gl.sum(wide_B.load(R).reshape([N, W, 8]), 1), RS, assert_trivial=True)
        found_C = gl.convert_layout(gl.sum(wide_C.load(R).reshape([N, W, 8]), 1), RS, assert_trivial=True)
        out = parts + (first + tr)[None, :] * n + jr[:, None]
        written = (jr < n)[:, None] & (first + tr < length)[None, :]
        gl.store(out, found_B, mask=written)
        gl.store(out + half, found_C, mask=written)
        dinput = sums_over_rows(rows_B, dinputs, G, P)
        dstep = sums_over_rows(rows_C, ddecays, G, P)
        gl.store(dx + at * d + here, (dinput * step + skip * dout).to(dx.dtype.element_ty), mask=mask)
        dstep = dstep * LN_2 + dinput * value
        if SOFTPLUS:
            dstep *= sigmoid(raw_dt.to(gl.float32) + bias)
        dbias += gl.where(mask, dstep, 0.0)
        gl.store(ddt + at * d + here, dstep.to(ddt.dtype.element_ty), mask=mask)
    channel_parts += b * (n + 2) * d
    for r in range(NB // 2):
        real = (16 * r + j2 < n)[:, None] & (ch2 < d)[None, :]
        gl.store(channel_parts + (n - 1 - 16 * r - j2)[:, None] * d + ch2[None, :], s_dA.index(r).load(S2), mask=real)
        if ends is not None:
            gl.store(ends + (b * n + 16 * r) * d + j2[:, None] * d + ch2[None, :], s_g.index(r).load(S2), mask=real)
    gl.store(channel_parts + n * d + cp, gl.sum(dskip, 0), mask=cp < d)
    gl.store(channel_parts + (n + 1) * d + cp, gl.sum(dbias, 0), mask=cp < d)
