"""Hugging Face's Mamba-2 class (model_type "mamba2"): in, out.

Its gated norm is over the whole width in older releases of transformers and over groups in newer ones, whatever
n_groups says; the weights of n_groups > 1 that people publish were trained with the grouped norm. So n_groups > 1 is
read as ours, and is not written: the reader's release would decide what it means.

A_log, D and dt_bias are stored in float32 whatever the rest is; the class rounds them to the type that the model is
loaded in, and computes with A_log in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hinny.checkpoint.formats import hf_folder as hf
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.hf_layers import head_row, mixer_rows
from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig
from hinny.errors import CheckpointError

NAME = "mamba2"
ARCHITECTURE = "Mamba2ForCausalLM"


def recognises(folder: Path) -> bool:
    """Whether `folder` says that it is of this class. Never raises."""
    return hf.recognised(folder, NAME)


def open_checkpoint(folder: Path) -> Foreign:
    """What the folder holds. Raises CheckpointError for settings that our layers do not compute exactly."""
    return hf.open_class(folder, NAME, ARCHITECTURE, _model, lambda model, prefix, embedding: rows(
        model, prefix=prefix, embedding=embedding), hf.EMBEDDINGS, more=_norm)


def rows(model: ModelConfig, *, prefix: str = "backbone.", embedding: str = hf.EMBEDDINGS[0]) -> list[Row]:
    """The name table; a tied head is not stored."""
    return mixer_rows(model, prefix, embedding) + ([] if model.tie_embeddings else [head_row(model)])


def refusals(model: ModelConfig) -> list[str]:
    """Why this class cannot express the model."""
    found = hf.refuse_all_but(model, NAME, layers="M", norm="rmsnorm")
    if c := model.mamba2:
        if c.n_groups > 1:
            found.append(f"model.mamba2.n_groups is {c.n_groups}; releases of transformers differ in what {NAME}'s "
                         "gated norm makes of groups. Write nemotron_h, whose norm is grouped in all.")
        if c.d_inner(model.d_model) % model.d_model:
            found.append(f"model.mamba2.n_heads ({c.n_heads}) * head_dim ({c.head_dim}) is no multiple of "
                         f"model.d_model ({model.d_model}); {NAME} has a whole `expand`. Write nemotron_h.")
    return found


def write_settings(model: ModelConfig, folder: Path, *, dtype: torch.dtype, max_len: int,
                   eod: int | None = None) -> list[str]:
    """Write config.json; max_len is the longest sequence that servers should take. Returns what readers must know."""
    c = model.mamba2
    assert c is not None
    d_inner = c.d_inner(model.d_model)
    hf.write_config(folder, {
        "architectures": [ARCHITECTURE], "model_type": NAME, "vocab_size": model.vocab_size,
        "hidden_size": model.d_model, "num_hidden_layers": model.depth, "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std, "hidden_act": "silu",
        "state_size": c.d_state, "head_dim": c.head_dim, "num_heads": d_inner // c.head_dim, "n_groups": c.n_groups,
        "expand": d_inner // model.d_model, "conv_kernel": c.d_conv, "chunk_size": c.chunk_len,
        "max_position_embeddings": max_len, "time_step_min": c.dt_min, "time_step_max": c.dt_max,
        "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True}, dtype=dtype, eod=eod)
    return []


def _norm(_: hf.Settings, model: ModelConfig) -> dict[str, str]:
    """What is to be said of the gated norm."""
    assert model.mamba2 is not None
    if model.mamba2.n_groups == 1:
        return {}
    return {"gated norm": f"over {model.mamba2.n_groups} groups, as mamba_ssm and newer releases of transformers "
                          "compute it; older ones normalise the whole width"}


def _model(settings: hf.Settings) -> ModelConfig:
    settings.must_be("hidden_act", "silu", "swish")
    settings.must_be("use_bias", False)
    settings.must_be("use_conv_bias", True)
    settings.must_be("residual_in_fp32", True, False)
    hf.time_step_limit(settings)
    d_model, head_dim = settings.need("hidden_size", int), settings.get("head_dim", int, 64)
    heads = settings.get("num_heads", int, 128)
    if (expand := settings.get("expand", float, 2.0)) * d_model != heads * head_dim:
        raise CheckpointError(f"{settings.file}: expand ({expand}) * hidden_size ({d_model}) is not num_heads "
                              f"({heads}) * head_dim ({head_dim}); it is not clear how wide the layers are.")
    return hf.model_config(settings, {
        "pattern": "M" * settings.need("num_hidden_layers", int), "d_model": d_model,
        "vocab_size": settings.need("vocab_size", int), "norm": "rmsnorm",
        "norm_eps": settings.get("layer_norm_epsilon", float, 1e-5),
        "tie_embeddings": settings.get("tie_word_embeddings", bool, False),
        "init_std": settings.get("initializer_range", float, 0.1) or hf.INIT_STD,
        "mamba2": {"d_state": settings.get("state_size", int, 128), "head_dim": head_dim,
                   "n_groups": settings.get("n_groups", int, 8), **hf.width(heads, head_dim, d_model),
                   "d_conv": settings.get("conv_kernel", int, 4), "chunk_len": settings.get("chunk_size", int, 256),
                   **hf.time_steps(settings)}})
