"""Weights that know how many of them are in memory."""

from __future__ import annotations

import weakref

from torch import Tensor


class OneAtATime:
    """Gives copies of `values` by name. asked: the names; most: how many copies were alive at a time."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values, self.asked, self.most = values, [], 0
        self.alive: weakref.WeakSet[object] = weakref.WeakSet()

    def __call__(self, name: str) -> Tensor:
        value = self.values[name].clone()
        self.alive.add(value.untyped_storage())
        self.asked.append(name)
        self.most = max(self.most, len(self.alive))
        return value
