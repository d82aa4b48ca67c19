"""Losses at several lengths of context are of the same tokens, each window read by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hinny.data.folder import DataFolder
from hinny.errors import ConfigError
from hinny.evals.options import EvalOptions
from hinny.evals.windows import window_loss
from hinny.infer.engine import Engine
from hinny.run import Run


@pytest.fixture(scope="module")
def engine(trained_run: Run) -> Engine:
    return Engine(trained_run.path)


def by_hand(engine: Engine, text: np.ndarray, length: int) -> float:
    """The mean of -log p over all targets, a plain pass for every window."""
    sums = []
    for start in range(0, len(text) - 1, length):
        ids = torch.from_numpy(text[start:start + length + 1].astype(np.int64))
        with torch.no_grad():
            p = engine.model(ids[None, :-1]).double().log_softmax(-1)[0]
        sums.append(-p.gather(-1, ids[1:, None]).sum())
    return float(sum(sums)) / (len(text) - 1)


def test_the_same_tokens_are_read_in_windows_of_each_length(engine: Engine) -> None:
    rows = window_loss(engine, EvalOptions(samples=2, lengths=(8, 96, 48)))
    text = DataFolder(engine.run.recipe.data.path, None).shard("heldout").tokens(0, 2 * 96 + 1)
    assert {row["shape"]: row["value"] for row in rows} == {
        f"length={length} sequences=2": pytest.approx(by_hand(engine, text, length), abs=1e-5)
        for length in (8, 48, 96)}
    assert all(row["low"] < row["value"] < row["high"] for row in rows)


def test_lengths_that_cannot_cover_the_same_text_are_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="36 does not divide 96, the longest"):
        window_loss(engine, EvalOptions(lengths=(36, 96)))
    with pytest.raises(ConfigError, match=r"has \d+ tokens, and a window of 9999999 needs one more"):
        window_loss(engine, EvalOptions(lengths=(9999999,)))


def test_the_training_length_is_the_default_and_one_sequence_has_no_interval(engine: Engine) -> None:
    (found,) = window_loss(engine, EvalOptions(samples=1))
    assert found["shape"] == f"length={engine.run.recipe.train.seq_len} sequences=1"
    assert found["low"] is None
