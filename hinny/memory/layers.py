"""Bytes that one layer takes in training, on one rank, for a micro-batch: kept for the backward pass, and made in it.

Counted is what the GPU's forms of the operators save and make (hinny.ops.kernels; SSD on Hopper; PyTorch's flash
attention), in the activations' type, of `width` bytes, unless said. A tensor that two operators save counts once.

    every layer   x into the residual branch, saved by the norm                                d
                  what the norm gives, saved by the projections                                d
    MLP           what up (and gate) give; the activation's result, saved by down              f (2 f); f
    attention     q (rotated), k, v, the result; the log-sum-exp, float32                      2 q + kv; h
                  packed documents: each token's first and last, int32, and RoPE's angles, float32; where the kernels
                  for them do not take the heads, the mask as numbers (b t t), k and v for every query head
                  context parallelism: k and v of all ranks; the results of two chunks, and joined        q more
    Mamba-2       z and x, B, C, dt before the convolutions; x, B, C after them; y; the gated norm's result
                                                                                               5 di + 4 g n + h
    Mamba-1       x, z; x after the convolution; dt as x_proj and dt_proj give it; B, C; y     5 di + r + 2 n
                  the states entering spans, float32 (b s n di)

Selective recomputation gives up what the norm gives, what the activation gives, and what the gated norm gives.
Full recomputation keeps x alone. With tensor parallelism x is of the tokens between layers.
Letters: d model, f d_ff, h heads, p head_dim, q = h p, kv = 2 heads of keys times p, di d_inner, g groups, n state,
r rank of dt, t tokens of a sequence, b sequences, s spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hinny import counts
from hinny.config import ModelConfig

CHUNK = 128
"""Tokens between the states that SSD's backward makes on Hopper."""
SCAN_CHUNK = 16
SCAN_LANES = 32
SCAN_EDGE_BYTES = 2 ** 30
SCAN_PROGRAMS = 4224
SCAN_SHORTEST = 64
"""Of the scan's kernels: tokens between the states of its backward, channels of a program, most bytes of such states,
programs that it aims at, and the shortest span (hinny.ops.kernels.launch, sm90)."""

PACKED_HEADS = (16, 32, 64, 128)
"""Widths of heads that the kernels for attention within packed documents take."""


@dataclass(frozen=True)
class Share:
    """What a rank has of a micro-batch and of the layers."""

    sequences: int
    length: int
    """Tokens of a sequence on this rank: those of its part, with context parallelism."""
    context: int = 1
    tensor: int = 1
    width: int = 2
    """Bytes of a number of the activations."""
    packed: bool = False
    """Whether documents in a sequence are kept apart."""

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def between(self) -> int:
        """Tokens between layers, where tensor parallelism cuts them too."""
        return -(-self.tokens // self.tensor)


@dataclass(frozen=True)
class LayerBytes:
    """One layer's bytes on one rank for one micro-batch."""

    kept: int
    """Without recomputation."""
    selective: int
    full: int
    working: int
    """Made by the backward pass at once, beside all that is kept of the layer, its weights' gradients apart."""
    matrices: int
    """Elements of the projections on this rank; kept in the products' type where that is not theirs."""
    largest: int
    """Elements of the largest projection on this rank: its gradient is whole before it is added."""


def _layer(share: Share, model: ModelConfig, *, inside: int, dropped: int, working: int, extra: int, matrices: int,
           largest: int) -> LayerBytes:
    """From elements per token: inside the layer, those of them given up; and from bytes: made in the backward, kept
    besides. matrices, largest: of the whole layer."""
    x, unit = share.width * share.between * model.d_model, share.width * share.tokens
    kept = x + unit * (model.d_model + inside) + extra
    return LayerBytes(kept=kept, selective=kept - unit * (model.d_model + dropped), full=x,
                      working=unit * model.d_model + working, matrices=-(-matrices // share.tensor),
                      largest=-(-largest // share.tensor))


def _mlp(model: ModelConfig, share: Share) -> LayerBytes:
    c = model.mlp
    assert c is not None
    f = c.d_ff // share.tensor
    inputs = 2 if c.activation == "swiglu" else 1
    return _layer(share, model, inside=(inputs + 1) * f, dropped=f, working=share.width * share.tokens * inputs * f,
                  extra=0, matrices=(inputs + 1) * model.d_model * c.d_ff, largest=model.d_model * c.d_ff)


def _attention(model: ModelConfig, share: Share) -> LayerBytes:
    c = model.attention
    assert c is not None
    heads, d = c.n_heads // share.tensor, model.d_model
    q, kv = heads * c.head_dim, 2 * c.n_kv_heads * c.head_dim // share.tensor
    shared = c.n_kv_heads != c.n_heads
    whole = share.length * share.context
    kernels = share.packed and share.context == 1 and share.width == 2 and c.head_dim in PACKED_HEADS
    masked = share.packed and not kernels
    # every rank of `context` reads the keys and values of all
    keys = (2 * q if shared and masked else kv) * share.context
    # each chunk's result, kept by its attention, and both as one, kept by the projection
    results = q if share.context == 1 else 2 * q
    extra = 4 * heads * share.tokens
    if masked:
        extra += share.width * share.tokens * whole
    elif kernels:
        extra += 8 * share.tokens
    if share.packed and c.positions == "rope":
        extra += 8 * c.rope_dim * share.tokens
    # gradients of the result, of q, k and v (of every query head's first), and q's in float32 as they are summed
    made = share.width * (2 * q + keys + (2 * q if shared and not kernels else 0)) + 4 * ((not kernels) * q + heads)
    return _layer(share, model, inside=q + results + keys, dropped=0, working=share.tokens * made, extra=extra,
                  matrices=counts.layer(model, "*").parameters, largest=d * c.n_heads * c.head_dim)


def _mamba2(model: ModelConfig, share: Share) -> LayerBytes:
    c, d = model.mamba2, model.d_model
    assert c is not None
    di, gn = c.d_inner(d) // share.tensor, c.n_groups * c.d_state // share.tensor
    heads = di // c.head_dim
    # documents as int32, kept by SSD
    extra = 4 * share.tokens if share.packed else 0
    # gradients of z, y and the convolved x, with the states of the chunks and theirs, or with that of x
    states = 2 * di * c.d_state * -(-share.tokens // CHUNK)
    made = share.tokens * (di + 2 * gn) + max(states + di * share.tokens, 2 * di * share.tokens)
    matrices = d * (3 * c.d_inner(d) + 2 * c.n_groups * c.d_state + c.d_inner(d) // c.head_dim)
    return _layer(share, model, inside=5 * di + 4 * gn + heads, dropped=di,
                  working=share.width * made + 28 * heads * share.tokens, extra=extra, matrices=matrices,
                  largest=d * c.d_inner(d))


def _mamba1(model: ModelConfig, share: Share) -> LayerBytes:
    c, d = model.mamba1, model.d_model
    assert c is not None
    n, whole = c.d_state, c.expand * d
    di = whole // share.tensor
    inside = 5 * di + c.dt_rank + 2 * n
    spans, working = _scan(share, di, n)
    rates = 8 * di * n  # -exp(A_log) and what exp saves
    matrices = d * 3 * whole + whole * (2 * c.dt_rank + 2 * n)
    extra = 4 * share.sequences * spans * n * di + rates
    return _layer(share, model, inside=inside, dropped=0, working=share.width * share.tokens * 4 * di + working,
                  extra=extra, matrices=matrices, largest=d * whole)


def _scan(share: Share, d: int, n: int) -> tuple[int, int]:
    """Spans of a sequence, and bytes of the backward's states and sums."""
    piece = max(2 * SCAN_EDGE_BYTES // (n * d), SCAN_CHUNK)
    programs = 2112 if n <= 16 else 528 if n <= 64 else 264
    blocks = -(-d // SCAN_LANES)
    wanted = max(min(-(-programs // (share.sequences * blocks)), share.length // SCAN_SHORTEST),
                 -(-share.length // piece), 1)
    span = min(-(-share.length // wanted // SCAN_CHUNK) * SCAN_CHUNK, piece // SCAN_CHUNK * SCAN_CHUNK)
    tokens = min(share.tokens, max(piece // share.length, 1) * share.length, piece if piece < share.length else
                 share.tokens)
    units = blocks * share.tokens // SCAN_CHUNK // SCAN_PROGRAMS
    each = max(1, min(16, units))
    group = max(1, min(blocks, units // each))
    edges, parts = tokens * n * d // 2, -(-blocks // group) * 8 * tokens * n
    channels = 4 * (n + 2) * d * -(-share.tokens // (SCAN_CHUNK * each))
    return -(-share.length // span), edges + parts + channels + 8 * share.tokens * n


LAYER_BYTES: dict[str, Callable[[ModelConfig, Share], LayerBytes]] = {
    "M": _mamba2, "1": _mamba1, "*": _attention, "-": _mlp}
"""Pattern symbol → what one such layer takes."""
