"""Rows that the Hugging Face and state-spaces formats share: one layer's tensors under the names that both use.

    mixer       Mamba, Mamba-2 and NemotronH: one layer is one sublayer, as ours: {layers.N}.norm and .mixer
    block       Nemotron and Llama: one layer is attention and an MLP, two of ours: .self_attn and .mlp

A projection or convolution that we hold in parts is one matrix there, its parts stacked.
"""

from __future__ import annotations

from hinny import pattern
from hinny.checkpoint.formats.table import Row, Stacked
from hinny.config import ModelConfig


def mixer_rows(model: ModelConfig, prefix: str, embedding: str) -> list[Row]:
    """The table of a model of mixers, without its head. prefix: "backbone."; embedding: what they call it."""
    rows = [Row(f"{prefix}{embedding}.weight", ("embedding.weight",))]
    for i, symbol in enumerate(pattern.parse(model.pattern)):
        rows.append(Row(f"{prefix}layers.{i}.norm.weight", (f"layers.{i}.norm.weight",)))
        rows += _LAYER[symbol](model, f"layers.{i}.layer.", f"{prefix}layers.{i}.mixer.")
    return [*rows, Row(f"{prefix}norm_f.weight", ("norm.weight",))]


def block_rows(model: ModelConfig, prefix: str) -> list[Row]:
    """The table of a Transformer, our pattern `*-` repeated, without its head. prefix: "model."."""
    rows = [Row(f"{prefix}embed_tokens.weight", ("embedding.weight",))]
    for i, symbol in enumerate(pattern.parse(model.pattern)):
        norm, part = {"*": ("input_layernorm", "self_attn"), "-": ("post_attention_layernorm", "mlp")}[symbol]
        rows += _norm(model, f"layers.{i}.norm.", f"{prefix}layers.{i // 2}.{norm}.")
        rows += _LAYER[symbol](model, f"layers.{i}.layer.", f"{prefix}layers.{i // 2}.{part}.")
    return rows + _norm(model, "norm.", f"{prefix}norm.")


def head_row(model: ModelConfig) -> Row:
    """The head's matrix; where ours is tied to the embedding, a second copy of the embedding's."""
    return Row("lm_head.weight", ("embedding.weight" if model.tie_embeddings else "head.weight",))


def _norm(model: ModelConfig, ours: str, theirs: str) -> list[Row]:
    parts = ("weight", "bias") if model.norm == "layernorm1p" else ("weight",)
    return [Row(theirs + part, (ours + part,)) for part in parts]


def _mamba1(_: ModelConfig, ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{theirs}in_proj.weight", (f"{ours}in_proj.x.weight", f"{ours}in_proj.z.weight")),
        Row(f"{theirs}conv1d.weight", (f"{ours}conv.weight",), Stacked(unit=True)),
        Row(f"{theirs}conv1d.bias", (f"{ours}conv.bias",)),
        Row(f"{theirs}x_proj.weight", tuple(f"{ours}x_proj.{part}.weight" for part in ("dt", "B", "C"))),
        Row(f"{theirs}dt_proj.weight", (f"{ours}dt_proj.weight",)),
        Row(f"{theirs}dt_proj.bias", (f"{ours}dt_bias",)),
        *(Row(theirs + name, (ours + name,)) for name in ("A_log", "D", "out_proj.weight"))]


def _mamba2(_: ModelConfig, ours: str, theirs: str) -> list[Row]:
    convolved = ("x", "B", "C")
    return [
        Row(f"{theirs}in_proj.weight", tuple(f"{ours}in_proj.{part}.weight" for part in ("z", *convolved, "dt"))),
        Row(f"{theirs}conv1d.weight", tuple(f"{ours}conv.{part}.weight" for part in convolved), Stacked(unit=True)),
        Row(f"{theirs}conv1d.bias", tuple(f"{ours}conv.{part}.bias" for part in convolved)),
        *(Row(theirs + name, (ours + name,)) for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"))]


def _attention(_: ModelConfig, ours: str, theirs: str) -> list[Row]:
    return [Row(f"{theirs}{name}_proj.weight", (f"{ours}{name}.weight",)) for name in "qkvo"]


def _mlp(model: ModelConfig, ours: str, theirs: str) -> list[Row]:
    assert model.mlp is not None
    names = ("gate", "up", "down") if model.mlp.activation == "swiglu" else ("up", "down")
    return [Row(f"{theirs}{name}_proj.weight", (f"{ours}{name}.weight",)) for name in names]


_LAYER = {"1": _mamba1, "M": _mamba2, "*": _attention, "-": _mlp}
