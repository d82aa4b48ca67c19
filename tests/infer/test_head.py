"""Logits of a model in bfloat16 are as good as what the head reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_reader import WORDS, Letters
from small import small_model

from hinny.infer.precision import to_bfloat16
from hinny.infer.reading.losses import losses
from hinny.infer.reading.reader import ModelReader
from hinny.infer.reading.requests import Score
from hinny.infer.reading.stepper import Stepper
from hinny.model import Model
from hinny.ops import thin


def loud(pattern: str) -> Model:
    """A float32 model whose logits are large: bfloat16 would tell them to 0.06 or worse."""
    model = small_model(pattern).float().requires_grad_(False)
    model.output_weight.mul_(8)
    return model


@pytest.mark.parametrize("under", ["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("pattern", ["M", "1*M-"])
def test_log_probabilities_are_those_of_unrounded_logits(pattern: str, under: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "WIDENED", 10)  # not a divisor of the words
    model, text = loud(pattern), tuple(range(1, 30))
    if under == "bfloat16 weights":
        to_bfloat16(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=under == "autocast"):
        found, = ModelReader(model, Letters(), budget=10**8).score([Score(text[:1], text[1:])])
        lost = losses(model, np.array([text]))[0]
        hidden = model.hidden(torch.tensor([text[:-1]]))[0]
    assert hidden.dtype == torch.bfloat16
    exact = hidden.double() @ model.output_weight.bfloat16().double().T
    assert exact.abs().max() > 16
    expected = exact.log_softmax(-1)[range(28), text[1:]].numpy()
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(-lost, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_of_two_words_nearly_as_likely_the_likelier_is_written() -> None:
    """They are one number in bfloat16, where the first of them would win."""
    model = loud("M")
    to_bfloat16(model)
    state = model.init_state(1)
    hidden = model.hidden(torch.tensor([[1, 2, 3]]), state)[0, -1].double()
    ahead = model.init_state(1)
    model.hidden(torch.tensor([[1, 2]]), ahead)
    # along the hidden vector: both logits near 30, apart by less than bfloat16 tells there
    words = model.output_weight
    words[3] = (30 * hidden / hidden.square().sum()).bfloat16()
    words[20] = words[3]
    i = int((words[3].double() * hidden).abs().argmin())
    words[20, i] *= 1.5 if words[3, i].double() * hidden[i] > 0 else 0.5
    near = words[[3, 20]].double() @ hidden
    assert near[0] < near[1]
    assert near.bfloat16()[0] == near.bfloat16()[1]
    assert Stepper(model, ahead, WORDS).step(torch.tensor([3])).tolist() == [20]
