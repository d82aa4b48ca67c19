"""Checkpoints of a run: whole or absent, verified when they are read."""

from hinny.checkpoint.retention import clean, latest
from hinny.checkpoint.saver import Saver
from hinny.checkpoint.store import (
    differences,
    fingerprint,
    load,
    load_model,
    read_meta,
    read_weights,
    save,
    uncut,
)

__all__ = [
    "Saver", "clean", "differences", "fingerprint", "latest", "load", "load_model", "read_meta", "read_weights", "save",
    "uncut",
]
