"""The architecture of a Megatron checkpoint: sizes from the shapes, the rest from `args`, and both compared.

What `args` says and the shapes contradict is an error, never a choice. A field that is absent, from a time before its
option, has the option's default, and that is said; where no default can be known, the checkpoint is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hinny import pattern as patterns
from hinny.checkpoint.formats.files import listed
from hinny.checkpoint.formats.megatron_args import Args
from hinny.checkpoint.formats.megatron_names import LAYER, OWNERS, Names
from hinny.config import ModelConfig, validate
from hinny.errors import CheckpointError, ConfigError

NORM_EPS = 1e-5
"""Megatron's default, and what the mixer's gated norm has whatever the option says."""


class Sizes:
    """Whole sizes of tensors of which each of `ranks` tensor-parallel ranks has a part."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> None:
        self.shapes, self.ranks = shapes, ranks

    def whole(self, name: str, axis: int) -> int:
        """Size along an axis that no rank shares."""
        if name not in self.shapes:
            raise CheckpointError(f"{name} is missing. It is needed to know the sizes of the model; there are "
                                  f"{listed(sorted(self.shapes))}.")
        shape = self.shapes[name]
        if axis >= len(shape) or not shape[axis]:
            raise CheckpointError(f"{name} has shape {list(shape)}; axis {axis} must be there and not empty.")
        return shape[axis]

    def shared(self, name: str, axis: int = 0) -> int:
        """Size along the axis that the ranks share."""
        return self.whole(name, axis) * self.ranks


def infer_pattern(names: Iterable[str], whole: bool) -> str:
    """The pattern, from which of mixer, self_attention and mlp each layer owns."""
    owned: dict[int, set[str]] = {}
    for name in names:
        if match := LAYER.match(name):
            owned.setdefault(int(match[2]), set()).add(match[3].split(".")[0])
    if absent := sorted(set(range(max(owned) + 1)) - owned.keys()):
        raise CheckpointError(f"{len(absent)} of {max(owned) + 1} layers have no tensors: "
                              f"{', '.join(map(str, absent[:8]))}. A file of a pipeline stage is missing or damaged.")
    allowed = ["*-"] if whole else sorted(OWNERS.values())
    out = []
    for number in range(len(owned)):
        found = "".join(OWNERS[part] for part in sorted(owned[number] & OWNERS.keys(), reverse=True))
        if found not in allowed:
            raise CheckpointError(
                f"layer {number} holds {', '.join(sorted(owned[number]))}; known are layers of "
                f"{'self_attention and mlp together' if whole else 'one of ' + ', '.join(sorted(OWNERS))}.")
        out.append(found)
    return "".join(out)


def infer_model(pattern: str, names: Names, sizes: Sizes, args: Args, vocab: Callable[[int], int], tied: bool,
                ) -> ModelConfig:
    """The architecture of layers `pattern`. vocab: rows of the embedding → words of the vocabulary."""
    args.must_be(pattern)
    d_model = sizes.whole(names.embedding, 1)
    stored = sizes.shared(names.embedding)
    args.agree("num_layers", len(pattern) // 2 if names.whole else len(pattern), "the layers' names")
    args.agree("hidden_size", d_model, f"the shape of {names.embedding}")
    args.agree("padded_vocab_size", stored, f"the shape of {names.embedding}")
    _check_pattern(pattern, args)
    data: dict[str, Any] = {
        "pattern": pattern, "d_model": d_model, "vocab_size": vocab(stored), "norm": _norm(names, sizes, args),
        "norm_eps": _norm_eps(pattern, args), "tie_embeddings": tied,
        "init_std": args.get("init_method_std", 0.02)}
    if names.whole:
        # counted in blocks, as Megatron does, not in our layers
        data["output_init_std"] = data["init_std"] / math.sqrt(len(pattern))
    for symbol, section, infer in (("M", "mamba2", _mamba2), ("*", "attention", _attention), ("-", "mlp", _mlp)):
        if symbol in pattern:
            data[section] = infer(names.layer(pattern.index(symbol)), names, sizes, args, d_model)
    try:
        return validate(ModelConfig, data, args.source)
    except ConfigError as fault:
        raise CheckpointError(f"{fault} hinny has no such model.") from None


def _check_pattern(pattern: str, args: Args) -> None:
    """The pattern that the names show against that which args gives, or gives the shares of."""
    given = next((key for key in ("hybrid_layer_pattern", "hybrid_override_pattern") if args.has(key)), None)
    where = "the layers' names"
    if given is not None:
        told = args.need(given, str)
        if told.replace("|", "") != pattern:
            raise CheckpointError(f"{args.source}: args.{given} is {told!r}, but {where} say {pattern!r}. One of them "
                                  "is not of this checkpoint, or has layers that hinny has not.")
    elif args.has("hybrid_attention_ratio") or args.has("hybrid_mlp_ratio"):
        keys = ("hybrid_attention_ratio", "hybrid_mlp_ratio")
        ratios = [args.need(key, float) if args.has(key) else 0.0 for key in keys]
        # a GPT's args carry the options too, unused
        if any(ratios) and (told := patterns.allocate(len(pattern), *ratios)) != pattern:
            raise CheckpointError(f"{args.source}: args.hybrid_attention_ratio and hybrid_mlp_ratio are {ratios[0]} "
                                  f"and {ratios[1]}, which is {told!r}, but {where} say {pattern!r}. One of them is "
                                  "not of this checkpoint.")


def _norm(names: Names, sizes: Sizes, args: Args) -> str:
    found = "LayerNorm" if names.final_norm + "bias" in sizes.shapes else "RMSNorm"
    args.agree("normalization", found, f"{names.final_norm}bias, which {'is' if found == 'LayerNorm' else 'is not'} "
               "there,")
    plus_one = args.get("apply_layernorm_1p", False)
    if (found, plus_one) not in (("LayerNorm", True), ("RMSNorm", False)):
        raise CheckpointError(f"{args.source}: the norms are {found} with args.apply_layernorm_1p {plus_one!r}; hinny "
                              "has LayerNorm with it and RMSNorm without it.")
    return "layernorm1p" if found == "LayerNorm" else "rmsnorm"


def _norm_eps(pattern: str, args: Args) -> float:
    key = "layernorm_epsilon" if args.has("layernorm_epsilon") and not args.has("norm_epsilon") else "norm_epsilon"
    eps = args.get(key, NORM_EPS)
    if "M" in pattern and eps != NORM_EPS:
        raise CheckpointError(f"{args.source}: args.{key} is {eps}, but Megatron's mixer has {NORM_EPS} in its gated "
                              "norm whatever that says; hinny has one model.norm_eps for all norms.")
    return eps


def _mamba2(layer: str, names: Names, sizes: Sizes, args: Args, d_model: int) -> dict[str, Any]:
    norm, heads = f"{layer}mixer.norm.weight", sizes.shared(f"{layer}mixer.A_log")
    d_inner = sizes.shared(norm)
    conv = f"{layer}{names.conv}bias"
    groups = sizes.shared(f"{conv}.B") if names.parts else (sizes.shared(conv) - d_inner) // 2
    # B has n_groups * d_state rows: only args can tell the two apart
    d_state = args.get("mamba_state_dim", 128)
    if d_inner % heads or groups <= 0 or d_state <= 0 or groups % d_state:
        raise CheckpointError(f"{args.source}: args.mamba_state_dim is {d_state}, but B has {groups} rows, and there "
                              f"are {d_inner} channels in {heads} heads. One of them is not of this checkpoint.")
    n_groups, head_dim = groups // d_state, d_inner // heads
    for key, found in (("mamba_num_groups", n_groups), ("mamba_head_dim", head_dim), ("mamba_num_heads", heads)):
        args.agree(key, found, f"the shapes in {layer}mixer")
    if n_groups % sizes.ranks:
        raise CheckpointError(f"{n_groups} groups on {sizes.ranks} tensor-parallel ranks: ranks that share a group are "
                              "not merged. Save it with fewer ranks.")
    width = {"n_heads": heads} if d_inner % d_model else {"expand": d_inner // d_model}
    weight = f"{layer}{names.conv}weight"
    return {"d_state": d_state, "head_dim": head_dim, "n_groups": n_groups, **width, "chunk_len": 128,
            "d_conv": sizes.whole(f"{weight}.x" if names.parts else weight, 2)}


def _attention(layer: str, names: Names, sizes: Sizes, args: Args, d_model: int) -> dict[str, Any]:
    qkv, proj = sizes.shared(layer + names.qkv), sizes.shared(layer + names.proj, axis=1)
    keys = (qkv - proj) // 2
    if args.has("kv_channels"):
        head_dim = args.need("kv_channels", int)
    elif args.has("num_attention_heads"):
        head_dim = d_model // args.need("num_attention_heads", int)
    else:
        raise CheckpointError(f"{args.source}: args has neither kv_channels nor num_attention_heads, and the shapes do "
                              "not tell the size of a head.")
    if head_dim <= 0 or proj % head_dim or keys <= 0 or keys % head_dim:
        raise CheckpointError(f"{args.source}: args give heads of {head_dim}, but {layer}{names.qkv} has {qkv} rows "
                              f"and {layer}{names.proj} {proj} columns. One of them is not of this checkpoint.")
    n_heads, n_kv_heads = proj // head_dim, keys // head_dim
    args.agree("num_attention_heads", n_heads, f"the shape of {layer}{names.proj}")
    grouped = args.fields.get("group_query_attention")
    if grouped or (grouped is None and n_heads != n_kv_heads):
        args.agree("num_query_groups", n_kv_heads, f"the shape of {layer}{names.qkv}")
    elif n_heads != n_kv_heads:
        raise CheckpointError(f"{args.source}: args.group_query_attention is False, but {layer}{names.qkv} has "
                              f"{n_heads} query and {n_kv_heads} key heads. One of them is not of this checkpoint.")
    if n_kv_heads % sizes.ranks:
        raise CheckpointError(f"{n_kv_heads} key heads on {sizes.ranks} tensor-parallel ranks: ranks that share a key "
                              "head are not merged. Save it with fewer ranks.")
    return {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, **_positions(args)}


def _positions(args: Args) -> dict[str, Any]:
    if not args.has("position_embedding_type") and not args.has("use_rotary_position_embeddings"):
        raise CheckpointError(f"{args.source}: args has no position_embedding_type, and the tensors do not tell "
                              "whether there were rotary positions or none.")
    rotary = args.fields.get("use_rotary_position_embeddings") is True
    kind = "rope" if rotary else args.get("position_embedding_type", "learned_absolute")
    if kind == "none":
        return {"positions": "none"}
    if kind != "rope":
        raise CheckpointError(f"{args.source}: args.position_embedding_type is {kind!r}; hinny has 'none' and 'rope'.")
    return {"positions": "rope", "rope_fraction": args.get("rotary_percent", 1.0),
            "rope_base": args.get("rotary_base", 10000.0), **_interpolation(args)}


def _interpolation(args: Args) -> dict[str, Any]:
    """Positions divided by a factor, so that seq_length tokens lie where seq_length / factor were trained."""
    key = "rotary_seq_len_interpolation_factor"
    factor = args.need(key, int) if args.has(key) else 1
    if factor == 1:
        return {}
    if factor < 1 or not args.has("seq_length") or args.need("seq_length", int) < factor:
        raise CheckpointError(f"{args.source}: args.{key} is {factor} and args.seq_length "
                              f"{args.fields.get('seq_length')!r}; the trained length is their quotient, which must be "
                              "a positive number.")
    length = args.need("seq_length", int)
    return {"rope_scaling": {"method": "interpolation", "factor": float(factor), "trained_len": -(-length // factor)}}


def _mlp(layer: str, names: Names, sizes: Sizes, args: Args, d_model: int) -> dict[str, Any]:
    up, d_ff = sizes.shared(layer + names.up), sizes.shared(layer + names.down, axis=1)
    args.agree("ffn_hidden_size", d_ff, f"the shape of {layer}{names.down}")
    args.agree("swiglu", up == 2 * d_ff, f"{layer}{names.up}, with {up} rows for {d_ff} columns of the next,")
    if up not in (d_ff, 2 * d_ff):
        raise CheckpointError(f"{layer}{names.up} has {up} rows and {layer}{names.down} {d_ff} columns; known are as "
                              "many, and twice as many for a gated MLP.")
    gated, squared = args.get("swiglu", False), args.get("squared_relu", False)
    if up == 2 * d_ff and (squared or not gated):
        raise CheckpointError(f"{args.source}: {layer}{names.up} is that of a gated MLP, but args.swiglu is {gated!r} "
                              f"and args.squared_relu {squared!r}: its activation is not known.")
    return {"d_ff": d_ff, "activation": "swiglu" if gated else "relu2" if squared else "gelu"}
