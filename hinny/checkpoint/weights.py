"""Weights without an optimiser, as a checkpoint of a run: what a conversion writes.

    checkpoints/step-00000000/    model-00001-of-0000N.safetensors, model.safetensors.index.json, and
                    meta.json     as beside a training's checkpoint, and `source`: what was converted

Each tensor keeps the type that it had. `stored` reads these and the checkpoints of a training alike, name by name.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from hinny.checkpoint import sharded
from hinny.checkpoint.disk import PARTIAL, sync, write_synced
from hinny.checkpoint.formats.files import INDEX, SafetensorsFolder
from hinny.checkpoint.formats.foreign import Info, Tensors
from hinny.errors import CheckpointError
from hinny.run import Run

FOLDER = "step-00000000"

Read = Callable[[str], Tensor]


def save(run: Run, infos: Mapping[str, Info], read: Read, meta: Mapping[str, Any], *,
         shard_bytes: int = sharded.SHARD_BYTES, progress: Callable[[float], None] | None = None) -> Path:
    """Write the weights `infos`, each given by `read`, as the run's checkpoint of step 0; returns its folder.

    Files are planned from the shapes and one tensor at a time is in memory. Whole or absent, as in `store.save`.
    Raises CheckpointError if it cannot be written; what `read` raises passes through. Nothing stays then.
    """
    final = run.checkpoints / FOLDER
    partial = final.with_name(PARTIAL + final.name)
    try:
        partial.mkdir(parents=True)
        sums = sharded.write(partial, sharded.plan(infos, shard_bytes), read, progress)
        record = {"step": 0, "files": sums, "tokens": 0, "seconds": 0.0, **meta}
        write_synced(partial / "meta.json", json.dumps(record, indent=1) + "\n")
        sync(partial)
        partial.rename(final)
        sync(run.checkpoints)
    except OSError as fault:
        raise CheckpointError(f"the weights could not be written to {run.checkpoints}: {fault.strerror or fault}. "
                              "Make room or give write permission, then run the same command again.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def are_in(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is of this kind, and not of a training."""
    return (folder / INDEX).is_file()


def stored(folder: Path) -> Tensors:
    """The model's weights in a checkpoint's folder, of either kind, read one at a time."""
    return SafetensorsFolder(folder) if are_in(folder) else _Trained(folder)


def fill(weights: Mapping[str, Any], folder: Path) -> None:
    """Copy the weights in `folder` into those of a model, which keep their types. Names are already checked.

    Of a tensor that is cut over ranks, only this rank's part is read. Raises CheckpointError for a tensor of another
    shape.
    """
    source = stored(folder)
    with torch.no_grad():
        for name, value in weights.items():
            _check_shape(folder, name, source.infos[name], value)
            whole = source.read(name)
            if isinstance(value, DTensor):
                (part,) = value.__create_chunk_list__()
                place = tuple(slice(start, start + size)
                              for start, size in zip(part.offsets, part.sizes, strict=True))
                value.to_local().copy_(whole[place])
            else:
                value.copy_(whole)


def adopt(model: nn.Module, folder: Path, device: str | torch.device) -> None:
    """Give `model`, which may be on the meta device, the weights in `folder` in the types that they are stored in.

    On the CPU they stay in the mapped files of a conversion until they are used; so the files must stay as they are.
    """
    weights = stored(folder)
    values = {}
    for name, value in model.state_dict().items():
        _check_shape(folder, name, weights.infos[name], value)
        values[name] = weights.read(name).to(device)
    model.load_state_dict(values, assign=True)


def _check_shape(folder: Path, name: str, info: Info, value: Tensor) -> None:
    if info.shape != tuple(value.shape):
        raise CheckpointError(f"{folder} could not be loaded: the size of {name} is {info.shape}, and the model's is "
                              f"{tuple(value.shape)}.")


class _Trained(Tensors):
    """The model's part of a checkpoint that torch.distributed.checkpoint wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        self._infos = {key.removeprefix("model."): Info(tuple(entry.size), entry.properties.dtype)
                       for key, entry in table.items()
                       if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)}

    @property
    def infos(self) -> Mapping[str, Info]:
        return self._infos

    def read(self, name: str) -> Tensor:
        info = self._infos[name]
        value = torch.empty(info.shape, dtype=info.dtype)
        with one_process():
            dcp.load({"model": {name: value}}, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
        return value

    def largest_file(self) -> int:
        return max(file.stat().st_size for file in self.folder.glob("*.distcp"))


@contextmanager
def one_process() -> Iterator[None]:
    """DCP warns that there is no process group: that is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
