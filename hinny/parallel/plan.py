"""What tensor parallelism cuts: the heads, groups and channels of a layer, the words of the vocabulary.

A layer's first matrices are cut by rows (what they make), its last one by columns (what it reads), all that is counted
by heads or channels in between with them. So a rank computes whole heads, and the layer's output is the sum of the
ranks' outputs. A new layer kind is one row of PLAN and one of `_counts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from hinny import pattern
from hinny.config import ModelConfig
from hinny.errors import ConfigError

ROWS, COLUMNS = 0, 1

PLAN: dict[str, dict[str, int]] = {
    "M": dict.fromkeys((
        "in_proj.z.weight", "in_proj.x.weight", "in_proj.B.weight", "in_proj.C.weight", "in_proj.dt.weight",
        "conv.x.weight", "conv.x.bias", "conv.B.weight", "conv.B.bias", "conv.C.weight", "conv.C.bias",
        "dt_bias", "A_log", "D", "norm.weight"), ROWS) | {"out_proj.weight": COLUMNS},
    "1": dict.fromkeys((
        "in_proj.x.weight", "in_proj.z.weight", "conv.weight", "conv.bias", "dt_proj.weight", "dt_bias", "A_log",
        "D"), ROWS) | dict.fromkeys((
            "x_proj.dt.weight", "x_proj.B.weight", "x_proj.C.weight", "out_proj.weight"), COLUMNS),
    "*": dict.fromkeys(("q.weight", "k.weight", "v.weight"), ROWS) | {"o.weight": COLUMNS},
    "-": dict.fromkeys(("gate.weight", "up.weight"), ROWS) | {"down.weight": COLUMNS},
}
"""Layer symbol → name of a parameter in the layer → the dimension that is cut. A parameter that is not named here is
whole on every rank."""


def check_tensor(config: ModelConfig, ranks: int) -> None:
    """ConfigError unless `ranks` divides everything that is cut in a model of `config`."""
    counts = list(_counts(config))
    common = math.gcd(*(count for _, count, _ in counts))
    for key, count, what in counts:
        if count % ranks:
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ConfigError(
                f"parallel.tensor ({ranks}) must divide {key} ({count}): each rank takes as many whole {what}. "
                f"Change {key} (the next multiple is {-(-count // ranks) * ranks}), or set parallel.tensor to a number "
                f"that divides all that it cuts in this model: {allowed}.")


def _counts(config: ModelConfig) -> Iterator[tuple[str, int, str]]:
    """Key, number and name of everything that is cut as a whole."""
    yield "model.vocab_size", config.vocab_size, "words"
    symbols = pattern.parse(config.pattern)
    if "M" in symbols:
        assert config.mamba2 is not None
        yield "model.mamba2.n_groups", config.mamba2.n_groups, "groups of heads"
    if "1" in symbols:
        assert config.mamba1 is not None
        yield "model.mamba1.expand * model.d_model", config.mamba1.expand * config.d_model, "channels"
    if "*" in symbols:
        assert config.attention is not None
        yield "model.attention.n_kv_heads", config.attention.n_kv_heads, "key/value heads"
    if "-" in symbols:
        assert config.mlp is not None
        yield "model.mlp.d_ff", config.mlp.d_ff, "channels"
