"""The memory of reading a text beside what the operators truly make, on tensors without contents."""

from __future__ import annotations

import pytest
import torch
from live_bytes import Live, kernels_on_fake_tensors

from hinny import memory
from hinny.config import load_recipe
from hinny.errors import ConfigError
from hinny.infer.precision import to_bfloat16
from hinny.model import Model

TOKENS, PIECE = 4096, 1024


@pytest.mark.parametrize(("recipe", "pattern"), [
    ("8b-hybrid", "M-"), ("8b-hybrid", "M"), ("8b-hybrid", "-"), ("8b-transformer", "*-"), ("8b-mamba", "1")])
def test_reading_takes_what_it_truly_makes(recipe: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(recipe).model.model_copy(update={"pattern": pattern})
    with kernels_on_fake_tensors(monkeypatch), torch.no_grad():
        model = Model(config)
        to_bfloat16(model)
        with Live() as live:
            state = model.init_state(1, capacity=TOKENS)
            for _ in range(0, TOKENS, PIECE):
                model.hidden(torch.zeros(1, PIECE, dtype=torch.int64), state)
            live.settle()
        weights = sum(p.nbytes for p in model.parameters())
    parts = memory.inference(config, tokens=TOKENS, piece=PIECE)["parts"]
    assert parts["weights"] == pytest.approx(weights, rel=0.01)
    predicted = parts["keys"] + parts["states"] + parts["activations"]
    assert live.peak == pytest.approx(predicted, rel=0.1)


def test_only_what_must_grows_with_the_text() -> None:
    model = load_recipe("8b-hybrid").model
    short, long = (memory.inference(model, tokens=n, piece=8192)["parts"] for n in (8192, 131072))
    assert long["keys"] == 16 * short["keys"]
    assert {k: v for k, v in long.items() if k != "keys"} == {k: v for k, v in short.items() if k != "keys"}
    twice = memory.inference(model, tokens=8192, piece=8192, rows=2)["parts"]
    assert twice == {k: v if k in ("weights", "workspace") else 2 * v for k, v in short.items()}


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"piece \(0\)"):
        memory.inference(load_recipe("8b-hybrid").model, tokens=1, piece=0)
