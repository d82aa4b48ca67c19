"""Checkpoints of a run: whole or absent, verified when they are read."""

from hinny.checkpoint.store import (
    clean,
    differences,
    fingerprint,
    latest,
    load,
    load_model,
    read_meta,
    read_weights,
    save,
)

__all__ = [
    "clean", "differences", "fingerprint", "latest", "load", "load_model", "read_meta", "read_weights", "save",
]
