"""On a GPU quantised weights give the numbers that they stand for, int4 in the GPU's own format too."""

from __future__ import annotations

import copy

import pytest
import torch
from small import small_model
from torch import nn

from hinny.errors import ConfigError
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import prepare
from hinny.infer.quantise import GROUP, is_quantised, matrix_bytes, quantise, quantised_bytes
from hinny.model import Model

pytest.importorskip("torchao")
TOKENS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(1))
WIDE = {"mlp": dict(d_ff=256, activation="gelu"), "d_model": GROUP,
        "mamba2": dict(d_state=16, head_dim=16, n_groups=2, expand=2, d_conv=4, chunk_len=4),
        "attention": dict(n_heads=8, n_kv_heads=2, head_dim=16, positions="rope", rope_fraction=0.5,
                          rope_base=10000.0)}


def wide() -> Model:
    model = small_model("M-*-", init_std=0.05, **WIDE).float().cuda()
    to_bfloat16(model)
    return model


def meant(weight: torch.Tensor) -> torch.Tensor:
    """What a quantised weight stands for: of int4, what its product with the identity gives."""
    if hasattr(weight, "scale_and_zero"):
        eye = torch.eye(weight.shape[1], dtype=torch.bfloat16, device="cuda")
        return torch.nn.functional.linear(eye, weight).T.double()
    return weight.qdata.double() * weight.scale.double()


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@torch.no_grad()
def test_logits_are_those_of_the_numbers_that_the_short_ones_stand_for(kind):
    model = wide()
    before = copy.deepcopy(model)
    quantise(model, kind)
    exact = small_model("M-*-", init_std=0.05, **WIDE).cuda()
    for name, part in exact.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            weight = model.get_submodule(name).weight
            part.weight.copy_(meant(weight) if is_quantised(weight) else weight)
            if is_quantised(weight):
                old = before.get_submodule(name).weight.double()
                assert (part.weight - old).norm() < {"int8": 0.01, "fp8": 0.04, "int4": 0.15}[kind] * old.norm()
    wanted = exact(TOKENS.cuda())
    for _ in range(2):
        found = model(TOKENS.cuda()).double()
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        prepare(model)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_model_takes_the_memory_that_is_said(kind):
    model = wide()
    quantise(model, kind)
    held = 0
    for weight in model.parameters():
        if is_quantised(weight):
            parts = (weight.qdata, weight.scale_and_zero if kind == "int4" else weight.scale)
            held += sum(part.nbytes for part in parts)
            assert sum(part.nbytes for part in parts) == matrix_bytes(*weight.shape, kind)
        else:
            held += weight.nbytes
    assert quantised_bytes(model.config, kind, 2) == held


def test_four_bits_need_whole_groups_in_bfloat16():
    with pytest.raises(ConfigError, match="int4 is made from bfloat16"):
        quantise(small_model("M-").float().cuda(), "int4")
    narrow = small_model("M-").float().cuda()
    to_bfloat16(narrow)
    with pytest.raises(ConfigError, match="no multiple"):
        quantise(narrow, "int4")
