"""Megatron's distributed checkpoints: what torch.distributed.checkpoint writes, read without running a pickle.

    iter_0000100/    .metadata        which tensor lies where: a pickle, read here into plain records
                     *.distcp         the tensors
                     common.pt        args and counters, a file of torch.save
                     metadata.json    the kind of checkpoint

Tensors are whole here, whatever the ranks that wrote them. A GPT's layers are stored as one tensor with an axis for the
layers: it is given as its slices.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hinny.checkpoint.formats import pickles
from hinny.checkpoint.formats.archive import first_line
from hinny.checkpoint.formats.files import listed, read_json
from hinny.checkpoint.formats.foreign import Info, Tensors
from hinny.checkpoint.formats.megatron_args import Args, shown
from hinny.checkpoint.formats.megatron_names import LAYER
from hinny.errors import CheckpointError

LARGEST_METADATA = 256 * 2**20
"""Bytes of .metadata. That of an 8B model with its optimiser on hundreds of ranks has some tens of MiB."""

STACKED_LAYERS = "decoder.layers."

IGNORED = re.compile(r"(?P<extra>.*_extra_state)|(?P<optimizer>(?:chained_\d+\.)?optimizer\.)|"
                     r"(?P<run>rng_state|rerun_state)")
"""Keys that are no weights: the names of the groups say of what."""

RECORDS = {
    **{f"torch.distributed.checkpoint.metadata.{name}": name for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")},
    "torch.distributed.checkpoint.filesystem._StorageInfo": "_StorageInfo",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": "Metadata",
    "torch.serialization._get_layout": "layout", "pathlib.PosixPath": "path", "pathlib._local.PosixPath": "path",
    "pathlib.Path": "path",
}
"""What .metadata may name → the kind of record that stands in its place; nothing named is imported or called."""

VALUES: dict[str, Any] = {"torch.Size": tuple, "builtins.set": set, "collections.OrderedDict": dict,
                          **{f"torch.{name}": getattr(torch, name) for name in pickles.DTYPES}}


class Stand:
    """Stands for an object in .metadata: what was set on it, as data."""

    state: Any

    def __new__(cls, *_arguments: object) -> Stand:
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *_arguments: object) -> None:
        """A call's arguments are dropped: they say nothing of where tensors lie."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """The value of a field; None where it is absent."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Reader(pickle._Unpickler):
    """An unpickler that makes stand-ins. The one written in Python: the other sets memory aside as the file asks."""

    def __init__(self, content: bytes, file: Path) -> None:
        super().__init__(io.BytesIO(content))
        self.file = file
        # classes of this reading alone: whatever a pickle sets on them ends with it
        self.stands = {kind: type(kind, (Stand,), {}) for kind in {*RECORDS.values()}}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in VALUES:
            return VALUES[full]
        if full not in RECORDS:
            raise CheckpointError(f"{self.file} wants to load {full}, which is more than the places of tensors. "
                                  "Nothing of it was run. Where you trust it, save it again with what made it, in "
                                  "torch files (--ckpt-format torch).")
        return self.stands[RECORDS[full]]


class Chunk(NamedTuple):
    """A rectangle of a tensor, and where it is stored: a file of torch.save inside a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class Stored(NamedTuple):
    """A tensor; its chunks cover it, each number once."""

    info: Info
    chunks: list[Chunk]


class Place(NamedTuple):
    """Where a tensor is stored: the key, and for one layer of a stack its number."""

    key: str
    layer: int | None


class Distributed(Tensors):
    """All model tensors of a distributed checkpoint, by the names of whole layers."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for files that are missing, damaged or of another kind, and that want to run code."""
        _check_kind(folder)
        self.folder = folder
        file = folder / "common.pt"
        common = pickles.load(file)
        args = common.get("args") if isinstance(common, dict) else None
        if not isinstance(args, pickles.Record):
            raise CheckpointError(f"{file}: `args` is {shown(args)}, not the options that the model was trained with. "
                                  "Without them its activation, norms and positions cannot be known.")
        self.args = Args(args.fields, str(file))
        self.iteration = common.get("iteration")
        self.stored, others = read_metadata(folder)
        self.ignored = {key: str(found.lastgroup) for key in others if (found := IGNORED.match(key))}
        if odd := sorted(set(others) - self.ignored.keys()):
            raise CheckpointError(f"{folder}: beside tensors it stores {listed(odd)}, whose use is not known.")
        self._places = {name: place for key in self.stored for name, place in self._names(key)}

    @property
    def infos(self) -> Mapping[str, Info]:
        return {name: self._info(place) for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        key, layer = self._places[name]
        stored = self.stored[key]
        whole = torch.empty(self._info(self._places[name]).shape, dtype=stored.info.dtype)
        # a stack keeps its first axis, of the one layer that is wanted
        whole = whole if layer is None else whole[None]
        for offsets, sizes, file, start, length in stored.chunks:
            skip = 0 if layer is None else layer - offsets[0]
            if layer is not None and not 0 <= skip < sizes[0]:
                continue
            piece = pickles.load_piece(file, start, length)
            if not isinstance(piece, Tensor) or (tuple(piece.shape), piece.dtype) != (sizes, stored.info.dtype):
                raise CheckpointError(f"{file}: what is stored for {key} at {list(offsets)} is not the part of shape "
                                      f"{list(sizes)} that .metadata says. Copy the folder again.")
            piece = pickles.check_dense(piece, key, file)
            if layer is not None:
                piece, offsets, sizes = piece[skip:skip + 1], (0, *offsets[1:]), (1, *sizes[1:])
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = piece
        return whole if layer is None else whole[0]

    def largest_file(self) -> int:
        return max(file.stat().st_size for file in self.folder.glob("*.distcp"))

    def _info(self, place: Place) -> Info:
        info = self.stored[place.key].info
        return info if place.layer is None else Info(info.shape[1:], info.dtype)

    def _names(self, key: str) -> Iterator[tuple[str, Place]]:
        if not key.startswith(STACKED_LAYERS) or LAYER.match(key):
            yield key, Place(key, None)
            return
        shape, rest = self.stored[key].info.shape, key.removeprefix(STACKED_LAYERS)
        for layer in range(shape[0] if shape else 0):
            yield f"{STACKED_LAYERS}{layer}.{rest}", Place(key, layer)


def is_distributed(folder: Path) -> bool:
    """Whether `folder` is an iteration in torch.distributed.checkpoint's layout."""
    return (folder / ".metadata").is_file()


def read_metadata(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """The weights that .metadata describes, by key, and the keys of all else."""
    file = folder / ".metadata"
    try:
        if (size := file.stat().st_size) > LARGEST_METADATA:
            raise CheckpointError(f"{file} has {size:,} bytes; at most {LARGEST_METADATA:,} are read.")
        tree = _Reader(file.read_bytes(), file).load()
        places = {(index.field("fqn"), tuple(index.field("offset") or ())): info
                  for index, info in tree.field("storage_data").items()}
        weights, others = {}, []
        for key, stand in tree.field("state_dict_metadata").items():
            if type(stand).__name__ == "TensorStorageMetadata" and not IGNORED.match(key):
                weights[key] = _stored(folder, key, stand, places)
            else:
                others.append(key)
        if odd := sorted({key for key, value in (tree.field("mcore_data") or {}).items() if value} & weights.keys()):
            raise CheckpointError(f"{file}: stored flattened, which is not read: {listed(odd)}. Save it again with a "
                                  "later Megatron, or in torch files (--ckpt-format torch).")
        return weights, others
    except OSError as fault:
        raise CheckpointError(f"{file} cannot be read: {fault.strerror}.") from None
    except CheckpointError:
        raise
    # a malformed pickle raises whatever its wrong arguments raise
    except Exception as fault:
        raise CheckpointError(f"{file} is damaged, or made to harm: {first_line(fault)}. Copy it again.") from None


def _stored(folder: Path, key: str, stand: Stand, places: Mapping[tuple[str, tuple[int, ...]], Stand]) -> Stored:
    shape = tuple(int(n) for n in stand.field("size"))
    # the first of five: type, layout, gradient, memory format, pinning
    dtype = stand.field("properties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no type")
    chunks = []
    for chunk in stand.field("chunks"):
        offsets, sizes = (tuple(int(n) for n in chunk.field(name)) for name in ("offsets", "sizes"))
        chunks.append(Chunk(offsets, sizes, *_place(folder, places[key, offsets])))
    _check_cover(key, shape, chunks)
    return Stored(Info(shape, dtype), chunks)


def _check_cover(key: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Chunks that lie in the tensor, do not meet and are as many numbers as it are the tensor."""
    def meet(a: Chunk, b: Chunk) -> bool:
        return all(max(x, y) < min(x + n, y + m)
                   for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))

    inside = all(o >= 0 and n >= 0 and o + n <= size for chunk in chunks
                 for o, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True))
    if (not inside or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape)
            or any(meet(a, b) for a, b in itertools.combinations(chunks, 2))):
        raise ValueError(f"the parts of {key} do not make up its shape {list(shape)}")


def _place(folder: Path, info: Stand) -> tuple[Path, int, int]:
    name, start, length = (info.field(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or set("/\\:\0") & set(name) or not (folder / name).is_file():
        raise CheckpointError(f"{folder / '.metadata'} names the file {shown(name)}, which is not a file of this "
                              "folder. Copy the whole folder.")
    if not 0 <= start <= start + length <= (folder / name).stat().st_size:
        raise CheckpointError(f"{folder / name} is shorter than .metadata says. Copy it again.")
    if info.field("transform_descriptors"):
        raise CheckpointError(f"{folder / name} is stored transformed, compressed for one; only plain files are read. "
                              "Save it again without.")
    return folder / name, start, length


def _check_kind(folder: Path) -> None:
    if not (folder / "common.pt").is_file():
        raise CheckpointError(f"{folder} has .metadata but no common.pt: it is not of Megatron's kind torch_dist. Save "
                              "it again with --ckpt-format torch_dist or torch.")
    if (file := folder / "metadata.json").is_file():
        kind = read_json(file).get("sharded_backend")
        if kind != "torch_dist":
            raise CheckpointError(f"{file}: sharded_backend is {shown(kind)}; read is 'torch_dist'. Save it again with "
                                  "--ckpt-format torch_dist or torch.")
