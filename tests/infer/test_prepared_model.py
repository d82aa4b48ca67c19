"""A prepared model gives the numbers of the model that it was, from the same memory."""

from __future__ import annotations

import copy

import pytest
import torch
from small import PATTERNS, small_model
from torch import nn

from hinny.infer.prepare import Packed, Product, hidden, prepare
from hinny.model import Model

TOKENS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(1))


def models() -> list[tuple[str, dict]]:
    swiglu = {"mlp": dict(d_ff=24, activation="swiglu")}
    relu2 = {"mlp": dict(d_ff=24, activation="relu2"), "norm": "layernorm1p", "tie_embeddings": True}
    return [*((pattern, {}) for pattern in PATTERNS), ("M-*-", swiglu), ("M-*-", relu2)]


@pytest.mark.parametrize(("pattern", "changes"), models(), ids=str)
@torch.no_grad()
def test_a_prepared_model_reads_and_decodes_as_before(pattern, changes):
    model = small_model(pattern, **changes)
    prepared = copy.deepcopy(model)
    prepare(prepared)
    states = [model.init_state(2), model.init_state(2)]
    for piece in (TOKENS[:, :7], TOKENS[:, 7:8], TOKENS[:, 8:]):
        wanted = model.hidden(piece, states[0])
        torch.testing.assert_close(hidden(prepared, piece, states[1].layers), wanted, rtol=0, atol=1e-12)
        states[1].advance(piece.shape[1])
        torch.testing.assert_close(prepared(piece, model.init_state(2)), model(piece, model.init_state(2)), rtol=0,
                                   atol=1e-12)


def held(model: Model) -> int:
    """Bytes of all matrices and vectors that the model's modules hold, once each."""
    found = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *vars(module).values()):
            value = getattr(getattr(value, "__self__", None), "weight", value)
            if isinstance(value, torch.Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


def test_no_weight_is_held_twice():
    model = small_model("M-*-1")
    before = held(model)
    prepare(model)
    assert held(model) == before
    mamba2 = model.blocks[0].layer
    assert isinstance(mamba2.in_proj, Packed)
    assert isinstance(mamba2.out_proj, Product)


class Quantised(nn.Parameter):
    """A weight that is no ordinary matrix."""


def test_weights_of_another_kind_stay_where_they_are():
    model = small_model("*")
    attention = model.blocks[0].layer
    attention.k.weight = Quantised(attention.k.weight.detach())
    before = attention.k
    with torch.no_grad():
        wanted = model(TOKENS)
        prepare(model)
        assert attention.k is before
        torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-12)
    assert "projected" not in vars(attention)
