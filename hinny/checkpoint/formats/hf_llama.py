"""Hugging Face's Llama class (model_type "llama"): in, out.

A Transformer with RMSNorm, rotary positions on whole heads and a gated MLP.
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
from hinny.errors import CheckpointError

NAME = "llama"
ARCHITECTURE = "LlamaForCausalLM"


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
    found = hf.refuse_unless_blocks(model, NAME) + hf.refuse_all_but(model, NAME, layers="*-", norm="rmsnorm")
    if a := model.attention:
        if a.positions != "rope":
            found.append(f'model.attention.positions is "{a.positions}"; {NAME} has "rope" alone.')
        elif a.rope_dim != a.head_dim:
            found.append(f"model.attention.rope_fraction is {a.rope_fraction}; {NAME} rotates whole heads: 1.0.")
        if model.d_model % a.n_heads:
            found.append(f"model.attention.n_heads ({a.n_heads}) does not divide model.d_model ({model.d_model}); "
                         f"{NAME} asks for that, whatever head_dim is.")
    if model.mlp is not None and model.mlp.activation != "swiglu":
        found.append(f'model.mlp.activation is "{model.mlp.activation}"; {NAME} has "swiglu" alone.')
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
        "hidden_act": "silu", "num_attention_heads": a.n_heads, "num_key_value_heads": a.n_kv_heads,
        "head_dim": a.head_dim, "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        **hf_rope.written(a, max_len)}, dtype=dtype, eod=eod)
    return []


def _model(settings: hf.Settings) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias"):
        settings.must_be(key, False)
    settings.must_be("hidden_act", "silu", "swish")
    settings.must_lack("sliding_window", "sliding windows")
    d_model, n_heads = settings.need("hidden_size", int), settings.need("num_attention_heads", int)
    head_dim = settings.get("head_dim", int, d_model // n_heads)
    rope = hf_rope.rope(settings, head_dim, 1.0)
    if rope["rope_fraction"] != 1.0:
        raise CheckpointError(f"{settings.file}: partial_rotary_factor is {rope['rope_fraction']}; the class ignores "
                              "it and rotates whole heads: it is not clear what was trained. Remove it or set it to 1.")
    return hf.model_config(settings, {
        "pattern": "*-" * settings.need("num_hidden_layers", int), "d_model": d_model,
        "vocab_size": settings.need("vocab_size", int), "norm": "rmsnorm",
        "norm_eps": settings.get("rms_norm_eps", float, 1e-6),
        "tie_embeddings": settings.get("tie_word_embeddings", bool, False),
        "init_std": settings.get("initializer_range", float, hf.INIT_STD) or hf.INIT_STD,
        "attention": {"n_heads": n_heads, "n_kv_heads": settings.get("num_key_value_heads", int, n_heads),
                      "head_dim": head_dim, **rope},
        "mlp": {"d_ff": settings.need("intermediate_size", int), "activation": "swiglu"}})
