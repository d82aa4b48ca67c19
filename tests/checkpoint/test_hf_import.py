"""What transformers saves, hinny reads: equal logits, whole and decoded, and bit-equal weights back out.

The oracles are compared on full forward passes alone: their continuation of several tokens is known to be off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import KEPT_WIDE, TOKENS, WORDS, assert_computes, bring_in, fill, joined
from safetensors.torch import load_file, save_file

from hinny.checkpoint import formats

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about absent CUDA kernels

MAMBA = dict(hidden_size=16, num_hidden_layers=2, state_size=5)
MAMBA2 = dict(hidden_size=16, num_hidden_layers=2, state_size=6, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
# transformers raises time steps to time_step_min, which neither the trainers nor the servers of such models do
HYBRID = dict(hidden_size=16, layers_block_type=["mamba", "mlp", "mamba", "attention", "mlp"], mamba_num_heads=4,
              mamba_head_dim=8, n_groups=2, ssm_state_size=6, chunk_size=4, num_attention_heads=4,
              num_key_value_heads=2, head_dim=6, intermediate_size=24, time_step_min=1e-30)
BLOCKS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", MAMBA),
    "mamba-untied": ("Mamba", MAMBA | dict(tie_word_embeddings=False, time_step_rank=3, expand=3, conv_kernel=3,
                                           layer_norm_epsilon=1e-2)),
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2-tied-grouped": ("Mamba2", MAMBA2 | dict(tie_word_embeddings=True, n_groups=2, expand=3, num_heads=6,
                                                    conv_kernel=3, layer_norm_epsilon=1e-2)),
    "nemotron_h": ("NemotronH", HYBRID),
    "nemotron_h-wide": ("NemotronH", HYBRID | dict(mamba_num_heads=5, n_groups=5, mlp_hidden_act="gelu",
                                                   layer_norm_epsilon=1e-2)),
    "nemotron": ("Nemotron", BLOCKS),
    "nemotron-gelu": ("Nemotron", BLOCKS | dict(
        hidden_act="gelu", head_dim=8, tie_word_embeddings=True, norm_eps=1e-2,
        rope_parameters=dict(rope_type="default", rope_theta=50.0, partial_rotary_factor=0.25))),
    "llama": ("Llama", BLOCKS),
    "llama-tied": ("Llama", BLOCKS | dict(
        head_dim=6, tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-2,
        rope_parameters=dict(rope_type="default", rope_theta=50.0))),
    "llama-linear": ("Llama", BLOCKS | dict(
        max_position_embeddings=8, rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0))),
    "llama-yarn": ("Llama", BLOCKS | dict(head_dim=12, max_position_embeddings=32, rope_parameters=dict(
        rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=8, beta_fast=2.0))),
    "nemotron-yarn": ("Nemotron", BLOCKS | dict(head_dim=24, max_position_embeddings=24, rope_parameters=dict(
        rope_type="yarn", rope_theta=50.0, factor=3.0, original_max_position_embeddings=8, beta_fast=2.0,
        beta_slow=0.5, partial_rotary_factor=0.5))),
}


def saved(case: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model of a case, saved in `folder` as its users save theirs."""
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(vocab_size=WORDS, **(options | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    fill(model)
    model.save_pretrained(folder)
    return model


def change(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Rewrite config.json."""
    table = json.loads((folder / "config.json").read_text())
    table = {key: value for key, value in table.items() if key not in drop} | changes
    (folder / "config.json").write_text(json.dumps(table))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_gives_the_same_logits_here_and_the_same_bits_back(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path)
    foreign, ours = bring_in(tmp_path)
    with torch.no_grad():
        assert_computes(ours, theirs(TOKENS, use_cache=False).logits)
    module = formats.load(case.split("-")[0])
    stored, written = load_file(tmp_path / "model.safetensors"), joined(ours.state_dict(), module, ours)
    assert stored.keys() == written.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    assert not foreign.ignored


def test_a_width_that_no_whole_expand_gives_becomes_heads(tmp_path: Path) -> None:
    saved("nemotron_h-wide", tmp_path)
    foreign, ours = bring_in(tmp_path)
    assert (foreign.model.mamba2.n_heads, foreign.model.mamba2.expand) == (5, None)
    assert ours.layers[0].layer.in_proj.x.weight.shape == (40, 16)


def test_weights_keep_their_type_but_for_those_of_the_recurrence(tmp_path: Path) -> None:
    theirs = saved("nemotron_h", tmp_path, torch.bfloat16)
    _, ours = bring_in(tmp_path)
    for name, tensor in ours.state_dict().items():
        wide = name.rpartition(".")[2] in KEPT_WIDE
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert torch.equal(ours.layers[0].layer.A_log, theirs.model.layers[0].mixer.A_log.float())


def test_a_hybrid_of_the_releases_style_is_the_same_model(tmp_path: Path) -> None:
    """As NVIDIA's first files have it: a pattern string, attention_head_dim, infinity spelt out, torch_dtype."""
    theirs = saved("nemotron_h", tmp_path)
    change(tmp_path, drop=("layers_block_type", "head_dim", "dtype", "mtp_layers_block_type"),
           hybrid_override_pattern="M-M*-", num_hidden_layers=5, attention_head_dim=6, rms_norm_eps=1e-5,
           time_step_limit=[0.0, float("inf")], torch_dtype="float32", time_step_rank=256, time_step_min=0.001,
           transformers_version="4.48.0.dev0")
    foreign, ours = bring_in(tmp_path)
    with torch.no_grad():
        assert_computes(ours, theirs(TOKENS, use_cache=False).logits)
    assert "time_step_min (0.001)" in foreign.facts["time steps"]
    assert "time_step_rank" in foreign.facts["settings that change nothing here"]


@pytest.mark.parametrize(("case", "prefixes"), [("nemotron_h", ("backbone.", "model.")), ("llama", ("model.",
                                                                                                   "transformer."))])
def test_the_other_prefixes_are_known(case: str, prefixes: tuple[str, str], tmp_path: Path) -> None:
    theirs = saved(case, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.replace(*prefixes): tensor for name, tensor in load_file(file).items()}, file)
    _, ours = bring_in(tmp_path)
    with torch.no_grad():
        assert_computes(ours, theirs(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("case", ["nemotron-gelu", "llama-tied"])
def test_rotary_settings_of_before_transformers_5_are_the_same(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path)
    fraction = dict(partial_rotary_factor=0.25) if case == "nemotron-gelu" else {}
    change(tmp_path, drop=("rope_parameters",), rope_theta=50, rope_scaling=None, **fraction)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    foreign, ours = bring_in(tmp_path)
    with torch.no_grad():
        assert_computes(ours, theirs(TOKENS, use_cache=False).logits)
    assert sorted(foreign.ignored) == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_files_of_torch_save_are_read_too_whole_or_in_parts(tmp_path: Path) -> None:
    theirs = saved("mamba2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = list(load_file(file).items())
    file.unlink()
    for number, part in enumerate((tensors[:5], tensors[5:]), start=1):
        torch.save(dict(part), tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    with torch.no_grad():
        expected = theirs(TOKENS, use_cache=False).logits
        assert_computes(bring_in(tmp_path)[1], expected)
        torch.save(dict(tensors), tmp_path / "pytorch_model.bin")
        assert_computes(bring_in(tmp_path)[1], expected)
