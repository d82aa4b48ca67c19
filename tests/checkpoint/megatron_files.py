"""Megatron's files, made from the facts about their bytes: names, orders of rows, shares of ranks, folders.

It shares nothing with the importer: it makes weights by component, and each rank's tensors from them with loops.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Sizes:
    d_model: int = 16
    heads: int = 8
    """Of the mixer."""
    head_dim: int = 4
    groups: int = 8
    state: int = 128
    taps: int = 4
    q_heads: int = 16
    kv_heads: int = 8
    channels: int = 4
    """Of an attention head."""
    ffn: int = 24
    vocab: int = 257
    gated: bool = False
    bias: bool = False
    """Norms have one."""
    tied: bool = False

    @property
    def inner(self):
        return self.heads * self.head_dim


def weights(pattern, sizes, dtype=torch.bfloat16, seed=0):
    """Random weights by hinny's names."""
    s, made = sizes, {}
    generator = torch.Generator().manual_seed(seed)

    def new(name, *shape):
        made[name] = torch.randn(shape, generator=generator).to(dtype)

    def norm(prefix):
        new(f"{prefix}.weight", s.d_model)
        if s.bias:
            new(f"{prefix}.bias", s.d_model)

    new("embedding.weight", s.vocab, s.d_model)
    for i, symbol in enumerate(pattern):
        layer = f"layers.{i}.layer."
        norm(f"layers.{i}.norm")
        if symbol == "M":
            parts = {"z": s.inner, "x": s.inner, "B": s.groups * s.state, "C": s.groups * s.state, "dt": s.heads}
            for part, size in parts.items():
                new(f"{layer}in_proj.{part}.weight", size, s.d_model)
            for part in "xBC":
                new(f"{layer}conv.{part}.weight", parts[part], s.taps)
                new(f"{layer}conv.{part}.bias", parts[part])
            for name in ("A_log", "D", "dt_bias"):
                new(layer + name, s.heads)
            new(f"{layer}norm.weight", s.inner)
            new(f"{layer}out_proj.weight", s.d_model, s.inner)
        elif symbol == "*":
            for part, heads in (("q", s.q_heads), ("k", s.kv_heads), ("v", s.kv_heads)):
                new(f"{layer}{part}.weight", heads * s.channels, s.d_model)
            new(f"{layer}o.weight", s.d_model, s.q_heads * s.channels)
        else:
            if s.gated:
                new(f"{layer}gate.weight", s.ffn, s.d_model)
            new(f"{layer}up.weight", s.ffn, s.d_model)
            new(f"{layer}down.weight", s.d_model, s.ffn)
    norm("norm")
    if not s.tied:
        new("head.weight", s.vocab, s.d_model)
    return made


ERAS = {
    "released": {"mixer_norm": "norm.", "conv": "mixer.conv1d."},
    "2024-07": {"mixer_norm": "mixer.in_proj.layer_norm_", "conv": "mixer.conv1d."},
    "2026-06": {"mixer_norm": "mixer.in_proj.layer_norm_", "conv": "mixer.conv1d_"},
    "local": {"attention": "input_layernorm.", "mlp": "pre_mlp_layernorm."},
    "engine": {},
    "legacy": {"attention": "input_norm.", "mlp": "post_attention_norm.", "linear_qkv": "query_key_value",
               "linear_proj": "dense", "linear_fc1": "dense_h_to_4h", "linear_fc2": "dense_4h_to_h"},
}
GPT = ("local", "engine", "legacy")


def share(v, rank, ranks, axis=0):
    """The rank's equal part of a tensor."""
    size = v.shape[axis] // ranks
    assert size * ranks == v.shape[axis]
    return v.narrow(axis, rank * size, size)


def layer_of(i, symbol, made, s, era, rank, ranks):
    """One of hinny's layers as a rank has it: names after decoder.layers.N."""
    names, mine = ERAS[era], f"layers.{i}.layer."
    out = {}

    def norm(prefix):
        for part in ("weight", "bias"):
            if (name := f"layers.{i}.norm.{part}") in made:
                out[prefix + part] = made[name]

    def own(name, axis=0):
        return share(made[mine + name], rank, ranks, axis)

    if symbol == "M":
        norm(names["mixer_norm"])
        out["mixer.in_proj.weight"] = torch.cat([own(f"in_proj.{part}.weight") for part in ("z", "x", "B", "C", "dt")])
        convolutions = torch.cat([own(f"conv.{part}.weight") for part in "xBC"])
        out[names["conv"] + "weight"] = convolutions.reshape(-1, 1, s.taps)
        out[names["conv"] + "bias"] = torch.cat([own(f"conv.{part}.bias") for part in "xBC"])
        for name in ("A_log", "D", "dt_bias"):
            out[f"mixer.{name}"] = own(name)
        out["mixer.norm.weight"] = own("norm.weight")
        out["mixer.out_proj.weight"] = own("out_proj.weight", 1)
    elif symbol == "*":
        norm(names.get("attention", "self_attention.linear_qkv.layer_norm_"))
        q, k, v = (own(f"{part}.weight") for part in "qkv")
        per_group, c = s.q_heads // s.kv_heads, s.channels
        rows = []
        for group in range(s.kv_heads // ranks):
            for head in range(group * per_group, (group + 1) * per_group):
                rows.append(q[head * c:(head + 1) * c])
            rows += [k[group * c:(group + 1) * c], v[group * c:(group + 1) * c]]
        out[f"self_attention.{names.get('linear_qkv', 'linear_qkv')}.weight"] = torch.cat(rows)
        out[f"self_attention.{names.get('linear_proj', 'linear_proj')}.weight"] = own("o.weight", 1)
    else:
        norm(names.get("mlp", "mlp.linear_fc1.layer_norm_"))
        up = [own("gate.weight")] if s.gated else []
        out[f"mlp.{names.get('linear_fc1', 'linear_fc1')}.weight"] = torch.cat([*up, own("up.weight")])
        out[f"mlp.{names.get('linear_fc2', 'linear_fc2')}.weight"] = own("down.weight", 1)
    return out


def pad(v, rows):
    """Rows of padding behind a vocabulary."""
    return torch.cat([v, torch.full((rows - len(v), v.shape[1]), 7.0).to(v.dtype)])


def table(pattern, made, s, era, rank, ranks, *, layers, first=True, last=True, padded=None, stage_copy=False):
    """The tensors of one piece of the pipeline with these layers of Megatron's, (begin, end), on one tensor rank."""
    padded = padded or -(-s.vocab // (128 * ranks)) * 128 * ranks
    block = 2 if era in GPT else 1
    vocabulary = {name: share(pad(made[name], padded), rank, ranks)
                  for name in ("embedding.weight", "head.weight") if name in made}
    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = vocabulary["embedding.weight"]
    for number in range(*layers):
        for i in range(number * block, (number + 1) * block):
            for name, v in layer_of(i, pattern[i], made, s, era, rank, ranks).items():
                out[f"decoder.layers.{number - layers[0]}.{name}"] = v
    if last:
        final = "decoder.final_layernorm." if era in GPT else "decoder.final_norm."
        out |= {final + part: made[f"norm.{part}"] for part in ("weight", "bias") if f"norm.{part}" in made}
        if "head.weight" in made or stage_copy:
            out["output_layer.weight"] = vocabulary["head.weight" if "head.weight" in made else "embedding.weight"]
    return {name: v.clone() for name, v in out.items()}


def as_legacy(flat):
    """The nested tables of legacy models."""
    encoder = {name.removeprefix("decoder."): v for name, v in flat.items() if name.startswith("decoder.layers.")}
    encoder |= {name.replace("decoder.final_layernorm.", "final_norm."): v for name, v in flat.items()
                if name.startswith("decoder.final_layernorm.")}
    model = {"encoder": encoder}
    if "embedding.word_embeddings.weight" in flat:
        model["embedding"] = {"word_embeddings": {"weight": flat["embedding.word_embeddings.weight"]}}
    if "output_layer.weight" in flat:
        model["output_layer"] = {"weight": flat["output_layer.weight"]}
    return {"language_model": model}


def options(pattern, s, era, tp=1, pp=1, **changes):
    """`args`, as far as it matters: the fields that the releases have, and those of their era."""
    gpt = era in GPT
    fields = dict(
        num_layers=len(pattern) // (2 if gpt else 1), hidden_size=s.d_model, ffn_hidden_size=s.ffn,
        num_attention_heads=s.q_heads, kv_channels=s.channels, group_query_attention=s.q_heads != s.kv_heads,
        num_query_groups=s.kv_heads if s.q_heads != s.kv_heads else 1,
        normalization="LayerNorm" if s.bias else "RMSNorm", apply_layernorm_1p=s.bias, norm_epsilon=1e-5,
        position_embedding_type="rope" if gpt else "none",
        rotary_percent=0.5 if gpt else 1.0, add_bias_linear=False, swiglu=s.gated, squared_relu=gpt and not s.gated,
        openai_gelu=False, bias_gelu_fusion=False, untie_embeddings_and_output_weights=not s.tied,
        padded_vocab_size=-(-s.vocab // (128 * tp)) * 128 * tp, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, tokenizer_type="GPTSentencePieceTokenizer", init_method_std=0.02,
        window_size=None, num_experts=None, params_dtype=torch.bfloat16, encoder_seq_length=4096)
    if era == "2026-06":
        fields |= dict(hybrid_layer_pattern=pattern, mamba_state_dim=s.state, mamba_num_groups=s.groups,
                       mamba_head_dim=s.head_dim, rotary_base=10000)
    elif not gpt:
        fields |= dict(hybrid_override_pattern=pattern, hybrid_attention_ratio=0.0, hybrid_mlp_ratio=0.0)
    fields |= changes
    return argparse.Namespace(**{name: v for name, v in fields.items() if v is not ...})


def write(folder, pattern, made, s, era, tp=1, pp=1, *, pieces=1, stages=None, args=None, extra=None, name="release",
          tracker="release", tokenizer=True):
    """A whole checkpoint. pieces: of the pipeline on each stage. stages: layers of each, where they are not equal."""
    block = 2 if era in GPT else 1
    total = len(pattern) // block
    lengths = stages or [total // (pp * pieces)] * (pp * pieces)
    assert sum(lengths) == total
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for stage in range(pp):
        for rank in range(tp):
            state = {"args": args or options(pattern, s, era, tp, pp), "checkpoint_version": 3.0, "iteration": 100}
            for piece in range(pieces):
                # the second piece of stage 0 comes behind the first piece of the last stage
                index = piece * pp + stage
                flat = table(pattern, made, s, era, rank, tp, layers=(starts[index], starts[index] + lengths[index]),
                             first=index == 0, last=index == pp * pieces - 1, stage_copy=s.tied and pp > 1)
                flat |= extra or {}
                state["model" if pieces == 1 else f"model{piece}"] = as_legacy(flat) if era == "legacy" else flat
            part = folder / name / (f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            part.mkdir(parents=True)
            torch.save(state, part / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker + "\n")
    if tokenizer:
        # the byte tokenizer: 257 words
        (folder / "tokenizer.json").write_text('{"kind": "bytes"}\n')
    return folder


def change(file, edit):
    """Do `edit` to what a file holds."""
    state = torch.load(file, weights_only=False)
    edit(state)
    torch.save(state, file)
