"""A recipe that trains in milliseconds, and data for it."""

import random

import pytest

from hinny.config import Recipe, validate
from hinny.data.prepare import prepare
from hinny.tokenizer import BYTES_FILE

SECTIONS = {
    "1": ("mamba1", {"d_state": 4, "expand": 2, "d_conv": 4, "dt_rank": 2, "chunk_len": 8}),
    "M": ("mamba2", {"d_state": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "d_conv": 4, "chunk_len": 8}),
    "*": ("attention", {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "positions": "none"}),
    "-": ("mlp", {"d_ff": 32, "activation": "gelu"}),
}


@pytest.fixture(scope="session")
def recipe_of():
    """Pattern → tiny recipe; keyword arguments change keys of [train], optim={...} keys of [optim]; synthetic={...} is
    [data.synthetic].
    """
    def make(pattern, optim=None, synthetic=None, **train):
        return validate(Recipe, {
            "name": "tiny", "description": "for tests",
            "model": {"pattern": pattern, "d_model": 16, "vocab_size": 257, "norm": "rmsnorm", "norm_eps": 1e-5,
                      "tie_embeddings": False, "init_std": 0.02,
                      **dict(SECTIONS[symbol] for symbol in dict.fromkeys(pattern.replace("|", "")))},
            "data": {"boundaries": "reset", **({"synthetic": synthetic} if synthetic else {})},
            "optim": {"lr": 1e-2, "schedule": "cosine", "min_lr": 1e-3, "warmup_samples": 4, "weight_decay": 0.1,
                      "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0, **(optim or {})},
            "train": {"seq_len": 32, "batch_size": 4, "micro_batch_size": 4, "steps": 12, "seed": 0,
                      "precision": "fp32", "log_every": 1, "save_every": 4, **train},
        }, "test")
    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder of short documents of words, in bytes."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "text"
    source.mkdir()
    words = random.Random(0)
    for number in range(60):
        text = " ".join(words.choice(["one", "two", "three", "four"]) for _ in range(words.randrange(5, 60)))
        (source / f"{number}.txt").write_text(text)
    (folder / "tokenizer.json").write_bytes(BYTES_FILE)
    prepare(folder / "data", text=[source], tokenizer=folder / "tokenizer.json", held_out=0.2)
    return str(folder / "data")
