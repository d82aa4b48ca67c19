"""Which source (a book, a repository, a package) each document of a data folder is from, where that was kept.

sources.json has the names, and SPLIT.sources.npy the number of each document's name, (documents,) uint32.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from hinny.data.work import put
from hinny.errors import DataError

NAMES = "sources.json"


class Names:
    """Numbers for names, in the order in which they are first met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The name's number, a new one if it has none."""
        return self._numbers.setdefault(name, len(self._numbers))

    def numbers(self, names: list[str], used: np.ndarray) -> np.ndarray:
        """Numbers in `names` → our numbers of the same names, (documents,) uint32; names get one when they are used."""
        found = np.zeros(len(used), np.uint32)
        if len(used):
            kinds, firsts, places = np.unique(used, return_index=True, return_inverse=True)
            ours = np.zeros(len(kinds), np.uint32)
            for kind in np.argsort(firsts):
                ours[kind] = self.number(names[kinds[kind]])
            found = ours[places.reshape(-1)]
        return found

    @property
    def listed(self) -> list[str]:
        """All names, by number."""
        return list(self._numbers)


def write_names(folder: Path, names: list[str]) -> None:
    """The names' file of a data folder."""
    put(folder, NAMES, lambda file: file.write(f"{json.dumps(names, ensure_ascii=False, indent=0)}\n".encode()))


def write_numbers(folder: Path, split: str, numbers: np.ndarray) -> None:
    """The file that has a number for each document of a split."""
    made = io.BytesIO()
    np.save(made, numbers.astype("<u4"))
    put(folder, _file(split), lambda file: file.write(made.getbuffer()))


def read_numbers(folder: Path, split: str, documents: int) -> np.ndarray:
    """(documents,) uint32; DataError where the files are missing, damaged or of other documents."""
    path = folder / _file(split)
    try:
        names = json.loads((folder / NAMES).read_bytes())
        numbers = np.load(path, allow_pickle=False)
    except OSError as fault:
        raise DataError(f"{fault.filename or path}: cannot be read: {fault.strerror}. Prepare the folder "
                        "again.") from None
    except (ValueError, EOFError) as fault:
        raise DataError(f"{path}: damaged: {fault}. Prepare the folder again.") from None
    if numbers.shape != (documents,) or (documents and int(numbers.max()) >= len(names)):
        raise DataError(f"{path}: sources of {len(numbers)} documents, {len(names)} names, but the split has "
                        f"{documents} documents; the file is of other data. Prepare the folder again.")
    return numbers


def _file(split: str) -> str:
    return f"{split}.sources.npy"
