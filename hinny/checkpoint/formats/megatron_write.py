"""Writes a model as Megatron-LM reads it: torch files, a folder a rank, with the options as argparse.Namespace."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hinny.checkpoint.formats.megatron_names import (
    EXTRA_STATE,
    LAYER,
    LAYOUTS,
    LOCAL,
    RELEASED,
    Names,
    is_gpt,
    rows,
    symbols,
)
from hinny.checkpoint.formats.megatron_settings import NORM_EPS
from hinny.checkpoint.formats.megatron_shards import FILE, TRACKER
from hinny.checkpoint.formats.table import Row
from hinny.checkpoint.formats.torch_file import TorchFile, Written
from hinny.config import ModelConfig
from hinny.errors import CheckpointError

VOCAB_UNIT = 128
"""Megatron makes the vocabulary a multiple of this, times the tensor ranks, unless told another number."""


BUILT_IN = {"released": {"d_state": 128, "head_dim": 64, "n_groups": 8, "d_conv": 4}, "current": {"d_conv": 4}}
"""Layout → sizes that are arguments of the mixer's constructor and that no option of Megatron's sets."""


def refusals(model: ModelConfig, *, layout: str = "current", tp: int = 1, pp: int = 1) -> list[str]:
    """Why Megatron cannot express the model, or these ranks not share it; empty if they can."""
    out = []
    if "1" in model.pattern:
        out.append(f"model.pattern {model.pattern!r} has Mamba layers of the first kind (1), which Megatron has not")
    if "M" in model.pattern and model.norm_eps != NORM_EPS:
        out.append(f"model.norm_eps is {model.norm_eps}; the gated norm of Megatron's mixer has {NORM_EPS}")
    if a := model.attention:
        if a.score_scale is not None:
            out.append(f"model.attention.score_scale is {a.score_scale}; Megatron has no such factor of the scores")
        if a.rope_scaling is not None and (a.rope_scaling.method != "interpolation" or a.rope_scaling.factor % 1):
            out.append(f"model.attention.rope_scaling is {a.rope_scaling.method} by {a.rope_scaling.factor:g}; "
                       "Megatron's checkpoints tell interpolation by a whole number alone")
    out += [f"{key} is {size}, which tp = {tp} must divide" for key, size in _shared(model).items() if size % tp]
    layers = len(symbols(model)) // (2 if names_of(model, layout).whole else 1)
    if sum(_stages(model, layout, pp)) != layers:
        out.append(f"model.pattern has {layers} layers, as Megatron counts them, which pp = {pp} must divide; a hybrid "
                   "in the current layout may have stages that | in model.pattern marks")
    return out


def names_of(model: ModelConfig, layout: str) -> Names:
    """The names of `model` in a layout, "released" or "current"."""
    return LAYOUTS[layout][is_gpt(model)]


def write_checkpoint(model: ModelConfig, read: Callable[[str], Tensor], folder: Path, *,
                     layout: Literal["released", "current"] = "current", tp: int = 1, pp: int = 1,
                     seq_len: int | None = None) -> list[str]:
    """Write the weights into `folder`: the tracker file and release/mp_rank_*/model_optim_rng.pt. Returns what readers
    must know.

    read     a weight by its name in our model; the ranks' files grow side by side, and one tensor is in memory
    layout   "released": names of June 2024, for the paper's code, a GPT by the names of its local implementation;
             "current": names from June 2026 on, a GPT by those of Transformer Engine
    tp, pp   tensor- and pipeline-parallel ranks; stages are equal, or (current) those of a pattern with pp - 1 cuts
    seq_len  what args says of the length, if given

    The vocabulary is not padded: rows of padding would take part in the softmax. Weights keep their types, A_log, D
    and dt_bias float32 for one; Megatron casts them as it loads. Raises CheckpointError for a model that Megatron
    cannot express or that the ranks do not divide, and for a disk that is full.
    """
    if faults := refusals(model, layout=layout, tp=tp, pp=pp):
        raise CheckpointError(f"The model cannot be written for Megatron: {'; '.join(faults)}.")
    names = names_of(model, layout)
    table, start = rows(model, names), 0
    args = _args(model, names, layout, tp, pp)
    if model.attention and model.attention.rope_scaling:
        # Megatron divides by the factor, and tells no other length
        seq_len = model.attention.rope_scaling.reach
    if seq_len is not None:
        args |= {"seq_length": seq_len, "max_position_embeddings": seq_len}
    for stage, length in enumerate(_stages(model, layout, pp)):
        held = list(_held(table, names, start, length, first=stage == 0, last=stage == pp - 1))
        suffix = f"_{stage:03d}" if pp > 1 else ""
        folders = [folder / "release" / f"mp_rank_{rank:02d}{suffix}" for rank in range(tp)]
        try:
            _write_stage(folders, held, read, names, args)
        except OSError as fault:
            raise CheckpointError(f"{fault.filename or folder} cannot be written: {fault.strerror or fault}. Make "
                                  "room, or give write permission, and run the same command again.") from None
        start += length
    # last: without it nothing is taken for a checkpoint
    (folder / TRACKER).write_text("release\n")
    return _notes(model, layout)


def _notes(model: ModelConfig, layout: str) -> list[str]:
    m = model.mamba2
    if m is None:
        return []
    found = {"d_state": m.d_state, "head_dim": m.head_dim, "n_groups": m.n_groups, "d_conv": m.d_conv,
             "n_heads": m.d_inner(model.d_model) // m.head_dim}
    fixed = dict(BUILT_IN[layout])
    if layout == "released":
        # and twice the model's width
        fixed["n_heads"] = 2 * model.d_model // fixed["head_dim"]
    odd = [f"{key} {size} for {found[key]}" for key, size in fixed.items() if found[key] != size]
    return [f"Megatron's code of that time has sizes of the mixer built in, and no option for them: {', '.join(odd)}. "
            "Change them there before it loads this."] if odd else []


def _write_stage(folders: list[Path], held: list[tuple[str, Row]], read: Callable[[str], Tensor], names: Names,
                 args: dict[str, Any]) -> None:
    """The files of one pipeline stage, one of `folders` a tensor rank: each tensor is read once and cut for all."""
    with ExitStack() as stack:
        files = []
        for folder in folders:
            folder.mkdir(parents=True)
            files.append(stack.enter_context(TorchFile(folder / FILE)))
        weights: list[dict[str, Written]] = [{} for _ in files]
        for local, row in held:
            whole = row.layout.join([read(name) for name in row.ours])
            for file, table, part in zip(files, weights, row.cut.shards(whole, len(files)), strict=True):
                table[local] = file.add(part)
        for file, table in zip(files, weights, strict=True):
            dtype = next(iter(table.values())).info.dtype
            typed = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
            file.finish({"args": argparse.Namespace(**args, **typed), "checkpoint_version": 3.0, "iteration": 0,
                         "model": {**table, **_extra_states(table, names)}})


def _stages(model: ModelConfig, layout: str, pp: int) -> list[int]:
    """Layers, as Megatron counts them, of each pipeline stage: those that the pattern cuts, or equal ones, which
    are all that the released code has."""
    whole = names_of(model, layout).whole
    cut = [len(piece) for piece in model.pattern.split("|")]
    if len(cut) == pp and not whole and layout != "released":
        return cut
    return [len(symbols(model)) // (2 if whole else 1) // pp] * pp


def _shared(model: ModelConfig) -> dict[str, int]:
    """The sizes that tensor ranks share, by key."""
    sizes = {"model.vocab_size": model.vocab_size}
    if m := model.mamba2:
        sizes |= {"model.mamba2.n_groups": m.n_groups}
    if a := model.attention:
        sizes |= {"model.attention.n_kv_heads": a.n_kv_heads}
    if f := model.mlp:
        sizes |= {"model.mlp.d_ff": f.d_ff}
    return sizes


def _held(table: list[Row], names: Names, start: int, length: int, *, first: bool, last: bool,
          ) -> Iterator[tuple[str, Row]]:
    """What a stage of `length` layers from `start` on holds, under its names there: it counts its layers from 0."""
    tied = names.head not in {row.theirs for row in table}
    for row in table:
        if match := LAYER.match(row.theirs):
            number = int(match[2]) - start
            if 0 <= number < length:
                yield f"{match[1]}{number}.{match[3]}", row
        elif row.theirs == names.embedding:
            if first:
                yield row.theirs, row
            if last and not first and tied:
                # the last stage has a copy of its own of the embedding
                yield names.head, row
        elif last:
            yield row.theirs, row


def _extra_states(weights: Iterable[str], names: Names) -> dict[str, None]:
    """What Transformer Engine's linear layers expect besides their weights; None says that there are no scales."""
    if names == LOCAL:
        return {}
    linears = [names.qkv, names.proj, names.up, names.down]
    if names.mixer_norm != RELEASED.mixer_norm:
        # since its norm is inside it
        linears += ["mixer.in_proj.weight", "mixer.out_proj.weight"]
    return {name.removesuffix("weight") + EXTRA_STATE: None for name in weights if name.endswith(tuple(linears))}


def _args(model: ModelConfig, names: Names, layout: str, tp: int, pp: int) -> dict[str, Any]:
    """Megatron's options, as far as they say what the model is; what trains it is left to Megatron's command line."""
    pattern = symbols(model)
    args: dict[str, Any] = {
        "num_layers": len(pattern) // (2 if names.whole else 1), "hidden_size": model.d_model,
        # equal: nothing is padding, also where the tokenizer has fewer words
        "vocab_size": model.vocab_size, "padded_vocab_size": model.vocab_size,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
        # the largest unit by which Megatron's own padding adds nothing
        "make_vocab_size_divisible_by": math.gcd(model.vocab_size // tp, VOCAB_UNIT),
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "normalization": "LayerNorm" if model.norm == "layernorm1p" else "RMSNorm",
        "apply_layernorm_1p": model.norm == "layernorm1p", "norm_epsilon": model.norm_eps,
        "init_method_std": model.init_std, "add_bias_linear": False, "add_qkv_bias": False, "num_experts": None,
        "expert_model_parallel_size": 1, "position_embedding_type": "none", "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "transformer_impl": "local" if names == LOCAL else "transformer_engine"}
    if not names.whole and layout == "released":
        args |= {"hybrid_override_pattern": pattern, "hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0,
                 "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]}
    elif not names.whole:
        # there the cuts are the stages
        ends = list(itertools.accumulate(_stages(model, layout, pp), initial=0))
        args["hybrid_layer_pattern"] = "|".join(pattern[i:j] for i, j in itertools.pairwise(ends))
    if m := model.mamba2:
        args |= {"mamba_state_dim": m.d_state, "mamba_head_dim": m.head_dim, "mamba_num_groups": m.n_groups,
                 "mamba_num_heads": m.d_inner(model.d_model) // m.head_dim}
    if a := model.attention:
        args |= {"num_attention_heads": a.n_heads, "kv_channels": a.head_dim, "num_query_groups": a.n_kv_heads,
                 "group_query_attention": a.n_heads != a.n_kv_heads, "position_embedding_type": a.positions}
        if a.positions == "rope":
            args |= {"rotary_percent": a.rope_fraction, "rotary_base": a.rope_base, "rotary_interleaved": False,
                     "rotary_seq_len_interpolation_factor": int(a.rope_scaling.factor) if a.rope_scaling else None}
    if f := model.mlp:
        args |= {"ffn_hidden_size": f.d_ff, "swiglu": f.activation == "swiglu",
                 "squared_relu": f.activation == "relu2", "openai_gelu": False, "bias_gelu_fusion": False}
    return args
