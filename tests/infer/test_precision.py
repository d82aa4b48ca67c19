"""Matrices take half the memory in bfloat16, and nothing else changes its type."""

from __future__ import annotations

import copy

import torch
from small import small_model
from torch import nn

from hinny.infer.precision import to_bfloat16


def test_matrices_are_rounded_and_the_rest_is_what_it_was():
    model = small_model("M1*-").float()
    before = copy.deepcopy(model)
    to_bfloat16(model)
    matrices = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)}
    assert {"embedding.weight", "head.weight", "layers.0.layer.out_proj.weight"} < matrices
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.dtype == (torch.bfloat16 if name in matrices else torch.float32)
        torch.testing.assert_close(now.float(), then.bfloat16().float() if name in matrices else then, rtol=0, atol=0)


def test_a_tied_head_stays_the_embedding():
    model = small_model("M", tie_embeddings=True).float()
    to_bfloat16(model)
    assert model.output_weight is model.embedding.weight
    assert model.output_weight.dtype == torch.bfloat16


@torch.no_grad()
def test_states_stay_in_float32():
    model = small_model("M1").float()
    to_bfloat16(model)
    state = model.init_state(1)
    for token in (1, 2):
        model(torch.tensor([[token]]), state)
    assert {layer.ssm.dtype for layer in state.layers} == {torch.float32}
