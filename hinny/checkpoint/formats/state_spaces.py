"""state-spaces/mamba: mamba-130m … 2.8b and mamba2-130m … 2.7b, as the package mamba_ssm saves and loads them.

    config.json         d_model, n_layer, vocab_size, ssm_cfg {layer: Mamba1 | Mamba2, …}, pad_vocab_size_multiple …
    pytorch_model.bin   torch.save of the state dict; its head is stored also where it is the embedding

The vocabulary is padded to a multiple there, and stays as it is stored. A_log, D and dt_bias (Mamba-1: dt_proj.bias)
are written in float32: the package computes with them in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hinny.checkpoint.formats import hf_folder as hf
from hinny.checkpoint.formats.files import tokenizer_files
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.hf_layers import head_row, mixer_rows
from hinny.checkpoint.formats.table import Row
from hinny.checkpoint.formats.torch_file import TorchFile
from hinny.config import ModelConfig
from hinny.errors import CheckpointError
from hinny.run import write_atomically

NAME = "state-spaces"
PREFIX, EMBEDDING = "backbone.", "embedding"
NORM_EPS = 1e-5
"""Of every norm: the package's settings have no key for it."""

INITIAL = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
SPEED = {"use_fast_path", "use_mem_eff_path", "chunk_size"}
SIZES = {"Mamba1": {"d_state", "d_conv", "expand", "dt_rank"},
         "Mamba2": {"d_state", "d_conv", "expand", "headdim", "ngroups"}}
FIXED: dict[str, dict[str, Any]] = {
    "Mamba1": {"conv_bias": True, "bias": False},
    "Mamba2": {"conv_bias": True, "bias": False, "d_ssm": None, "D_has_hdim": False, "rmsnorm": True,
               "norm_before_gate": False}}
"""Keys of ssm_cfg: what only initial values depend on, what only speed does, sizes, and what has one value for us."""


def recognises(folder: Path) -> bool:
    """Whether config.json is of this package: its keys, and no model_type. Never raises."""
    settings = hf.peek(folder)
    return {"d_model", "n_layer"} <= settings.keys() and "model_type" not in settings


def open_checkpoint(folder: Path) -> Foreign:
    """What the folder holds. Raises CheckpointError for settings that our layers do not compute exactly."""
    settings, tensors = hf.Settings(folder), hf.open_weights(folder)
    model, words = _model(settings)
    embedding = f"{PREFIX}{EMBEDDING}.weight"
    hf.find_prefix(tensors, folder, [EMBEDDING])
    tied = model.tie_embeddings
    padded = {} if model.vocab_size == words else {"vocabulary": f"{words:,}, padded to {model.vocab_size:,}"}
    return Foreign(
        format="state-spaces/mamba", model=model, tensors=tensors, rows=_stored(model),
        ignored=hf.tied_head(tensors, embedding, folder) if tied else {}, tokenizer=tokenizer_files(folder),
        facts=hf.facts(settings, tensors) | padded,
        variants={"Hugging Face mamba or mamba2": f"{PREFIX}embeddings.weight"})


def rows(model: ModelConfig) -> list[Row]:
    """The name table of what is written: a tied head is stored once more."""
    return [*mixer_rows(model, PREFIX, EMBEDDING), head_row(model)]


def _stored(model: ModelConfig) -> list[Row]:
    """The name table of what is read: a tied head may be absent, and is looked at apart."""
    return rows(model)[:-1] if model.tie_embeddings else rows(model)


def refusals(model: ModelConfig) -> list[str]:
    """Why the package cannot express the model."""
    kinds = set(model.pattern) - {"|"}
    found = hf.refuse_all_but(model, NAME, layers="1M", norm="rmsnorm")
    if kinds == {"1", "M"}:
        found.append(f'model.pattern is "{model.pattern}"; {NAME} has layers of one kind.')
    if model.norm_eps != NORM_EPS:
        found.append(f"model.norm_eps is {model.norm_eps}; {NAME} has {NORM_EPS} alone.")
    if (c := model.mamba2) and c.d_inner(model.d_model) % model.d_model:
        found.append(f"model.mamba2.n_heads ({c.n_heads}) * head_dim ({c.head_dim}) is no multiple of model.d_model "
                     f"({model.d_model}); {NAME} has a whole `expand`.")
    return found


def write_checkpoint(model: ModelConfig, read: Callable[[str], Tensor], folder: Path) -> list[str]:
    """Write config.json and pytorch_model.bin, the one file that the package loads, one tensor at a time.

    read: a tensor of ours by name, in the type that it is to have. Returns what readers must know: nothing.
    """
    cfg: dict[str, Any]
    if c := model.mamba2:
        cfg = {"layer": "Mamba2", "d_state": c.d_state, "d_conv": c.d_conv,
               "expand": c.d_inner(model.d_model) // model.d_model, "headdim": c.head_dim, "ngroups": c.n_groups,
               "chunk_size": c.chunk_len, "dt_min": c.dt_min, "dt_max": c.dt_max}
    else:
        one = model.mamba1
        assert one is not None
        cfg = {"layer": "Mamba1", "d_state": one.d_state, "d_conv": one.d_conv, "expand": one.expand,
               "dt_rank": one.dt_rank, "dt_min": one.dt_min, "dt_max": one.dt_max}
    settings = {"d_model": model.d_model, "d_intermediate": 0, "n_layer": model.depth, "vocab_size": model.vocab_size,
                "ssm_cfg": cfg, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
                "fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": model.tie_embeddings}
    write_atomically(folder / hf.CONFIG, json.dumps(settings, indent=2) + "\n")
    _write_weights(model, read, folder / hf.PICKLE)
    return []


def _write_weights(model: ModelConfig, read: Callable[[str], Tensor], file: Path) -> None:
    partial = file.with_name(f".partial-{file.name}")
    try:
        with TorchFile(partial) as out:
            table = {row.theirs: out.add(row.layout.join([read(name) for name in row.ours]))
                     for row in mixer_rows(model, PREFIX, EMBEDDING)}
            # a tied head is the same numbers in the file
            tied = model.tie_embeddings
            table["lm_head.weight"] = table[f"{PREFIX}{EMBEDDING}.weight"] if tied else out.add(read("head.weight"))
            out.finish(table)
        partial.rename(file)
    except OSError as fault:
        raise CheckpointError(f"{file} cannot be written: {fault.strerror or fault}. Make room or give write "
                              "permission.") from None
    finally:
        partial.unlink(missing_ok=True)


def _model(settings: hf.Settings) -> tuple[ModelConfig, int]:
    """[model], and how many words the vocabulary has before it was padded."""
    settings.must_be("rms_norm", True)
    settings.must_be("residual_in_fp32", True, False)
    settings.must_be("fused_add_norm", True, False)
    settings.must_lack("d_intermediate", "MLP behind each mixer in this format")
    settings.must_lack("attn_layer_idx", "attention layers in this format")
    settings.must_lack("attn_cfg", "attention layers in this format")
    words, multiple = settings.need("vocab_size", int), settings.get("pad_vocab_size_multiple", int, 8)
    d_model, cfg = settings.need("d_model", int), settings.get("ssm_cfg", dict, {})
    layer = cfg.get("layer", "Mamba1")
    if layer not in [*SIZES]:
        raise CheckpointError(f"{settings.file}: ssm_cfg.layer is {layer!r}; hinny has {' and '.join(SIZES)}.")
    _check(settings, layer, cfg)
    section = _mamba1(cfg, d_model) if layer == "Mamba1" else _mamba2(cfg)
    name, symbol = ("mamba1", "1") if layer == "Mamba1" else ("mamba2", "M")
    return hf.model_config(settings, {
        "pattern": symbol * settings.need("n_layer", int), "d_model": d_model,
        "vocab_size": -(-words // multiple) * multiple, "norm": "rmsnorm", "norm_eps": NORM_EPS,
        "tie_embeddings": settings.get("tie_embeddings", bool, True), "init_std": hf.INIT_STD, name: section}), words


def _check(settings: hf.Settings, layer: str, cfg: dict[str, Any]) -> None:
    """Refuse what of ssm_cfg our layer does not compute."""
    known = {"layer", "dt_limit"} | INITIAL | SPEED | SIZES[layer] | FIXED[layer].keys()
    if odd := sorted(set(cfg) - known):
        raise CheckpointError(f"{settings.file}: ssm_cfg has {', '.join(odd)}, which hinny does not know of {layer}.")
    for key, value in FIXED[layer].items():
        if cfg.get(key, value) != value:
            raise CheckpointError(f"{settings.file}: ssm_cfg.{key} is {cfg[key]!r}; hinny can only compute {value!r} "
                                  "exactly.")
    hf.unclamped(settings, "ssm_cfg.dt_limit", cfg.get("dt_limit", (0.0, math.inf)))


def _mamba1(cfg: dict[str, Any], d_model: int) -> dict[str, Any]:
    rank = cfg.get("dt_rank", "auto")
    return {"d_state": cfg.get("d_state", 16), "d_conv": cfg.get("d_conv", 4), "expand": cfg.get("expand", 2),
            "dt_rank": math.ceil(d_model / 16) if rank == "auto" else rank, "chunk_len": hf.MAMBA1_CHUNK}


def _mamba2(cfg: dict[str, Any]) -> dict[str, Any]:
    return {"d_state": cfg.get("d_state", 128), "d_conv": cfg.get("d_conv", 4), "expand": cfg.get("expand", 2),
            "head_dim": cfg.get("headdim", 64), "n_groups": cfg.get("ngroups", 1),
            "chunk_len": cfg.get("chunk_size", 256)}
