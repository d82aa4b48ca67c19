"""Writes tensors as safetensors files with an index: planned from their shapes, streamed one tensor at a time.

The library writes a file from a table of all its tensors, so a shard would lie in memory twice; the format is a header
and the numbers, so it is written here from a plan, and read by the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hinny.checkpoint.disk import write_synced
from hinny.checkpoint.formats.files import DTYPES, INDEX, SINGLE
from hinny.checkpoint.formats.foreign import Info

SHARD_BYTES = 2 * 2**30
"""Largest size of a file that is planned; a tensor larger than this has a file of its own."""

BLOCK = 2**24
"""Numbers that are checked or converted at a time, so that no large tensor is held a second time."""

ALIGNMENT = 64
"""The numbers begin at a multiple of this in the file, so that a mapped tensor is as well placed as one in memory."""

_SPELLING = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order in which they are written, and the header in front of them."""

    file: str
    infos: dict[str, Info]
    header: bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(n_bytes, self.infos.values()))


def n_bytes(info: Info) -> int:
    """Bytes of a tensor."""
    return torch.Size(info.shape).numel() * info.dtype.itemsize


def plan(infos: Mapping[str, Info], shard_bytes: int = SHARD_BYTES, *, single: bool = False) -> list[Shard]:
    """Files of at most `shard_bytes`, filled in the order of `infos`; `single`: one file alone is model.safetensors."""
    groups: list[dict[str, Info]] = []
    room = 0
    for name, info in infos.items():
        if not groups or n_bytes(info) > room:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = info
        room -= n_bytes(info)
    count = len(groups)
    names = [SINGLE] if single and count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors"
                                                   for i in range(1, count + 1)]
    # wide types first keeps every tensor at a multiple of its own size
    ordered = [dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)) for group in groups]
    return [Shard(name, group, _header(group)) for name, group in zip(names, ordered, strict=True)]


def write(folder: Path, shards: list[Shard], read: Callable[[str], Tensor],
          progress: Callable[[float], None] | None = None) -> dict[str, str]:
    """Write `shards`, and their index unless there is one plain file, into `folder`; returns the sha256 of each file.

    read: the tensor of that name, with the shape and type of the plan; asked for in the order of the shards. Every
    file is synced to the disk. progress: called with the share that is done. Raises OSError on a full disk.
    """
    total = sum(shard.tensor_bytes for shard in shards)
    done, sums = 0, {}
    for shard in shards:
        digest = hashlib.sha256()
        with open(folder / shard.file, "wb") as handle:
            for piece in _pieces(shard, read):
                handle.write(piece)
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(min(1.0, done / total))
            handle.flush()
            os.fsync(handle.fileno())
        sums[shard.file] = digest.hexdigest()
    if [shard.file for shard in shards] != [SINGLE]:
        sums[INDEX] = _write_index(folder / INDEX, shards, total)
    return sums


def _pieces(shard: Shard, read: Callable[[str], Tensor]) -> Iterator[memoryview | bytes]:
    yield shard.header
    for name, info in shard.infos.items():
        value = read(name)
        assert Info(tuple(value.shape), value.dtype) == info, (name, value.shape, value.dtype, info)
        for block in blocks(value):
            yield block.contiguous().view(torch.uint8).numpy().data


def blocks(value: Tensor) -> Iterator[Tensor]:
    """The numbers of `value` in order, one-dimensional and at most BLOCK at a time, without a copy of all of it."""
    if value.is_contiguous():
        yield from value.view(-1).split(BLOCK)
        return
    rows = max(1, BLOCK // max(1, value[0].numel()))
    for part in value.split(rows):
        yield part.reshape(-1)


def _header(infos: Mapping[str, Info]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, info in infos.items():
        table[name] = {"dtype": _SPELLING[info.dtype], "shape": list(info.shape),
                       "data_offsets": [place, place + n_bytes(info)]}
        place += n_bytes(info)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_index(file: Path, shards: list[Shard], total: int) -> str:
    places = {name: shard.file for shard in shards for name in shard.infos}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
    write_synced(file, text)
    return hashlib.sha256(text.encode()).hexdigest()
