"""Who holds which rows of the pools: pages of keys and slots of states, counted, without the tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Copies(Protocol):
    """What the scheduler has done to the pools between two forward passes: a `parts.Runner`."""

    def clear_slot(self, slot: int) -> None:
        """Zeros: the state before a first token."""

    def copy_slot(self, source: int, target: int) -> None:
        """A fork or a snapshot of a sequence's states."""

    def copy_page(self, source: int, target: int) -> None:
        """A page that two sequences share, before one of them writes into it."""


@dataclass(frozen=True)
class Usage:
    """Rows of a pool, of which each is used, cached or free."""

    total: int
    used: int
    """Held by sequences at work."""
    cached: int
    """Held by the prefix cache alone: free as soon as a sequence needs them."""


class Rows:
    """The numbers of a pool's rows, each held by so many sequences and so many entries of the prefix cache."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total
        self._keepers = [0] * total
        self._used = 0

    @property
    def free(self) -> int:
        """Rows that nobody holds."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Rows that no sequence holds: free ones and those that the cache would give back."""
        return self.total - self._used

    @property
    def usage(self) -> Usage:
        return Usage(self.total, self._used, self.total - self._used - self.free)

    def take(self) -> int:
        """A free row, for one sequence; there must be one."""
        assert self._free, f"none of {self.total} rows is free"
        row = self._free.pop()
        self._users[row] = 1
        self._used += 1
        return row

    def share(self, rows: Iterable[int]) -> None:
        """One more sequence holds these, which somebody holds already."""
        for row in rows:
            assert self._users[row] or self._keepers[row], f"row {row} is free"
            self._used += not self._users[row]
            self._users[row] += 1

    def release(self, rows: Iterable[int]) -> None:
        """One sequence holds these no longer."""
        for row in rows:
            assert self._users[row], f"row {row} is held by no sequence"
            self._users[row] -= 1
            if not self._users[row]:
                self._used -= 1
                if not self._keepers[row]:
                    self._free.append(row)

    def keep(self, rows: Iterable[int]) -> None:
        """One more entry of the cache holds these, which somebody holds already."""
        for row in rows:
            assert self._users[row] or self._keepers[row], f"row {row} is free"
            self._keepers[row] += 1

    def drop(self, rows: Iterable[int]) -> None:
        """One entry of the cache holds these no longer."""
        for row in rows:
            assert self._keepers[row], f"row {row} is not cached"
            self._keepers[row] -= 1
            if not self._keepers[row] and not self._users[row]:
                self._free.append(row)


class Memory:
    """Both pools of an engine, and how many pages so many tokens take."""

    def __init__(self, slots: int, pages: int, page: int) -> None:
        """pages: 0 for a model without attention, whose sequences have none; page: tokens of one."""
        self.slots, self.pages, self.page = Rows(slots), Rows(pages), page

    def needed(self, tokens: int) -> int:
        """Pages with room for so many tokens."""
        return -(-tokens // self.page) if self.pages.total else 0
