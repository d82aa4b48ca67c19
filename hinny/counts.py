"""Parameters, FLOPs and bytes of a model, from its config alone. No torch.

FLOPs are those of the definition, per token: a product of m x k by k x n counts 2 m n k, an m-vector by a k x m matrix
2 m k. Counted besides the weight matrices and the head:

    convolution   2 w per channel
    attention     4 h p * length / 2: scores and weighted values, the causal half of the square
    Mamba-2       chunks of l tokens: g n l (C Bᵀ) + h p l (times x), the causal half of each l x l square,
                  + 4 h p n (states of the chunks: formed, then read); passing them on, h p n / l, is left out
    Mamba-1       7 d_inner n: dt A, exp, dt x B, two for the decayed sum, two for C
    one token     of decoding: attention 4 h p context; Mamba-2 5 h p n; Mamba-1 7 d_inner n

Norms, activations, gates, residuals and the embedding's look-up are left out: below 1 % at the sizes of the paper.
Training counts three times the forward pass. What [parallel]'s recompute adds is counted apart (`recomputed_flops`);
what a kernel makes again inside its own backward pass, as attention's its scores, is in neither. What training keeps in
memory is in hinny.memory.

Letters: d model, h heads, p head_dim, g groups, n state, w convolution width, l in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hinny import pattern
from hinny.config import ModelConfig, ParallelConfig
from hinny.errors import ConfigError


@dataclass(frozen=True)
class LayerCounts:
    """One layer without its pre-norm. Numbers are elements, not bytes, unless said."""

    parameters: int
    products: int
    """Multiply-adds of a token with the weights of matrices and convolution."""
    last: int
    """Of these the ones with the last matrix."""
    mixing: Callable[[int], int]
    """Sequence length → FLOPs per token that mix tokens, on average over the sequence."""
    step: Callable[[int], int]
    """Tokens in the context → FLOPs that mix one decoded token with them."""
    state: int
    """Elements of the state that does not grow: SSM and the last inputs of the convolution."""
    conv: int
    """Of these the convolution's."""
    kv: int
    """Elements of keys and values per token."""


@dataclass(frozen=True)
class Parameters:
    """Exact parameter counts by part."""

    embedding: int
    head: int
    """0 where it is tied to the embedding."""
    norms: int
    """Pre-norms of all layers and the final norm."""
    layers: dict[str, int]
    """Pattern symbol → all layers of that kind, without their pre-norms; only kinds in the pattern."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """All but embedding and head."""
        return self.norms + sum(self.layers.values())


def _zero(_: int) -> int:
    return 0


def _mamba2(model: ModelConfig) -> LayerCounts:
    c, d = model.mamba2, model.d_model
    assert c is not None
    d_inner = c.d_inner(d)
    heads, groups = d_inner // c.head_dim, c.n_groups * c.d_state
    channels = d_inner + 2 * groups
    in_proj = 2 * d_inner + 2 * groups + heads
    weights = d * in_proj + d_inner * d + channels * c.d_conv

    def mixing(length: int) -> int:
        return (groups + d_inner) * min(c.chunk_len, length) + 4 * d_inner * c.d_state

    return LayerCounts(parameters=weights + channels + 3 * heads + d_inner, products=weights, last=d_inner * d,
                       mixing=mixing, step=lambda context: 5 * d_inner * c.d_state,
                       state=d_inner * c.d_state + channels * (c.d_conv - 1), conv=channels * (c.d_conv - 1), kv=0)


def _mamba1(model: ModelConfig) -> LayerCounts:
    c, d = model.mamba1, model.d_model
    assert c is not None
    d_inner = c.expand * d
    x_proj = c.dt_rank + 2 * c.d_state
    weights = d * 2 * d_inner + d_inner * c.d_conv + d_inner * x_proj + c.dt_rank * d_inner + d_inner * d
    scan = 7 * d_inner * c.d_state

    # besides the products: bias of the convolution, dt_bias, D, A_log
    return LayerCounts(parameters=weights + 3 * d_inner + d_inner * c.d_state, products=weights, last=d_inner * d,
                       mixing=lambda length: scan, step=lambda context: scan,
                       state=d_inner * c.d_state + d_inner * (c.d_conv - 1), conv=d_inner * (c.d_conv - 1), kv=0)


def _attention(model: ModelConfig) -> LayerCounts:
    c, d = model.attention, model.d_model
    assert c is not None
    q, kv = c.n_heads * c.head_dim, 2 * c.n_kv_heads * c.head_dim
    weights = d * q + d * kv + q * d
    return LayerCounts(parameters=weights, products=weights, last=q * d, mixing=lambda length: 2 * q * length,
                       step=lambda context: 4 * q * context, state=0, conv=0, kv=kv)


def _mlp(model: ModelConfig) -> LayerCounts:
    c, d = model.mlp, model.d_model
    assert c is not None
    matrices = 3 if c.activation == "swiglu" else 2
    weights = matrices * d * c.d_ff
    return LayerCounts(parameters=weights, products=weights, last=d * c.d_ff, mixing=_zero, step=_zero, state=0,
                       conv=0, kv=0)


LAYER_COUNTS: dict[str, Callable[[ModelConfig], LayerCounts]] = {
    "M": _mamba2, "1": _mamba1, "*": _attention, "-": _mlp}
"""Pattern symbol → what one such layer counts."""


def layer(model: ModelConfig, symbol: str) -> LayerCounts:
    """What one layer of kind `symbol` counts, without its pre-norm."""
    return LAYER_COUNTS[symbol](model)


def _all(model: ModelConfig) -> list[tuple[int, LayerCounts]]:
    return [(count, layer(model, symbol)) for symbol, count in layer_counts(model).items()]


def layer_counts(model: ModelConfig) -> dict[str, int]:
    """Pattern symbol → number of layers, only kinds in the pattern."""
    return {symbol: count for symbol, count in pattern.counts(model.pattern).items() if count}


def parameters(model: ModelConfig) -> Parameters:
    """Exact parameter counts by part."""
    matrix = model.vocab_size * model.d_model
    norm = model.d_model * (2 if model.norm == "layernorm1p" else 1)
    return Parameters(
        embedding=matrix, head=0 if model.tie_embeddings else matrix, norms=norm * (model.depth + 1),
        layers={symbol: count * layer(model, symbol).parameters for symbol, count in layer_counts(model).items()})


def forward_flops(model: ModelConfig, length: int) -> int:
    """FLOPs per token of a forward pass over a sequence of `length` tokens, logits of every position included."""
    return head_flops(model) + sum(n * (2 * one.products + one.mixing(_positive(length))) for n, one in _all(model))


def training_flops(model: ModelConfig, length: int) -> int:
    """FLOPs per trained token: forward, and twice that backward. Nothing that is computed again."""
    return 3 * forward_flops(model, length)


def recomputed_flops(model: ModelConfig, length: int, parallel: ParallelConfig) -> int:
    """FLOPs per trained token that `parallel.recompute` adds to `training_flops`.

    A block that runs again does so but for its last product, which a compiled one makes too. "selective" adds none that
    are counted here: norms, gates and activations (hinny.parallel.recompute).
    """
    if parallel.recompute in (None, "selective"):
        return 0
    kinds = model.pattern if parallel.recompute == "full" else parallel.recompute
    found = 0
    for symbol, number in layer_counts(model).items():
        if symbol in kinds:
            one = layer(model, symbol)
            found += number * (2 * (one.products - one.last * (not parallel.compile)) + one.mixing(_positive(length)))
    return found


def decode_flops(model: ModelConfig, context: int) -> int:
    """FLOPs of one more token after `context` tokens."""
    return head_flops(model) + sum(n * (2 * one.products + one.step(context)) for n, one in _all(model))


def head_flops(model: ModelConfig) -> int:
    """FLOPs of the logits of one position."""
    return 2 * model.d_model * model.vocab_size


def state_bytes(model: ModelConfig, *, dtype_bytes: int = 4, conv_dtype_bytes: int = 4) -> int:
    """Bytes per sequence that do not grow with it: SSM states and the last w - 1 inputs of the convolutions.

    hinny holds the convolutions' in float32, and SSM states too unless it is told otherwise; the released models'
    server used bfloat16 for both (2 bytes each).
    """
    return sum(count * (dtype_bytes * (one.state - one.conv) + conv_dtype_bytes * one.conv)
               for count, one in _all(model))


def kv_bytes_per_token(model: ModelConfig, *, dtype_bytes: int = 2) -> int:
    """Bytes of keys and values per token of context, in bfloat16 unless told."""
    return dtype_bytes * sum(count * one.kv for count, one in _all(model))


def weight_bytes(model: ModelConfig, *, dtype_bytes: int = 2) -> int:
    """Bytes of weights in memory."""
    return dtype_bytes * parameters(model).total


def decode_weight_bytes(model: ModelConfig, *, dtype_bytes: int = 2) -> int:
    """Bytes of weights read in one decode step: all but an untied embedding, of which only single rows are read."""
    count = parameters(model)
    return dtype_bytes * (count.total - (0 if model.tie_embeddings else count.embedding))


def _positive(length: int) -> int:
    if length < 1:
        raise ConfigError(f"length is {length}; a sequence needs at least one token.")
    return length
