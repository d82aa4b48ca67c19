"""What cannot be computed exactly is refused by name, on the way in and on the way out. No transformers is needed."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import OURS, fill, take_out
from safetensors.torch import load_file, save_file
from small import small_config

from hinny.checkpoint import formats
from hinny.checkpoint.matching import match
from hinny.errors import CheckpointError
from hinny.model import Model

M = dict(d_state=6, head_dim=8, n_groups=1, expand=2, d_conv=3, chunk_len=4)
NOPE = dict(n_heads=4, n_kv_heads=2, head_dim=6, positions="none")
ROPE = dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=1.0, rope_base=50.0)
RELU2, SWIGLU = (dict(d_ff=24, activation=name) for name in ("relu2", "swiglu"))
GOOD: dict[str, dict[str, Any]] = {
    "mamba": dict(pattern="11", tie_embeddings=True),
    "mamba2": dict(pattern="MM", mamba2=M),
    "nemotron_h": dict(pattern="M-*", mamba2=M, attention=NOPE, mlp=RELU2),
    "nemotron": dict(pattern="*-", norm="layernorm1p", attention=ROPE, mlp=RELU2),
    "llama": dict(pattern="*-", attention=ROPE, mlp=SWIGLU)}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0}


def written(name: str, folder: Path) -> None:
    model = Model(small_config(**GOOD[name])).eval()
    fill(model)
    take_out(model, formats.load(name), folder)


def change(folder: Path, **changes: Any) -> None:
    """Rewrite config.json; a key set to `...` goes."""
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        formats.load(name).open_checkpoint(folder)
    return str(caught.value)


NO_BIAS = [(name, key) for name, keys in {
    "mamba": ["use_bias"], "mamba2": ["use_bias"], "nemotron": ["attention_bias", "mlp_bias"],
    "nemotron_h": ["use_bias", "mamba_proj_bias", "attention_bias", "mlp_bias"],
    "llama": ["attention_bias", "mlp_bias"]}.items() for key in keys]
TAGGED = {"__float__": "Infinity"}
"""Infinity as transformers 5 writes it."""


@pytest.mark.parametrize(("name", "changes", "part"), [
    *((name, {key: True}, f"{key} is True") for name, key in NO_BIAS),
    *((name, dict(use_conv_bias=False), "use_conv_bias is False") for name in ("mamba", "mamba2", "nemotron_h")),
    *((name, dict(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}") for name in GOOD),
    *((name, dict(architectures=["XForTokenClassification"]), "architectures is ['XForTokenClassification']")
      for name in GOOD),
    *((name, dict(hidden_size=...), "no hidden_size") for name in GOOD),
    *((name, dict(vocab_size=0), "vocab_size is 0") for name in GOOD),
    *((name, {key: "tanh"}, f"{key} is 'tanh'") for name, key in (
        ("mamba", "hidden_act"), ("mamba2", "hidden_act"), ("nemotron_h", "mamba_hidden_act"),
        ("nemotron_h", "mlp_hidden_act"), ("nemotron", "hidden_act"), ("llama", "hidden_act"))),
    *((name, dict(sliding_window=128), "sliding_window is 128") for name in ("nemotron_h", "nemotron", "llama")),
    *((name, dict(time_step_limit=[0.0, 0.1]), "time_step_limit is [0.0, 0.1]") for name in ("mamba2", "nemotron_h")),
    *((name, dict(time_step_limit=[0.01, TAGGED]), "time_step_limit is [0.01, inf]") for name in ("mamba2",
                                                                                                  "nemotron_h")),
    ("mamba", dict(expand=1.5), "expand is 1.5"),
    ("mamba", dict(intermediate_size=40), "intermediate_size is 40"),
    ("mamba", dict(state_size="16"), "state_size is '16'"),
    ("llama", dict(num_attention_heads=0), "num_attention_heads is 0; it must be 1 or more"),
    ("mamba2", dict(time_step_limit=[0.0]), "time_step_limit is [0.0]; it must be two numbers"),
    ("mamba2", dict(expand=3), "expand (3.0) * hidden_size (16) is not num_heads (4) * head_dim (8)"),
    ("nemotron_h", dict(hybrid_override_pattern="MEM"), "hybrid_override_pattern, 'MEM', has 'E' layers (experts)"),
    ("nemotron_h", dict(hybrid_override_pattern="M|-*"), "hybrid_override_pattern, 'M|-*', has '|' layers"),
    ("nemotron_h", dict(hybrid_override_pattern="MM"), "num_hidden_layers is 3, but the pattern says 2"),
    ("nemotron_h", dict(hybrid_override_pattern=..., layers_block_type=["mamba", "moe", "mlp"]), "names 'moe' layers"),
    ("nemotron_h", dict(layers_block_type=["mamba", "attention", "mlp"]), "is 'M-*' and layers_block_type 'M*-'"),
    ("nemotron_h", dict(hybrid_override_pattern=...), "hybrid_override_pattern is '' and layers_block_type ''"),
    ("nemotron_h", dict(num_nextn_predict_layers=1), "num_nextn_predict_layers is 1"),
    ("nemotron_h", dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
    ("nemotron_h", dict(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, but layer_norm_epsilon says 1e-05"),
    ("nemotron_h", dict(attention_head_dim=8), "attention_head_dim is 8, but head_dim says 6"),
    *((name, dict(rope_parameters=SCALED), "changed by factor (rope_type 'llama3')") for name in ("nemotron", "llama")),
    *((name, dict(rope_scaling={"type": "dynamic"}), "rope_type is 'dynamic'") for name in ("nemotron", "llama")),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}), "changed by mscale"),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}),
     "attention_factor is 1.0; hinny has YaRN's own"),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "truncate": False}), "truncate is False"),
    ("llama", dict(rope_parameters={"rope_type": "linear"}), "and factor is None"),
    *(("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, key: odd}), f"and {key} is {odd!r}")
      for key in ("attention_factor", "beta_fast", "beta_slow") for odd in ("1.2", 0, True, [1.0])),
    ("llama", dict(rope_parameters=YARN, rope_scaling={"rope_type": "default"}), "scalings that differ (method yarn"),
    ("llama", dict(rope_parameters=YARN, rope_scaling=YARN | {"factor": 2.0}), "factor 2.0, trained_len 16); it is"),
    ("llama", dict(rope_parameters={"rope_type": "default"}, rope_scaling=YARN), "that differ (none and method yarn"),
    ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}, max_position_embeddings=...),
     "original_max_position_embeddings is 0"),
    *((name, dict(rope_theta=60.0), "rope_theta is 60.0 and, among the rope parameters, 50.0") for name in ("nemotron",
                                                                                                          "llama")),
    ("nemotron", dict(partial_rotary_factor=0.25), "partial_rotary_factor is 0.25 and, among the rope parameters, 1.0"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    ("llama", dict(num_key_value_heads=3), "n_kv_heads (3) must divide n_heads (4)"),
])
def test_a_setting_that_our_layers_do_not_compute_is_refused_by_name(
        name: str, changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    change(tmp_path, **changes)
    message = refusal(name, tmp_path)
    assert part in message
    assert str(tmp_path / "config.json") in message


ODD: list[Any] = [0, -1, True, "x", [], [1], [[]], {}, {"rope_theta": "x"}, [{"__float__": "x"}, 2], [0.0, "inf"],
                  float("nan"), float("inf")]


@pytest.mark.parametrize("name", GOOD)
def test_whatever_a_setting_is_it_is_read_or_refused(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for key in good:
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps(good | {key: value}))
            with suppress(CheckpointError):
                formats.load(name).open_checkpoint(tmp_path)


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    written("mamba", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["backbone.embeddings.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    message = refusal("mamba", tmp_path)
    assert "lm_head.weight is not backbone.embeddings.weight" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("name", GOOD)
def test_a_tensor_too_few_or_too_many_is_counted(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in tensors if "layers.0" in key)
    tensors[f"{lost}.bias"] = tensors.pop(lost)
    save_file(tensors, tmp_path / "model.safetensors")
    problems = match(formats.load(name).open_checkpoint(tmp_path)).problems
    assert problems == {"missing": [lost], "left over": [f"{lost}.bias"]}


def test_settings_that_change_nothing_are_named_and_none_is_lost(tmp_path: Path) -> None:
    written("nemotron_h", tmp_path)
    change(tmp_path, attention_dropout=0.1, rope_theta=10000.0, moe_latent_size=None, my_own=[1, 2])
    facts = formats.load("nemotron_h").open_checkpoint(tmp_path).facts
    assert facts["dropout, which hinny does not train with"] == "attention_dropout = 0.1"
    left = facts["settings that change nothing here"].split(", ")
    assert {"rope_theta", "my_own"} <= set(left)
    assert not {"attention_dropout", "hidden_size", "mlp_bias", "moe_latent_size", "dtype"} & set(left)


def test_a_folder_without_weights_or_with_others_is_refused(tmp_path: Path) -> None:
    written("llama", tmp_path)
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "no embedding" in refusal("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "has no weights" in refusal("llama", tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"model_type": "gpt2"}', '{"model_type": 3}', None])
def test_recognition_never_raises(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert not any(formats.load(name).recognises(tmp_path) for name in OURS)
    assert not any(formats.load(name).recognises(tmp_path / "absent") for name in OURS)


WIDE = {key: value for key, value in M.items() if key != "expand"} | {"n_heads": 5}


@pytest.mark.parametrize(("name", "changes", "parts"), [
    ("mamba", dict(pattern="1M"), ["model.pattern has 'M' layers"]),
    ("mamba", dict(pattern="1", norm="layernorm1p"), ['model.norm is "layernorm1p"']),
    ("mamba2", dict(pattern="M-*", mamba2=M), ["model.pattern has '*', '-' layers"]),
    ("mamba2", dict(pattern="M", mamba2=M | {"n_groups": 2}), ["model.mamba2.n_groups is 2"]),
    ("mamba2", dict(pattern="M", mamba2=WIDE), ["model.mamba2.n_heads (5) * head_dim (8)"]),
    ("nemotron_h", dict(pattern="1"), ["model.pattern has '1' layers"]),
    ("nemotron_h", dict(pattern="*-", norm="layernorm1p", attention=ROPE, mlp=SWIGLU),
     ['model.norm is "layernorm1p"', 'model.attention.positions is "rope"', 'model.mlp.activation is "swiglu"']),
    ("nemotron", dict(pattern="-*", norm="layernorm1p"), ['model.pattern is "-*"']),
    ("nemotron", dict(pattern="*-M", norm="layernorm1p"), ['model.pattern is "*-M"', "has 'M' layers"]),
    ("nemotron", dict(pattern="*-", attention=NOPE, mlp=SWIGLU),
     ['model.norm is "rmsnorm"', 'model.attention.positions is "none"', 'model.mlp.activation is "swiglu"']),
    ("llama", dict(pattern="*-", norm="layernorm1p", attention=ROPE | {"rope_fraction": 0.5}, mlp=RELU2),
     ['model.norm is "layernorm1p"', "model.attention.rope_fraction is 0.5", 'model.mlp.activation is "relu2"']),
    ("llama", dict(pattern="*-", attention=ROPE | {"n_heads": 6}, mlp=SWIGLU), ["model.attention.n_heads (6)"]),
    ("llama", dict(pattern="*-", attention=NOPE, mlp=SWIGLU), ['model.attention.positions is "none"']),
    ("state-spaces", dict(pattern="1M"), ['model.pattern is "1M"']),
    ("state-spaces", dict(pattern="M*", norm="layernorm1p"), ["has '*' layers", 'model.norm is "layernorm1p"']),
    ("state-spaces", dict(pattern="M", mamba2=WIDE, norm_eps=1e-6), ["model.norm_eps is 1e-06", "n_heads (5)"]),
])
def test_a_model_that_a_class_cannot_express_is_refused_by_our_names(
        name: str, changes: dict[str, Any], parts: list[str]) -> None:
    reasons = formats.load(name).refusals(small_config(**changes))
    assert len(reasons) == len(parts)
    for part, reason in zip(parts, reasons, strict=True):
        assert all(word in reason for word in (part, name))
