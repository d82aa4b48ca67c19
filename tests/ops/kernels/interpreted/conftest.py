"""Kernels in Triton's interpreter, on the CPU. It is chosen when Triton is first imported, so these tests need a
process of their own, which `test_interpreted.py` starts; collected in any other, they are left out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter takes a loop's bounds from arrays of one element, of which NumPy warns."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that a result read before it was written cannot pass."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
