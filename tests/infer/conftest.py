"""What several tests of inference need."""

from __future__ import annotations

from pathlib import Path

import pytest

from hinny.config import load_recipe
from hinny.run import Run
from hinny.train.loop import train


@pytest.fixture(scope="session")
def even_run(byte_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a small hybrid with even numbers of all that is cut."""
    recipe = load_recipe("tiny-hybrid", [
        "model.vocab_size=258", "model.d_model=32", "model.mamba2.head_dim=16", "model.mamba2.d_state=8",
        "model.mamba2.n_groups=2",
        "model.attention.n_heads=2", "model.attention.n_kv_heads=2", "model.attention.head_dim=16", "model.mlp.d_ff=48",
        "train.seq_len=64", "train.batch_size=4", "train.micro_batch_size=2", "train.steps=1", "train.save_every=1",
        "train.log_every=1", "train.precision=fp32", "optim.warmup_samples=2"])
    return train(recipe, tmp_path_factory.mktemp("run") / "even", data=str(byte_data), threads=1)
