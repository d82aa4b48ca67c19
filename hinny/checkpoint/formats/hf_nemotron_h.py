"""Hugging Face's NemotronH class (model_type "nemotron_h") without experts: in, out.

Any pattern of M, * and -: the class that vLLM, SGLang, TensorRT-LLM, llama.cpp and mlx-lm serve. Its layers are ours:
a grouped gated norm, attention without positions, an MLP without a gate.

transformers raises time steps below time_step_min to it while it reads a prompt; those who trained and those who serve
such models do not. Files are read without that; what is written has the least normal float32 for time_step_min, which
changes no time step.

A_log, D and dt_bias are stored in float32 whatever the rest is; the class rounds them to the type that the model is
loaded in, and computes with A_log in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hinny.checkpoint.formats import hf_folder as hf
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.hf_layers import head_row, mixer_rows
from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig
from hinny.errors import CheckpointError
from hinny.pattern import parse

NAME = "nemotron_h"
ARCHITECTURE = "NemotronHForCausalLM"

SYMBOLS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-"}
"""layers_block_type, in its older and newer words → our symbol."""

LEAST_TIME_STEP = 2.0 ** -126
"""The least normal float32."""

ABSENT = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504,
          "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
          "chunk_size": 128, "mlp_hidden_act": "relu2"}
"""Settings of the layer kinds that a pattern may lack: some readers ask for all of them. These are the class's own."""


def recognises(folder: Path) -> bool:
    """Whether `folder` says that it is of this class. Never raises."""
    return hf.recognised(folder, NAME)


def open_checkpoint(folder: Path) -> Foreign:
    """What the folder holds. Raises CheckpointError for settings that our layers do not compute exactly."""
    return hf.open_class(folder, NAME, ARCHITECTURE, _model, lambda model, prefix, embedding: rows(
        model, prefix=prefix, embedding=embedding), hf.EMBEDDINGS, more=_steps)


def rows(model: ModelConfig, *, prefix: str = "backbone.", embedding: str = hf.EMBEDDINGS[0]) -> list[Row]:
    """The name table. The class has a head of its own: a tied one is written as a copy of the embedding."""
    return [*mixer_rows(model, prefix, embedding), head_row(model)]


def refusals(model: ModelConfig) -> list[str]:
    """Why this class cannot express the model."""
    found = hf.refuse_all_but(model, NAME, layers="M*-", norm="rmsnorm")
    if model.attention is not None and model.attention.positions != "none":
        found.append(f'model.attention.positions is "{model.attention.positions}"; {NAME} has "none" alone.')
    if model.mlp is not None and model.mlp.activation == "swiglu":
        found.append(f'model.mlp.activation is "swiglu"; {NAME} has no third matrix: "relu2" or "gelu".')
    return found


def write_settings(model: ModelConfig, folder: Path, *, dtype: torch.dtype, max_len: int,
                   eod: int | None = None) -> list[str]:
    """Write config.json; max_len is the longest sequence that servers should take. Returns what readers must know."""
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURE], "model_type": NAME, "vocab_size": model.vocab_size,
        "hidden_size": model.d_model, "num_hidden_layers": model.depth, "hybrid_override_pattern": parse(model.pattern),
        "layer_norm_epsilon": model.norm_eps, "rms_norm_eps": model.norm_eps, "tie_word_embeddings": False,
        "initializer_range": model.init_std, "max_position_embeddings": max_len, **ABSENT}
    if c := model.mamba2:
        d_inner = c.d_inner(model.d_model)
        settings |= {"ssm_state_size": c.d_state, "mamba_head_dim": c.head_dim, "n_groups": c.n_groups,
                     "mamba_num_heads": d_inner // c.head_dim, "conv_kernel": c.d_conv, "chunk_size": c.chunk_len}
        # no class reads it, some readers do: only where it is true
        settings |= {} if d_inner % model.d_model else {"expand": d_inner // model.d_model}
    if a := model.attention:
        settings |= {"num_attention_heads": a.n_heads, "num_key_value_heads": a.n_kv_heads, "head_dim": a.head_dim}
    if m := model.mlp:
        settings |= {"intermediate_size": m.d_ff, "mlp_hidden_act": m.activation}
    settings |= {"mamba_hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "mamba_proj_bias": False,
                 "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
                 "sliding_window": None, "residual_in_fp32": False, "time_step_limit": [0.0, float("inf")],
                 "time_step_min": LEAST_TIME_STEP, "time_step_max": 0.1, "num_logits_to_keep": 1}
    hf.write_config(folder, settings, dtype=dtype, eod=eod)
    notes = []
    if model.tie_embeddings:
        notes.append("lm_head.weight is a copy of the embedding: the class has a head of its own.")
    if m and m.activation != "relu2":
        notes.append(f"mlp_hidden_act is {m.activation}. transformers computes it. Servers may have squared ReLU "
                     "built into this class, and none was tried: compare its logits before you use one.")
    return notes


def _steps(settings: hf.Settings, model: ModelConfig) -> dict[str, str]:
    """What is to be said of time steps."""
    least = settings.get("time_step_min", float, 0.001)
    if model.mamba2 is None or least <= LEAST_TIME_STEP:
        return {}
    return {"time steps": f"not raised to time_step_min ({least}), which transformers alone does, in prompts"}


def _model(settings: hf.Settings) -> ModelConfig:
    layers = _pattern(settings)
    for key in ("use_bias", "mamba_proj_bias", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        settings.must_be(key, False)
    settings.must_be("use_conv_bias", True)
    settings.must_be("mamba_hidden_act", "silu", "swish")
    settings.must_be("residual_in_fp32", True, False)
    settings.must_lack("sliding_window", "sliding windows")
    settings.must_lack("num_nextn_predict_layers", "layers that predict further tokens")
    hf.time_step_limit(settings)
    eps, d_model = settings.get("layer_norm_epsilon", float, 1e-5), settings.need("hidden_size", int)
    settings.agree("rms_norm_eps", eps, "layer_norm_epsilon")
    data: dict[str, Any] = {
        "pattern": layers, "d_model": d_model, "vocab_size": settings.need("vocab_size", int), "norm": "rmsnorm",
        "norm_eps": eps, "tie_embeddings": False,
        "init_std": settings.get("initializer_range", float, hf.INIT_STD) or hf.INIT_STD}
    if "M" in layers:
        heads, head_dim = settings.get("mamba_num_heads", int, 128), settings.get("mamba_head_dim", int, 64)
        data["mamba2"] = {
            "d_state": settings.get("ssm_state_size", int, 128), "head_dim": head_dim,
            "n_groups": settings.get("n_groups", int, 8), **hf.width(heads, head_dim, d_model),
            "d_conv": settings.get("conv_kernel", int, 4), "chunk_len": settings.get("chunk_size", int, 128)}
    if "*" in layers:
        n_heads = settings.get("num_attention_heads", int, 32)
        head_dim = settings.get("head_dim", int, settings.get("attention_head_dim", int, 128))
        settings.agree("attention_head_dim", head_dim, "head_dim")
        # null means as many as query heads
        shared = n_heads if "num_key_value_heads" in settings.table else 8
        data["attention"] = {"n_heads": n_heads, "n_kv_heads": settings.get("num_key_value_heads", int, shared),
                             "head_dim": head_dim, "positions": "none"}
    if "-" in layers:
        settings.must_be("mlp_hidden_act", "relu2", "gelu")
        data["mlp"] = {"d_ff": settings.get("intermediate_size", int, 21504),
                       "activation": settings.get("mlp_hidden_act", str, "relu2")}
    return hf.model_config(settings, data)


def _pattern(settings: hf.Settings) -> str:
    """The layers, from hybrid_override_pattern or layers_block_type; both must say the same."""
    kinds = settings.get("layers_block_type", list, settings.get("layer_types", list, []))
    if odd := [kind for kind in kinds if kind not in [*SYMBOLS]]:
        raise CheckpointError(f"{settings.file}: layers_block_type names {odd[0]!r} layers, which hinny has not; "
                              f"it has {', '.join(SYMBOLS)}.")
    layers = "".join(SYMBOLS[kind] for kind in kinds)
    written = settings.get("hybrid_override_pattern", str, layers)
    if not written or (layers and layers != written):
        raise CheckpointError(f"{settings.file}: hybrid_override_pattern is {written!r} and layers_block_type "
                              f"{layers!r}; one of them must name the layers, and both the same ones.")
    if odd := [symbol for symbol in written if symbol not in "M*-"]:
        raise CheckpointError(f"{settings.file}: hybrid_override_pattern, {written!r}, has {odd[0]!r} layers"
                              f"{' (experts)' if odd[0] == 'E' else ''}, which hinny has not; it has M, * and -.")
    settings.agree("num_hidden_layers", len(written), "the pattern")
    return written
