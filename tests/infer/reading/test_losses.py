"""The loss of each token is that of one full pass, however the text is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import small_model

from hinny.infer.reading import losses as module
from hinny.infer.reading.losses import losses
from hinny.model import Model


def _whole(model: Model, tokens: np.ndarray) -> np.ndarray:
    """-log p of each token but the first, one pass a sequence."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        p = torch.cat([model(row[None]) for row in ids]).double().log_softmax(-1)
    return -p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize("at_once", [1, 7, 30, 64, 10_000])
def test_pieces_repeat_the_full_pass(model: Model, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # logits of 3 positions at a time
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 3 * model.config.vocab_size + 1)
    tokens = np.random.default_rng(0).integers(0, 37, (3, 30))
    heard = []
    found = losses(model, tokens, at_once, lambda done, of: heard.append((done, of)))
    np.testing.assert_allclose(found, _whole(model, tokens), rtol=0, atol=1e-10)
    assert heard[-1] == (87, 87)


def test_logits_are_never_as_many_as_the_text_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model("M"), []
    logits = module.logits
    monkeypatch.setattr(module, "logits", lambda hidden, words: seen.append(len(hidden)) or logits(hidden, words))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 10 * 37)
    losses(model, np.zeros((2, 40), int))
    assert max(seen) == 10
    assert sum(seen) == 2 * 39
