"""Hugging Face's Mamba class (model_type "mamba"): in, out.

Its keys are those of state-spaces/mamba but for the embedding's plural. A_log, D and dt_proj.bias (our dt_bias) are
stored in float32 whatever the rest is; the class rounds them to the type that the model is loaded in, and computes with
them in float32.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from hinny.checkpoint.formats import hf_folder as hf
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.hf_layers import head_row, mixer_rows
from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig
from hinny.errors import CheckpointError

NAME = "mamba"
ARCHITECTURE = "MambaForCausalLM"


def recognises(folder: Path) -> bool:
    """Whether `folder` says that it is of this class. Never raises."""
    return hf.recognised(folder, NAME)


def open_checkpoint(folder: Path) -> Foreign:
    """What the folder holds. Raises CheckpointError for settings that our layers do not compute exactly."""
    return hf.open_class(folder, NAME, ARCHITECTURE, _model, lambda model, prefix, embedding: rows(
        model, prefix=prefix, embedding=embedding), hf.EMBEDDINGS)


def rows(model: ModelConfig, *, prefix: str = "backbone.", embedding: str = hf.EMBEDDINGS[0]) -> list[Row]:
    """The name table; a tied head is not stored."""
    return mixer_rows(model, prefix, embedding) + ([] if model.tie_embeddings else [head_row(model)])


def refusals(model: ModelConfig) -> list[str]:
    """Why this class cannot express the model."""
    return hf.refuse_all_but(model, NAME, layers="1", norm="rmsnorm")


def write_settings(model: ModelConfig, folder: Path, *, dtype: torch.dtype, max_len: int,
                   eod: int | None = None) -> list[str]:
    """Write config.json; max_len is the longest sequence that servers should take. Returns what readers must know."""
    c = model.mamba1
    assert c is not None
    hf.write_config(folder, {
        "architectures": [ARCHITECTURE], "model_type": NAME, "vocab_size": model.vocab_size,
        "hidden_size": model.d_model, "num_hidden_layers": model.depth, "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std, "hidden_act": "silu",
        "state_size": c.d_state, "expand": c.expand, "intermediate_size": c.expand * model.d_model,
        "conv_kernel": c.d_conv, "time_step_rank": c.dt_rank, "time_step_min": c.dt_min, "time_step_max": c.dt_max,
        "max_position_embeddings": max_len, "use_bias": False, "use_conv_bias": True,
        "residual_in_fp32": True}, dtype=dtype, eod=eod)
    return []


def _model(settings: hf.Settings) -> ModelConfig:
    settings.must_be("hidden_act", "silu", "swish")
    settings.must_be("use_bias", False)
    settings.must_be("use_conv_bias", True)
    settings.must_be("residual_in_fp32", True, False)
    d_model, expand = settings.need("hidden_size", int), settings.get("expand", float, 2.0)
    if not expand.is_integer():
        raise CheckpointError(f"{settings.file}: expand is {expand}; hinny has whole numbers alone.")
    settings.agree("intermediate_size", int(expand * d_model), "expand * hidden_size")
    auto = settings.table.get("time_step_rank", "auto") == "auto"
    rank = math.ceil(d_model / 16) if auto else settings.need("time_step_rank", int)
    return hf.model_config(settings, {
        "pattern": "1" * settings.need("num_hidden_layers", int), "d_model": d_model,
        "vocab_size": settings.need("vocab_size", int), "norm": "rmsnorm",
        "norm_eps": settings.get("layer_norm_epsilon", float, 1e-5),
        "tie_embeddings": settings.get("tie_word_embeddings", bool, True),
        "init_std": settings.get("initializer_range", float, 0.1) or hf.INIT_STD,
        "mamba1": {"d_state": settings.get("state_size", int, 16), "expand": int(expand), "dt_rank": rank,
                   "d_conv": settings.get("conv_kernel", int, 4), "chunk_len": hf.MAMBA1_CHUNK,
                   **hf.time_steps(settings)}})
