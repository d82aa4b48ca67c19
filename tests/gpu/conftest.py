"""Tests that need a GPU. They need hinny.ops alone, so that they also run where pydantic is not installed:

    python -m pytest --confcutdir=tests/gpu -m gpu tests/gpu
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# cuBLAS reads it when it starts; without it its products warn in deterministic mode
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder's tests on a machine without a GPU; lets PyTorch's own ops be what they are in them."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore:.*eterministic:UserWarning"))
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that a result read before it was written cannot pass.

    That goes with PyTorch's deterministic mode, where ops of its own that have no such form may only warn: references
    use them. Kernels of ours are held to equal bits by their tests.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
