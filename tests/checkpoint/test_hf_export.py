"""What hinny writes, transformers opens without custom code: every key known, none missing, equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import TOKENS, assert_same, bring_in, fill, take_out
from safetensors.torch import load_file
from small import small_config

from hinny.checkpoint import formats
from hinny.model import Model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about absent CUDA kernels

M = dict(d_state=6, head_dim=8, n_groups=1, expand=2, d_conv=3, chunk_len=4)
GROUPED = {key: value for key, value in M.items() if key != "expand"} | dict(n_heads=6, n_groups=3)
NOPE = dict(n_heads=4, n_kv_heads=2, head_dim=6, positions="none")
ROPE = dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=0.5, rope_base=50.0)
RELU2, GELU, SWIGLU = (dict(d_ff=24, activation=name) for name in ("relu2", "gelu", "swiglu"))
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mamba", dict(pattern="111")),
    ("mamba", dict(pattern="1|1", tie_embeddings=True, norm_eps=1e-2,
                   mamba1=dict(d_state=3, expand=3, d_conv=3, dt_rank=2, chunk_len=4))),
    ("mamba2", dict(pattern="MMM", mamba2=M)),
    ("mamba2", dict(pattern="MM", mamba2=M | dict(chunk_len=7, expand=3), tie_embeddings=True, norm_eps=1e-2)),
    ("nemotron_h", dict(pattern="MM", mamba2=GROUPED)),
    ("nemotron_h", dict(pattern="M-M*|-", mamba2=M | dict(n_groups=2), attention=NOPE, mlp=GELU, tie_embeddings=True)),
    ("nemotron_h", dict(pattern="-M*M-*", mamba2=GROUPED, attention=NOPE, mlp=RELU2, norm_eps=1e-2)),
    ("nemotron_h", dict(pattern="*-*-", attention=NOPE | dict(n_kv_heads=4), mlp=RELU2)),
    ("nemotron", dict(pattern="*-*-", norm="layernorm1p", attention=ROPE, mlp=RELU2)),
    ("nemotron", dict(pattern="*-", norm="layernorm1p", attention=ROPE | dict(rope_fraction=1.0, head_dim=6), mlp=GELU,
                      tie_embeddings=True, norm_eps=1e-2)),
    ("llama", dict(pattern="*-*-", attention=ROPE | dict(rope_fraction=1.0), mlp=SWIGLU)),
    ("llama", dict(pattern="*-", attention=ROPE | dict(rope_fraction=1.0, head_dim=6, n_kv_heads=1), mlp=SWIGLU,
                   tie_embeddings=True, norm_eps=1e-2)),
    ("llama", dict(pattern="*-", mlp=SWIGLU, attention=ROPE | dict(rope_fraction=1.0, rope_scaling=dict(
        method="interpolation", factor=2.5, trained_len=8)))),
    ("llama", dict(pattern="*-", mlp=SWIGLU, attention=ROPE | dict(rope_fraction=1.0, head_dim=12, rope_scaling=dict(
        method="yarn", factor=4.0, trained_len=8, beta_fast=2.0, beta_slow=1.0)))),
    ("nemotron", dict(pattern="*-", norm="layernorm1p", mlp=RELU2, attention=ROPE | dict(
        head_dim=24, rope_scaling=dict(method="yarn", factor=3.0, trained_len=8, beta_fast=32.0, beta_slow=0.5)))),
]


def made(**changes: Any) -> Model:
    model = Model(small_config(**changes)).eval()
    fill(model)
    return model


def opened(folder: Path, **options: Any) -> Any:
    """The folder as AutoModelForCausalLM opens it; nothing may be missing, left over or of another shape."""
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(loading.values()), loading
    return theirs.eval()


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_transformers_opens_what_is_written_and_computes_the_same(
        name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours = made(**changes)
    take_out(ours, formats.load(name), tmp_path)
    theirs = opened(tmp_path)
    assert theirs.config.model_type == name
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id, theirs.config.pad_token_id) == (0, None, None)
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = ours(TOKENS)
        assert float(expected.std()) > 0.05
        assert_same(theirs(TOKENS, use_cache=False).logits, expected)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_what_is_written_comes_back_bit_for_bit(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours = made(**changes)
    take_out(ours, formats.load(name), tmp_path)
    foreign, back = bring_in(tmp_path)
    found = back.state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(found.pop(key), tensor), key
    assert list(found) == (["head.weight"] if name == "nemotron_h" and ours.config.tie_embeddings else [])
    scaling = ours.config.attention and ours.config.attention.rope_scaling
    assert foreign.facts["longest sequence"] == str(scaling.reach if scaling else 64)
    assert "settings that change nothing here" not in foreign.facts or name == "nemotron_h"
    different = {key for key, value in foreign.model if value != getattr(ours.config, key)}
    # cuts, the fallback of init_std and lengths of chunks are no part of what is computed
    assert different <= {"pattern", "tie_embeddings", "mamba1", "mamba2"}
    assert foreign.model.pattern == ours.config.pattern.replace("|", "")


def test_greedy_generation_is_the_same_there(tmp_path: Path) -> None:
    ours = made(pattern="M-M*-", mamba2=GROUPED, attention=NOPE, mlp=RELU2)
    take_out(ours, formats.load("nemotron_h"), tmp_path)
    found = opened(tmp_path).generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    tokens = TOKENS
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)


def test_no_time_step_is_raised_where_the_settings_allow_none(tmp_path: Path) -> None:
    """The class raises steps to time_step_min: with a usual one the logits would be others."""
    ours = made(pattern="MM", mamba2=M)
    take_out(ours, formats.load("nemotron_h"), tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | {"time_step_min": 0.1}))
    with torch.no_grad():
        expected = ours(TOKENS)
        assert (opened(tmp_path)(TOKENS, use_cache=False).logits - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_recurrence_stays_in_float32_beside_narrow_weights(tmp_path: Path) -> None:
    ours = made(pattern="M-", mamba2=M, mlp=RELU2)
    take_out(ours, formats.load("nemotron_h"), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    for name in ("A_log", "D", "dt_bias"):
        assert stored[f"backbone.layers.0.mixer.{name}"].dtype == torch.float32
    assert stored["backbone.embeddings.weight"].dtype == torch.bfloat16
    table = json.loads((tmp_path / "config.json").read_text())
    assert table["dtype"] == table["torch_dtype"] == "bfloat16"
    assert opened(tmp_path).dtype == torch.bfloat16
    wide = opened(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.model.layers[0].mixer.A_log, ours.layers[0].layer.A_log)


def test_what_readers_must_know_is_said(tmp_path: Path) -> None:
    notes = take_out(made(pattern="M-", mamba2=M, mlp=GELU, tie_embeddings=True), formats.load("nemotron_h"), tmp_path)
    assert any("lm_head.weight is a copy" in note for note in notes)
    assert any("mlp_hidden_act is gelu" in note for note in notes)
    assert take_out(made(pattern="M-", mamba2=M, mlp=RELU2), formats.load("nemotron_h"), tmp_path) == []


def test_servers_find_the_settings_that_they_ask_for(tmp_path: Path) -> None:
    """Whatever the pattern has: the names that the released hybrids' settings have, and infinity as they spell it."""
    take_out(made(pattern="MM", mamba2=GROUPED), formats.load("nemotron_h"), tmp_path)
    text = (tmp_path / "config.json").read_text()
    table = json.loads(text)
    assert table["hybrid_override_pattern"] == "MM"
    assert table["num_hidden_layers"] == 2
    assert "Infinity" in text
    for key in ("architectures", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel",
                "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "mlp_hidden_act",
                "time_step_limit", "rms_norm_eps", "layer_norm_epsilon", "max_position_embeddings", "mlp_bias",
                "attention_bias", "use_conv_bias", "use_bias", "mamba_proj_bias", "tie_word_embeddings"):
        assert key in table, key
    # 6 heads of 8 in a model 16 wide: 3 wide layers, which the key may say
    assert table["expand"] == 3
