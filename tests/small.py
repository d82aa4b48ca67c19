"""Models small enough for every test, one of each family."""

from __future__ import annotations

from typing import Any

from hinny.config import ModelConfig, validate
from hinny.model import Model

SECTIONS: dict[str, dict[str, Any]] = {
    "1": {"mamba1": dict(d_state=4, expand=2, d_conv=4, dt_rank=3, chunk_len=4)},
    "M": {"mamba2": dict(d_state=8, head_dim=8, n_groups=2, expand=2, d_conv=4, chunk_len=4)},
    "*": {"attention": dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=0.5,
                            rope_base=10000.0)},
    "-": {"mlp": dict(d_ff=24, activation="gelu")},
}
PATTERNS = ["1", "M", "*-", "M-M*-", "1*M-"]


def small_config(pattern: str, **changes: Any) -> ModelConfig:
    """A model of width 16 with 37 words; `changes` replace keys of [model]."""
    data: dict[str, Any] = dict(pattern=pattern, d_model=16, vocab_size=37, norm="rmsnorm", norm_eps=1e-5,
                                tie_embeddings=False, init_std=0.3)
    for symbol, section in SECTIONS.items():
        if symbol in pattern:
            data |= section
    return validate(ModelConfig, data | changes, "test")


def small_model(pattern: str, seed: int = 0, **changes: Any) -> Model:
    """The float64 model of `small_config`, with weights large enough that every path matters."""
    model = Model(small_config(pattern, **changes))
    model.init_weights(seed)
    return model.double()
