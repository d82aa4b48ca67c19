"""Megatron-LM's names of weights, through the eras, and how its tensor-parallel ranks share them.

A hybrid's layer i is our layer i. A GPT's layer i is attention and MLP together: our layers 2i and 2i+1.
Source: NVIDIA/Megatron-LM at df61e60bf5 (June 2024, the paper's release), 2edae2c4a5 (July 2024: the mixer's norm moved
into in_proj) and 35992ba8b9 (June 2026: the convolution's weights were renamed).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from hinny.checkpoint.formats.table import STACKED, Along, Interleaved, Row, Stacked
from hinny.config import ModelConfig

LAYER = re.compile(r"^((?:decoder|language_model\.encoder)\.layers\.)(\d+)\.(.+)$")
"""A name inside a layer: what is before the number, the number, what follows."""

COLUMNS = Along(axis=0)
ROWS = Along(axis=1)

OWNERS = {"mixer": "M", "self_attention": "*", "mlp": "-"}
"""The part of a layer that holds its weights → our symbol."""

EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Names:
    """The names of one kind of model in one era; those of norms lack their last part, weight or bias.

    whole   a layer of theirs is attention and MLP together, as in a GPT
    parts   in_proj and the convolution are stored by component, as in distributed checkpoints
    """

    era: str
    whole: bool
    mixer_norm: str = "norm."
    conv: str = "mixer.conv1d."
    attention_norm: str = "self_attention.linear_qkv.layer_norm_"
    mlp_norm: str = "mlp.linear_fc1.layer_norm_"
    qkv: str = "self_attention.linear_qkv.weight"
    proj: str = "self_attention.linear_proj.weight"
    up: str = "mlp.linear_fc1.weight"
    down: str = "mlp.linear_fc2.weight"
    final_norm: str = "decoder.final_norm."
    layers: str = "decoder.layers."
    embedding: str = "embedding.word_embeddings.weight"
    head: str = "output_layer.weight"
    parts: bool = False

    def layer(self, ours: int) -> str:
        """How the names in our layer of this number begin."""
        return f"{self.layers}{ours // 2 if self.whole else ours}."


RELEASED = Names("keys as released in June 2024", whole=False)
FUSED = replace(RELEASED, era="keys of July 2024 to May 2026", mixer_norm="mixer.in_proj.layer_norm_")
RENAMED = replace(FUSED, era="keys from June 2026 on", conv="mixer.conv1d_")
LOCAL = Names("core, local", whole=True, attention_norm="input_layernorm.", mlp_norm="pre_mlp_layernorm.",
              final_norm="decoder.final_layernorm.")
ENGINE = Names("core, Transformer Engine", whole=True, final_norm="decoder.final_layernorm.")
LEGACY = Names("legacy models", whole=True, attention_norm="input_norm.", mlp_norm="post_attention_norm.",
               qkv="self_attention.query_key_value.weight", proj="self_attention.dense.weight",
               up="mlp.dense_h_to_4h.weight", down="mlp.dense_4h_to_h.weight",
               final_norm="language_model.encoder.final_norm.", layers="language_model.encoder.layers.",
               embedding="language_model.embedding.word_embeddings.weight",
               head="language_model.output_layer.weight")

HYBRIDS, GPTS = (RELEASED, FUSED, RENAMED), (LOCAL, ENGINE, LEGACY)

LAYOUTS = {"released": (RELEASED, LOCAL), "current": (RENAMED, ENGINE)}
"""Layout to write → the names of a hybrid and of a GPT: those of the releases, and those that Megatron writes now."""


def is_gpt(model: ModelConfig) -> bool:
    """Whether Megatron's GPT model holds it: attention and MLP in turn, and nothing else."""
    pattern = symbols(model)
    return pattern == "*-" * (len(pattern) // 2)


def symbols(model: ModelConfig) -> str:
    """The pattern without its cuts."""
    return model.pattern.replace("|", "")


def detect(names: Iterable[str], parts: bool = False) -> Names | None:
    """The names that a checkpoint uses, told by those that only one era has; None if it has no layers.

    Where layers disagree, what most of them have: the others are then missing and left over.
    """
    inside = [found for name in names if (found := LAYER.match(name))]
    if not inside:
        return None
    if any(found[1].startswith("language_model.") for found in inside):
        return LEGACY
    owners: dict[str, set[str]] = {}
    for found in inside:
        owners.setdefault(found[2], set()).add(found[3].split(".")[0])
    counts = Counter(found[3] for found in inside)
    if any({"self_attention", "mlp"} <= owner for owner in owners.values()):
        return _most(counts, {LOCAL: (LOCAL.attention_norm, LOCAL.mlp_norm),
                              ENGINE: (ENGINE.attention_norm, ENGINE.mlp_norm)})
    norm = _most(counts, {RELEASED: (RELEASED.mixer_norm,), FUSED: (FUSED.mixer_norm,)})
    if parts:
        return replace(norm, era=f"{norm.era}, distributed", parts=True)
    conv = _most(counts, {FUSED: (FUSED.conv,), RENAMED: (RENAMED.conv,)})
    if norm is RELEASED:
        return replace(RELEASED, conv=conv.conv)
    return conv


def _most(counts: Counter[str], told_by: dict[Names, tuple[str, ...]]) -> Names:
    """The key, one of whose prefixes most of the names have; the first if they tell nothing."""
    def votes(names: Names) -> int:
        return sum(n for name, n in counts.items() if name.startswith(told_by[names]))

    return max(told_by, key=votes)


def variants(found: Names, model: ModelConfig, stored: Collection[str]) -> dict[str, str]:
    """The other eras of this kind of model → a name that each has and `found` has not, a stored one if there is."""
    mine = {row.theirs for row in rows(model, found)}
    out = {}
    for other in GPTS if found.whole else HYBRIDS:
        if odd := sorted({row.theirs for row in rows(model, other)} - mine):
            out[f"Megatron, {other.era}"] = next((name for name in odd if name in stored), odd[0])
    return out


def rows(model: ModelConfig, names: Names | None = None) -> list[Row]:
    """The name table of `model`, in the order of the layers: by Megatron's names of today unless others are given."""
    if names is None:
        names = LAYOUTS["current"][is_gpt(model)]
    norm = ("weight", "bias") if model.norm == "layernorm1p" else ("weight",)
    table = [Row(names.embedding, ("embedding.weight",), cut=COLUMNS, padded=True)]
    prefixes = {"M": names.mixer_norm, "*": names.attention_norm, "-": names.mlp_norm}
    kinds = {"M": _mamba2, "*": _attention, "-": _mlp}
    for i, symbol in enumerate(symbols(model)):
        theirs, ours = names.layer(i), f"layers.{i}."
        table += [Row(theirs + prefixes[symbol] + part, (f"{ours}norm.{part}",)) for part in norm]
        table += kinds[symbol](model, names, theirs, f"{ours}layer.")
    table += [Row(names.final_norm + part, (f"norm.{part}",)) for part in norm]
    if not model.tie_embeddings:
        table.append(Row(names.head, ("head.weight",), cut=COLUMNS, padded=True))
    return table


def _mamba2(model: ModelConfig, names: Names, theirs: str, ours: str) -> list[Row]:
    assert model.mamba2 is not None
    c = model.mamba2
    d_inner, groups = c.d_inner(model.d_model), c.n_groups * c.d_state
    # every rank has its heads' part of each component: what is stacked is cut component by component
    projected: dict[str, int] = {"z": d_inner, "x": d_inner, "B": groups, "C": groups, "dt": d_inner // c.head_dim}
    convolved = {part: projected[part] for part in "xBC"}
    return [
        *_stack(f"{theirs}mixer.in_proj.weight", f"{ours}in_proj.{{}}.weight", projected, names.parts, STACKED),
        *(row for kind, layout in (("weight", Stacked(unit=True)), ("bias", STACKED))
          for row in _stack(f"{theirs}{names.conv}{kind}", f"{ours}conv.{{}}.{kind}", convolved, names.parts, layout)),
        *(Row(f"{theirs}mixer.{name}", (ours + name,), cut=COLUMNS) for name in ("A_log", "D", "dt_bias")),
        Row(f"{theirs}mixer.norm.weight", (f"{ours}norm.weight",), cut=COLUMNS),
        Row(f"{theirs}mixer.out_proj.weight", (f"{ours}out_proj.weight",), cut=ROWS),
    ]


def _stack(theirs: str, ours: str, sizes: dict[str, int], apart: bool, layout: Stacked) -> list[Row]:
    """One row for components that are stacked, or one each where they are stored apart."""
    if apart:
        return [Row(f"{theirs}.{part}", (ours.format(part),), layout, COLUMNS) for part in sizes]
    return [Row(theirs, tuple(ours.format(part) for part in sizes), layout, Along(0, tuple(sizes.values())))]


def _attention(model: ModelConfig, names: Names, theirs: str, ours: str) -> list[Row]:
    assert model.attention is not None
    qkv = tuple(f"{ours}{part}.weight" for part in "qkv")
    return [Row(theirs + names.qkv, qkv, Interleaved(model.attention.n_kv_heads), COLUMNS),
            Row(theirs + names.proj, (f"{ours}o.weight",), cut=ROWS)]


def _mlp(model: ModelConfig, names: Names, theirs: str, ours: str) -> list[Row]:
    assert model.mlp is not None
    gated = model.mlp.activation == "swiglu"
    up = tuple(f"{ours}{part}.weight" for part in (("gate", "up") if gated else ("up",)))
    return [Row(theirs + names.up, up, cut=Along(0, (1,) * len(up))),
            Row(theirs + names.down, (f"{ours}down.weight",), cut=ROWS)]

