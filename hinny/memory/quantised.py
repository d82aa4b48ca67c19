"""Bytes of a model's weights once `hinny.infer.quantise` has made its layers' projections shorter. No torch.

    int8, fp8   a byte for each number, a float32 scale for each row
    int4        half a byte, and for each 128 values of a row a scale and a zero in bfloat16; filled up to whole tiles
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from hinny import counts
from hinny.config import ModelConfig
from hinny.errors import ConfigError

Kind = Literal["int8", "fp8", "int4"]
KINDS: tuple[str, ...] = get_args(Kind)

GROUP = 128
"""Values of a row that share int4's scale and zero."""

TILE = (8, 1024)
"""Rows and columns are filled up to multiples of these in int4's format."""

Shapes = list[tuple[int, int]]


def check_kind(kind: str) -> None:
    """Raises ConfigError for a kind that is not known."""
    if kind not in KINDS:
        raise ConfigError(f"weights are to be {kind!r}; allowed: {', '.join(KINDS)}.")


def quantised_bytes(config: ModelConfig, kind: Kind, width: int = 4) -> int:
    """Bytes of a model's weights; width: of each number of the matrices that stay, 2 in bfloat16."""
    check_kind(kind)
    count = counts.parameters(config)
    short: Shapes = []
    whole = count.embedding + count.head
    for symbol, layers in counts.layer_counts(config).items():
        shorter, stay = _MATRICES[symbol](config)
        short += shorter * layers
        whole += layers * sum(rows * columns for rows, columns in stay)
    rest = count.total - whole - sum(rows * columns for rows, columns in short)
    return sum(matrix_bytes(rows, columns, kind) for rows, columns in short) + width * whole + 4 * rest


def matrix_bytes(rows: int, columns: int, kind: Kind) -> int:
    """Bytes of a quantised matrix, its scales included."""
    if kind != "int4":
        return rows * (columns + 4)
    rows, columns = (-(-size // tile) * tile for size, tile in zip((rows, columns), TILE, strict=True))
    return rows * columns // 2 + rows * columns // GROUP * 2 * 2


def _mamba2(model: ModelConfig) -> tuple[Shapes, Shapes]:
    c, d = model.mamba2, model.d_model
    assert c is not None
    inner, groups = c.d_inner(d), c.n_groups * c.d_state
    return [(inner, d)] * 2 + [(groups, d)] * 2 + [(d, inner)], [(inner // c.head_dim, d)]


def _mamba1(model: ModelConfig) -> tuple[Shapes, Shapes]:
    c, d = model.mamba1, model.d_model
    assert c is not None
    inner = c.expand * d
    return [(inner, d)] * 2 + [(d, inner)], [(c.dt_rank + 2 * c.d_state, inner), (inner, c.dt_rank)]


def _attention(model: ModelConfig) -> tuple[Shapes, Shapes]:
    c, d = model.attention, model.d_model
    assert c is not None
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return [(q, d), (kv, d), (kv, d), (d, q)], []


def _mlp(model: ModelConfig) -> tuple[Shapes, Shapes]:
    c, d = model.mlp, model.d_model
    assert c is not None
    return [(c.d_ff, d)] * (2 if c.activation == "swiglu" else 1) + [(d, c.d_ff)], []


_MATRICES: dict[str, Callable[[ModelConfig], tuple[Shapes, Shapes]]] = {
    "M": _mamba2, "1": _mamba1, "*": _attention, "-": _mlp}
"""Pattern symbol → a layer's matrices (rows, columns): those that are made shorter, and those that stay."""
