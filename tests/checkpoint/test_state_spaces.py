"""state-spaces/mamba's files, made here as its package makes them, against transformers' classes of these weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import TOKENS, assert_computes, bring_in, fill
from one_at_a_time import OneAtATime
from safetensors.torch import save_file
from small import small_config
from torch import Tensor

from hinny.checkpoint.formats import state_spaces
from hinny.errors import CheckpointError
from hinny.model import Model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about absent CUDA kernels

STORED = 48
"""Rows of the vocabulary: 37 words, padded to a multiple of 16."""

SETTINGS: dict[str, Any] = dict(d_model=16, n_layer=2, vocab_size=37, rms_norm=True, residual_in_fp32=True,
                                fused_add_norm=True, pad_vocab_size_multiple=16)
MAMBA2 = dict(layer="Mamba2", d_state=6, headdim=8, d_conv=4, expand=2)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    # as mamba-130m has it: nothing but sizes
    "mamba": (SETTINGS | dict(ssm_cfg={}), "Mamba", dict(state_size=16, time_step_rank=1, tie_word_embeddings=True)),
    "mamba-untied": (
        SETTINGS | dict(ssm_cfg=dict(layer="Mamba1", d_state=5, dt_rank=3, expand=3, d_conv=3), tie_embeddings=False),
        "Mamba", dict(state_size=5, time_step_rank=3, expand=3, conv_kernel=3, tie_word_embeddings=False)),
    # as mamba2-130m has it
    "mamba2": (
        SETTINGS | dict(ssm_cfg=MAMBA2, d_intermediate=0, attn_layer_idx=[], attn_cfg={}, tie_embeddings=True),
        "Mamba2", dict(state_size=6, head_dim=8, num_heads=4, n_groups=1, chunk_size=4, tie_word_embeddings=True)),
    "mamba2-grouped": (
        SETTINGS | dict(ssm_cfg=MAMBA2 | dict(ngroups=2, chunk_size=8), tie_embeddings=False),
        "Mamba2", dict(state_size=6, head_dim=8, num_heads=4, n_groups=2, chunk_size=4, tie_word_embeddings=False)),
}


def twin(case: str) -> Any:
    """transformers' model of the case, filled."""
    _, family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(vocab_size=STORED, hidden_size=16, num_hidden_layers=2, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    fill(model)
    return model


def package(model: Any) -> dict[str, Tensor]:
    """The state dict that mamba_ssm would save: another name for the embedding, and always a head."""
    table = {name.replace("embeddings.", "embedding."): tensor for name, tensor in model.state_dict().items()}
    return table | {"lm_head.weight": model.get_output_embeddings().weight.detach()}


def written(case: str, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    model = twin(case)
    table = package(model)
    (folder / "config.json").write_text(json.dumps(CASES[case][0]))
    torch.save(table, folder / "pytorch_model.bin")
    return model, table


@pytest.mark.parametrize("case", CASES)
def test_a_released_folder_gives_the_same_logits_and_goes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    theirs, table = written(case, tmp_path)
    foreign, ours = bring_in(tmp_path)
    assert foreign.model.vocab_size == STORED
    assert foreign.facts["vocabulary"] == "37, padded to 48"
    assert list(foreign.ignored) == ([] if "untied" in case or "grouped" in case else ["lm_head.weight"])
    with torch.no_grad():
        assert_computes(ours, theirs(TOKENS, use_cache=False).logits)
    out = tmp_path / "out"
    out.mkdir()
    read = OneAtATime(ours.state_dict())
    state_spaces.write_checkpoint(foreign.model, read, out)
    assert sorted(read.asked) == sorted(read.values)
    assert read.most <= 7
    back = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert back.keys() == table.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in table.items())
    # a tied head is no second copy in the file
    assert (out / "pytorch_model.bin").stat().st_size < 1.05 * (tmp_path / "pytorch_model.bin").stat().st_size
    again, model = bring_in(out)
    assert again.model == foreign.model
    assert torch.equal(model(TOKENS), ours(TOKENS))


def test_safetensors_without_a_tied_head_are_the_same(tmp_path: Path) -> None:
    theirs, table = written("mamba2", tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    table.pop("lm_head.weight")
    save_file({name: tensor.clone() for name, tensor in table.items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_computes(bring_in(tmp_path)[1], theirs(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize(("case", "key", "value", "part"), [
    ("mamba", "rms_norm", False, "rms_norm is False"),
    ("mamba", "d_intermediate", 32, "d_intermediate is 32"),
    ("mamba2", "attn_layer_idx", [1], "attn_layer_idx is [1]"),
    ("mamba2", "attn_cfg", {"num_heads": 2}, "attn_cfg is {'num_heads': 2}"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"layer": "Mamba3"}, "ssm_cfg.layer is 'Mamba3'"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"bias": True}, "ssm_cfg.bias is True"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"conv_bias": False}, "ssm_cfg.conv_bias is False"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"rmsnorm": False}, "ssm_cfg.rmsnorm is False"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"norm_before_gate": True}, "ssm_cfg.norm_before_gate is True"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"D_has_hdim": True}, "ssm_cfg.D_has_hdim is True"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"d_ssm": 16}, "ssm_cfg.d_ssm is 16"),
    ("mamba2", "ssm_cfg", MAMBA2 | {"dt_limit": [0.0, 1.0]}, "ssm_cfg.dt_limit is [0.0, 1.0]"),
    ("mamba", "ssm_cfg", {"headdim": 8}, "ssm_cfg has headdim"),
    ("mamba", "ssm_cfg", {"d_state": "16"}, "d_state is '16'"),
    ("mamba", "pad_vocab_size_multiple", 0, "pad_vocab_size_multiple is 0"),
])
def test_what_our_layers_do_not_compute_is_refused_by_name(
        case: str, key: str, value: Any, part: str, tmp_path: Path) -> None:
    written(case, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CASES[case][0] | {key: value}))
    with pytest.raises(CheckpointError) as caught:
        state_spaces.open_checkpoint(tmp_path)
    assert part in str(caught.value)


def test_a_failed_write_leaves_no_half_a_file(tmp_path: Path) -> None:
    model = Model(small_config("1"))
    fill(model)
    (tmp_path / "pytorch_model.bin").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        state_spaces.write_checkpoint(model.config, model.state_dict().__getitem__, tmp_path)
    assert not list(tmp_path.glob(".partial*"))
