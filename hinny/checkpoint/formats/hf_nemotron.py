"""Hugging Face's Nemotron class (model_type "nemotron"): in, out.

The Transformer of the paper: LayerNorm-1p, rotary positions on a part of each head, an MLP without a gate.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hinny.checkpoint.formats import hf_folder as hf
from hinny.checkpoint.formats import hf_rope
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.hf_layers import block_rows, head_row
from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig

NAME = "nemotron"
ARCHITECTURE = "NemotronForCausalLM"
FRACTION = 0.5
"""Share of a head that the class rotates where partial_rotary_factor is absent."""


def recognises(folder: Path) -> bool:
    """Whether `folder` says that it is of this class. Never raises."""
    return hf.recognised(folder, NAME)


def open_checkpoint(folder: Path) -> Foreign:
    """What the folder holds. Raises CheckpointError for settings that our layers do not compute exactly."""
    return hf.open_class(folder, NAME, ARCHITECTURE, _model, lambda model, prefix, _: rows(model, prefix=prefix),
                         ["embed_tokens"], rotary=True)


def rows(model: ModelConfig, *, prefix: str = "model.") -> list[Row]:
    """The name table; a tied head is not stored."""
    return block_rows(model, prefix) + ([] if model.tie_embeddings else [head_row(model)])


def refusals(model: ModelConfig) -> list[str]:
    """Why this class cannot express the model."""
    found = hf.refuse_unless_blocks(model, NAME) + hf.refuse_all_but(model, NAME, layers="*-", norm="layernorm1p")
    if model.attention is not None and model.attention.positions != "rope":
        found.append(f'model.attention.positions is "{model.attention.positions}"; {NAME} has "rope" alone.')
    if model.mlp is not None and model.mlp.activation == "swiglu":
        found.append(f'model.mlp.activation is "swiglu"; {NAME} has no third matrix: "relu2" or "gelu".')
    return found


def write_settings(model: ModelConfig, folder: Path, *, dtype: torch.dtype, max_len: int,
                   eod: int | None = None) -> list[str]:
    """Write config.json; max_len is the longest sequence that servers should take. Returns what readers must know."""
    a, m = model.attention, model.mlp
    assert a is not None
    assert m is not None
    hf.write_config(folder, {
        "architectures": [ARCHITECTURE], "model_type": NAME, "vocab_size": model.vocab_size,
        "hidden_size": model.d_model, "num_hidden_layers": model.depth // 2, "intermediate_size": m.d_ff,
        "hidden_act": m.activation, "num_attention_heads": a.n_heads, "num_key_value_heads": a.n_kv_heads,
        "head_dim": a.head_dim, "norm_eps": model.norm_eps, "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        **hf_rope.written(a, max_len, partial_rotary_factor=a.rope_fraction)}, dtype=dtype, eod=eod)
    if m.activation == "relu2":
        return []
    return [f"hidden_act is {m.activation}. transformers computes it. Servers may have squared ReLU built into this "
            "class, and none was tried: compare its logits before you use one."]


def _model(settings: hf.Settings) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias"):
        settings.must_be(key, False)
    settings.must_be("hidden_act", "relu2", "gelu")
    settings.must_lack("sliding_window", "sliding windows")
    d_model, n_heads = settings.need("hidden_size", int), settings.need("num_attention_heads", int)
    head_dim = settings.get("head_dim", int, d_model // n_heads)
    return hf.model_config(settings, {
        "pattern": "*-" * settings.need("num_hidden_layers", int), "d_model": d_model,
        "vocab_size": settings.need("vocab_size", int), "norm": "layernorm1p",
        "norm_eps": settings.get("norm_eps", float, 1e-5),
        "tie_embeddings": settings.get("tie_word_embeddings", bool, False),
        "init_std": settings.get("initializer_range", float, hf.INIT_STD) or hf.INIT_STD,
        "attention": {"n_heads": n_heads, "n_kv_heads": settings.get("num_key_value_heads", int, n_heads),
                      "head_dim": head_dim, **hf_rope.rope(settings, head_dim, FRACTION)},
        "mlp": {"d_ff": settings.need("intermediate_size", int),
                "activation": settings.get("hidden_act", str, "relu2")}})
