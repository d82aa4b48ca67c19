"""A token by itself on a CPU is what a plain pass of the whole text makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import PATTERNS, small_model

from hinny.infer import lean
from hinny.infer import runner as runners
from hinny.infer.parts import Part
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import prepare
from hinny.infer.runner import ModelRunner
from hinny.model import Model

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((pattern, {}) for pattern in PATTERNS),
    ("M*-", {"norm": "layernorm1p"}), ("*-", {"tie_embeddings": True}),
    ("*-", {"mlp": dict(d_ff=24, activation="swiglu")}),
    ("M-", {"mlp": dict(d_ff=24, activation="relu2")}),
    ("*", {"attention": dict(n_heads=4, n_kv_heads=4, head_dim=8, positions="none")}),
    ("*", {"attention": dict(n_heads=4, n_kv_heads=1, head_dim=8, positions="rope", rope_fraction=1.0,
                             rope_base=100.0)}),
    ("*M", {"attention": dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=1.0, rope_base=100.0,
                              score_scale=1.5, rope_scaling=dict(method="yarn", factor=4.0, trained_len=8))}),
    ("*", {"attention": dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="rope", rope_fraction=0.5, rope_base=100.0,
                             rope_scaling=dict(method="interpolation", factor=4.0, trained_len=8))}),
]


def _prepared(pattern: str, changes: dict[str, Any]) -> tuple[Model, Model]:
    """A model as it was made, and ready for inference."""
    plain = small_model(pattern, **changes).eval().requires_grad_(False)
    ready = copy.deepcopy(plain)
    prepare(ready)
    return plain, ready


@pytest.mark.parametrize(("pattern", "changes"), KINDS)
def test_tokens_one_by_one_are_those_of_the_whole_text(pattern: str, changes: dict[str, Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ready = _prepared(pattern, changes)
    texts = torch.randint(37, (2, 30), generator=torch.Generator().manual_seed(1))
    runner = ModelRunner(ready, slots=4, pages=16, page=4)
    pages = {0: [5, 4, 9, 0, 1, 2, 15, 3], 1: [6, 7, 8, 10, 11, 12, 13, 14]}
    for tensor in runner.pool.tensors():
        tensor.fill_(3.0)
    for slot in (3, 1):
        runner.clear_slot(slot)
    runner.run([Part(3, pages[0], 0, texts[0, :6].tolist())])
    # from here on nothing but single tokens: the layers' own code has no part in it
    monkeypatch.setattr(runners, "hidden", None)
    for number, (row, slot) in enumerate(((0, 3), (1, 1))):
        begin = 0 if number else 6
        found = torch.cat([runner.run([Part(slot, pages[row], i, [int(texts[row, i])])]) for i in range(begin, 30)])
        torch.testing.assert_close(found, plain(texts[row:row + 1])[0, begin:], rtol=0, atol=1e-10)
    assert runner.run([Part(1, pages[1], 30, [0], wanted=0)]).shape == (0, 37)


def test_a_pass_of_several_goes_on_where_a_single_token_ended() -> None:
    plain, ready = _prepared("M-M*-", {})
    text = torch.randint(37, (1, 12), generator=torch.Generator().manual_seed(2))
    runner = ModelRunner(ready, slots=2, pages=4, page=4)
    runner.clear_slot(0)
    for i in range(4):
        runner.run([Part(0, [2, 0, 1], i, [int(text[0, i])])])
    found = runner.run([Part(0, [2, 0, 1], 4, text[0, 4:].tolist(), wanted=8)])
    torch.testing.assert_close(found, plain(text)[0, 4:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("why", ["not prepared", "states are shorter", "another mixer", "bfloat16"])
def test_what_it_is_not_made_for_goes_the_common_way(why: str) -> None:
    plain, ready = _prepared("M*-", {})
    model = plain if why == "not prepared" else ready
    if why == "another mixer":
        model.blocks[0].layer.mix = lambda *tensors, **options: type(plain.blocks[0].layer).mix(*tensors, **options)
    if why == "bfloat16":
        model = plain.float()
        to_bfloat16(model)
        prepare(model)
    short = torch.bfloat16 if why == "states are shorter" else None
    runner = ModelRunner(model, slots=1, pages=2, page=4, state_dtype=short)
    assert runner._lean is None
    runner.clear_slot(0)
    assert runner.run([Part(0, [0, 1], 0, [5])]).isfinite().all()


def test_a_large_matrix_gives_what_a_small_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ready = _prepared("M*-", {})
    text = torch.randint(37, (8,), generator=torch.Generator().manual_seed(3)).tolist()

    def answers(words: int) -> torch.Tensor:
        runner = ModelRunner(ready, slots=1, pages=2, page=4, words=words)
        runner.clear_slot(0)
        return torch.cat([runner.run([Part(0, [0, 1], i, [token])]) for i, token in enumerate(text)])

    small = answers(36)
    monkeypatch.setattr(lean, "LARGE", 0)
    torch.testing.assert_close(answers(36), small, rtol=0, atol=1e-12)
    torch.testing.assert_close(answers(35), small[:, :35], rtol=0, atol=1e-12)
