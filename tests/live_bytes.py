"""Bytes of tensors that are alive: what a pass keeps, and the most there ever is, counted at PyTorch's dispatcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hinny.ops import backend


class Live(TorchDispatchMode):
    """Inside, follows the memory of all tensors that are made; those from before are left out. Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.before: set[int] = set()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, given)
        return result

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in given and key not in self.alive:
            self.before.add(key)
        if key not in self.alive and key not in self.before:
            self.alive[key] = StorageWeakRef(storage), storage.nbytes()
            self.now += storage.nbytes()
            if self.now > self.peak:
                self.peak = max(self.settle(), self.peak)

    def settle(self) -> int:
        """Forgets what is gone; the bytes that are left."""
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            self.now -= self.alive.pop(key)[1]
        return self.now


def products(live: Live) -> int:
    """Matrix products that ran."""
    aten = torch.ops.aten
    return sum(live.calls[op] for op in (aten.mm.default, aten.addmm.default))


@contextmanager
def kernels_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, ops run their kernels' launchers on tensors that have shapes and types alone."""
    monkeypatch.setattr(backend, "_no_kernels", lambda: "")
    monkeypatch.setattr(backend, "_no_kernel_for", lambda device, dtype: "")
    # the fixture of all tests that fills new memory would count its filling
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
