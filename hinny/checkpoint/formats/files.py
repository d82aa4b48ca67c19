"""Folders as Hugging Face lays them out: safetensors files, with an index where there are several, and config.json.

Nothing of a safetensors file is code: a header of names, types and places, then the numbers. They are mapped, not read:
what is in memory is what is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hinny.checkpoint.formats.foreign import Info, Tensors
from hinny.errors import CheckpointError

T = TypeVar("T")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""How safetensors spells types; a file with another is refused."""

SHOWN = 8
"""Names of a list that an error shows."""


class SafetensorsFolder(Tensors):
    """All tensors of a folder's safetensors files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a file that is absent or damaged, and an index that is not that of the files."""
        self.folder = folder
        self._files = {name: _open(folder / name) for name in _shard_names(folder)}
        self._owner = self._owners()
        self._infos = {name: self._info(name) for name in self._owner}

    @property
    def infos(self) -> Mapping[str, Info]:
        return self._infos

    @property
    def paths(self) -> list[Path]:
        """The files that it reads from."""
        return [self.folder / name for name in self._files]

    def read(self, name: str) -> Tensor:
        return self._files[self._owner[name]].get_tensor(name)

    def largest_file(self) -> int:
        return max(path.stat().st_size for path in self.paths)

    def _owners(self) -> dict[str, str]:
        """Tensor → the file that holds it; the index, where there is one, must say the same."""
        found: dict[str, str] = {}
        for file, opened in self._files.items():
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if name in found:
                    raise CheckpointError(f"{self.folder}: {name} is in {found[name]} and again in {file}; a tensor "
                                          "lies in one file. Copy the checkpoint again.")
                found[name] = file
        if (self.folder / INDEX).is_file() and (told := weight_map(self.folder)) != found:
            odd = sorted(name for name in {*told, *found} if told.get(name) != found.get(name))
            raise CheckpointError(
                f"{self.folder / INDEX} is not the index of the files beside it: {listed(odd)}; for instance, "
                f"{odd[0]} is in {found.get(odd[0], 'no file')}, and the index says "
                f"{told.get(odd[0], 'nothing of it')}. Copy the checkpoint again.")
        return found

    def _info(self, name: str) -> Info:
        part = self._files[self._owner[name]].get_slice(name)
        kind = part.get_dtype()
        if kind not in DTYPES:
            raise CheckpointError(f"{self.folder / self._owner[name]}: {name} is of type {kind}; "
                                  f"known: {', '.join(DTYPES)}.")
        return Info(tuple(part.get_shape()), DTYPES[kind])


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file, as the index of `folder` says. Raises CheckpointError for a path that leaves the folder."""
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{folder / INDEX} has no weight_map, which says the file of each tensor; "
                              "copy the checkpoint again.")
    for name, file in table.items():
        if not isinstance(file, str) or not _inside(file):
            raise CheckpointError(f"{folder / INDEX}: the file of {name} is {file!r}; it must be the name of a file in "
                                  "this folder. Do not use this checkpoint: a path like this is no accident.")
    return table


def has_safetensors(folder: Path) -> bool:
    """Whether `folder` holds weights that SafetensorsFolder reads."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def read_json(file: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises CheckpointError if it is unreadable, not a table, or has a key twice."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(file, pairs))
    except OSError as fault:
        raise CheckpointError(f"{file} cannot be read: {fault.strerror}.") from None
    # a file nested without end exhausts the parser's stack
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{file} is not JSON: {fault}.") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{file} holds {type(table).__name__}, not a table of keys and values.")
    return table


class Fields:
    """The keys of config.json, asked for by name and type; errors name file, key, value and what is wanted."""

    def __init__(self, folder: Path, name: str = "config.json") -> None:
        self.file = folder / name
        self.table = read_json(self.file)

    def __contains__(self, key: str) -> bool:
        return self.table.get(key) is not None

    def need(self, key: str, kind: type[T]) -> T:
        """The value of `key`, which must be there and of type `kind`; a whole number may stand for a float."""
        value = self.table.get(key)
        if value is None:
            raise CheckpointError(f"{self.file} has no {key}, which must be {_KINDS[kind]}.")
        if kind is float and type(value) is int:
            value = float(value)
        # True is an int for isinstance
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{self.file}: {key} is {value!r}; it must be {_KINDS[kind]}.")
        return value

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The same, or `default` where the key is absent or null."""
        return self.need(key, kind) if key in self else default

    def must_be(self, key: str, *allowed: Any, absent: bool = True) -> None:
        """Refuse a value of `key` that is none of `allowed`; absent or null is allowed unless `absent` is False."""
        value = self.table.get(key)
        if not (value in allowed or (absent and value is None)):
            known = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{self.file}: {key} is {value!r}; hinny can only compute {known} exactly.")


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
                           list: "a list", dict: "a table"}


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer of `folder`: tokenizer.json, else tokenizer.model, else its one other SentencePiece file; empty if
    there is none, or it is not clear which."""
    if (file := folder / "tokenizer.json").is_file():
        return (file,)
    if (file := folder / "tokenizer.model").is_file():
        return (file,)
    models = sorted(folder.glob("*.model"))
    return tuple(models) if len(models) == 1 else ()


def listed(names: Iterable[str], shown: int = SHOWN) -> str:
    """`names` for an error: the first few, and how many there are."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"{len(names):,} name{'s' if len(names) != 1 else ''}: {', '.join(names[:shown])}{more}"


def _shard_names(folder: Path) -> list[str]:
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if not single and not index:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}.")
    if not index:
        return [SINGLE]
    names = sorted(set(weight_map(folder).values()))
    if single and SINGLE not in names:
        raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}, which names other files; move away the one "
                              "that is not meant.")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {len(absent)} of the {len(names)} files that {INDEX} names: "
                              f"{listed(absent)}. Copy them too.")
    return names


def _inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set("\\\0") & set(file)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{file} is no whole safetensors file: {fault}. Copy it again.") from None


def _once(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise CheckpointError(f"{file} has the key {twice!r} twice; only one can be meant.")
    return table
