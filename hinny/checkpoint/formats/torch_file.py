"""Writes files of torch.save one tensor at a time.

torch.save wants all tensors of a file at once. Its file is a zip archive of plain members: one a storage, and
data.pkl, a pickle that says which tensor shows which storage. So tensors are written as they come, the pickle last.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hinny.checkpoint.formats.foreign import Info
from hinny.checkpoint.sharded import ALIGNMENT, blocks

STORAGES = {torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
            torch.bfloat16: torch.BFloat16Storage}

ROOT = "archive"

HEADER = 30 + 20
"""Bytes of a member's header but for its name and padding: the fixed part, and that of sizes beyond 4 GB."""


class Written:
    """Stands, in what the pickle holds, for a tensor that is in the file already."""

    def __init__(self, key: str, info: Info) -> None:
        self.key, self.info = key, info

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.info.shape, device="meta").stride()
        # the last two: no gradient, no hooks
        return torch._utils._rebuild_tensor_v2, (_Storage(self), 0, self.info.shape, stride, False, OrderedDict())


class TorchFile:
    """A file that is being written, in a `with` block; it holds nothing before `finish`. Raises OSError."""

    def __init__(self, file: Path) -> None:
        self._handle = open(file, "wb")  # noqa: SIM115 (closed by __exit__)
        self._archive = zipfile.ZipFile(self._handle, "w")
        self._count = 0

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        try:
            # after `finish` this does nothing; before it there is nothing to keep
            with suppress(OSError):
                self._archive.close()
        finally:
            self._handle.close()

    def add(self, value: Tensor) -> Written:
        """Write a tensor of floating-point numbers; what is returned stands for it in `finish`, once or more often."""
        key = str(self._count)
        self._count += 1
        member = zipfile.ZipInfo(f"{ROOT}/data/{key}")
        # as torch places it: mapped numbers must be aligned
        padding = -(self._handle.tell() + HEADER + len(member.filename) + 4) % ALIGNMENT
        member.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._archive.open(member, "w", force_zip64=True) as place:
            for block in blocks(value):
                place.write(block.contiguous().view(torch.uint8).numpy().data)
        return Written(key, Info(tuple(value.shape), value.dtype))

    def finish(self, tree: object) -> None:
        """Write the containers around the tensors, and wait until the file is on the disk."""
        content = io.BytesIO()
        _Pickler(content, protocol=2).dump(tree)
        for name, text in (("data.pkl", content.getvalue()), ("byteorder", sys.byteorder.encode()),
                           ("version", b"3\n")):
            self._archive.writestr(zipfile.ZipInfo(f"{ROOT}/{name}"), text)
        self._archive.close()
        self._handle.flush()
        os.fsync(self._handle.fileno())


class _Storage:
    def __init__(self, tensor: Written) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        info = obj.tensor.info
        return "storage", STORAGES[info.dtype], obj.tensor.key, "cpu", torch.Size(info.shape).numel()
