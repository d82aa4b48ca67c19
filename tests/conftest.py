"""Fixtures of all tests: small models and one small trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import PATTERNS, small_model

from hinny.config import load_recipe
from hinny.data.prepare import prepare
from hinny.model import Model
from hinny.run import Run
from hinny.train.loop import train


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest) -> Model:
    """One float64 model of each kind of pattern."""
    return small_model(request.param)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Any:
    """torch.empty gives NaN, so that a result read before it was written cannot pass."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of bytes: a few documents of made-up text."""
    folder = tmp_path_factory.mktemp("data")
    words = ("the", "a", "def", "return", "class", "self", "in", "of", "to", "and", "is", "for", "with", "not", "if")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 120)) + f"\ndocument {i}\n")
    prepare(folder / "prepared", text=[folder], tokenizer="bytes", held_out=0.2)
    return folder / "prepared"


@pytest.fixture(scope="session")
def trained_run(byte_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a small hybrid, trained for a few steps on `byte_data`."""
    recipe = load_recipe("tiny-hybrid", [
        "model.vocab_size=257", "model.d_model=32", "model.mamba2.head_dim=16", "model.mamba2.d_state=8",
        "model.attention.n_heads=2", "model.attention.n_kv_heads=1", "model.attention.head_dim=16", "model.mlp.d_ff=48",
        "train.seq_len=64", "train.batch_size=4", "train.micro_batch_size=2", "train.steps=6", "train.save_every=3",
        "train.log_every=1", "train.precision=fp32", "optim.warmup_samples=8"])
    return train(recipe, tmp_path_factory.mktemp("run") / "small", data=str(byte_data), threads=1)
