"""Memory of reading a long text and continuing it, on one GPU, without gradients: what `hinny eval` needs.

    weights       every parameter in the type it is held in: projections, embedding and head in `width` bytes
    keys          room for `tokens` keys and values of every attention layer, in the weights' type
    states        of the Mamba layers, float32: they do not grow; the layer at work holds the new one beside the old,
                  and Mamba-1 its rates, as many numbers as a state has, in two orders
    activations   of one piece of the text in the layer that needs the most of them, beside the residual stream
    workspace     cuBLAS's

The text goes through the model in pieces, so that activations do not grow with it. Logits are made where they are read,
of the last token alone, and are left out. Bytes are those that the allocator hands out, as in hinny.memory.training.
Letters: t tokens of a piece, d model, f d_ff, q heads x head_dim, kv keys and values, di d_inner, g groups, n state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hinny import counts
from hinny.config import ModelConfig
from hinny.errors import ConfigError
from hinny.memory.layers import CHUNK

WORKSPACE = 32 * 2 ** 20
"""cuBLAS's memory on Hopper, for one thread."""


def inference(model: ModelConfig, *, tokens: int, piece: int, rows: int = 1, width: int = 2) -> dict[str, Any]:
    """Peak bytes of `rows` texts of `tokens` tokens read in pieces of `piece`, by parts; width: bytes of a weight.

    Raises ConfigError for sizes below 1.
    """
    if min(tokens, piece, rows, width) < 1:
        raise ConfigError(f"tokens ({tokens}), piece ({piece}), rows ({rows}) and width ({width}) must be 1 or more.")
    kinds = counts.layer_counts(model)
    kept = 2 * model.d_model  # the residual stream, and what the layer's norm gives
    layers = [counts.layer(model, kind) for kind in kinds]
    parts = {"weights": counts.weight_bytes(model, dtype_bytes=width),
             "keys": rows * tokens * counts.kv_bytes_per_token(model, dtype_bytes=width),
             "states": rows * (counts.state_bytes(model) + 4 * max(one.state for one in layers)) + _rates(model),
             "activations": width * rows * min(piece, tokens) * (kept + max(_LAYERS[kind](model) for kind in kinds)),
             "workspace": WORKSPACE}
    return {"memory_bytes": sum(parts.values()), "parts": parts}


def _mlp(model: ModelConfig) -> int:
    c = model.mlp
    assert c is not None
    return (3 if c.activation == "swiglu" else 2) * c.d_ff


def _attention(model: ModelConfig) -> int:
    """q, k, v and the result; then the result and what the last projection makes of it, which is less."""
    c = model.attention
    assert c is not None
    return 2 * c.n_heads * c.head_dim + 2 * c.n_kv_heads * c.head_dim


def _mamba2(model: ModelConfig) -> int:
    """z, x, B, C, dt; B, C convolved; the states of the chunks, and y."""
    c = model.mamba2
    assert c is not None
    di, gn = c.d_inner(model.d_model), c.n_groups * c.d_state
    return 3 * di + 4 * gn + di // c.head_dim + di * c.d_state // CHUNK


def _mamba1(model: ModelConfig) -> int:
    """x, z; x convolved; dt; B, C; y."""
    c = model.mamba1
    assert c is not None
    di = c.expand * model.d_model
    return 5 * di + c.dt_rank + 2 * c.d_state


def _rates(model: ModelConfig) -> int:
    """Bytes of Mamba-1's rates, and of these by states and channels."""
    c = model.mamba1
    return 0 if c is None else 2 * 4 * c.expand * model.d_model * c.d_state


_LAYERS: dict[str, Callable[[ModelConfig], int]] = {"M": _mamba2, "1": _mamba1, "*": _attention, "-": _mlp}
"""Pattern symbol → numbers a token that are alive at once in one such layer, beside its input."""
