"""A format of the tests' own with our names, in several files: for counting memory."""

from __future__ import annotations

from pathlib import Path

import torch

from hinny.checkpoint import sharded
from hinny.checkpoint.formats.files import SafetensorsFolder
from hinny.checkpoint.formats.foreign import Foreign, Info
from hinny.checkpoint.formats.table import Row
from hinny.checkpoint.matching import shapes
from hinny.config import ModelConfig, validate

NAME = "large"
CONFIG = validate(ModelConfig, dict(
    pattern="-" * 5, d_model=1024, vocab_size=512, norm="rmsnorm", norm_eps=1e-5, tie_embeddings=True, init_std=0.02,
    mlp=dict(d_ff=4096, activation="gelu")), "test")


def recognises(folder: Path) -> bool:
    return True


def rows(model):
    return [Row(name, (name,)) for name in shapes(model)]


def refusals(model):
    return []


def write_settings(model, folder, *, dtype, max_len, eod=None):
    return []


def open_checkpoint(folder: Path) -> Foreign:
    return Foreign(format="large", model=CONFIG, tensors=SafetensorsFolder(folder), rows=rows(CONFIG))


def write(folder: Path) -> int:
    """A checkpoint of 80 MB in bfloat16; returns the bytes of its largest file."""
    folder.mkdir()
    infos = {name: Info(tuple(value.shape), torch.bfloat16) for name, value in shapes(CONFIG).items()}
    shards = sharded.plan(infos, 2**25)
    sharded.write(folder, shards, lambda name: torch.ones(infos[name].shape, dtype=torch.bfloat16))
    return max(f.stat().st_size for f in folder.iterdir())
