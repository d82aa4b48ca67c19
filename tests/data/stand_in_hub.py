"""A stand-in for the package `datasets`: rows on disk and streams, as far as they are used."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = {"tokenizer": "bytes", "held_out": 0.2}
FILES = ("train.bin", "train.idx", "heldout.bin", "heldout.idx")


class Table:
    """Rows on disk, as far as `datasets.Dataset` is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        self.data = types.SimpleNamespace(nbytes=sum(len(str(row)) for row in rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def with_format(self, kind: None) -> Table:
        return self

    def select_columns(self, names: list[str]) -> Table:
        return Table([{name: row[name] for name in names} for row in self.rows])

    def select(self, places: range) -> Table:
        return Table([self.rows[place] for place in places])


class Stream:
    """Rows one after the other, as far as `datasets.IterableDataset` is used; may break off once."""

    def __init__(self, rows: list[dict[str, Any]], breaks_at: int | None = None) -> None:
        self.rows = rows
        self.info = types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_examples=len(rows))})
        self.breaks_at = breaks_at
        self.served: list[int] = []
        self._next = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._next < len(self.rows):
            if self._next == self.breaks_at:
                self.breaks_at = None
                raise TimeoutError("the Hub did not answer")
            self.served.append(self._next)
            self._next += 1
            yield self.rows[self._next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


ROWS: list[dict[str, Any]] = [{"text": f"document {n} of the set, with some é in it\n" * 3, "id": n} for n in range(60)]


def shards(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]
