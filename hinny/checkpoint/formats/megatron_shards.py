"""The files of a Megatron checkpoint, one a rank, as one set of tensors.

    latest_checkpointed_iteration.txt         "release" or a number
    release/  or  iter_0000100/
        mp_rank_00/model_optim_rng.pt         tensor rank; mp_rank_00_001 with pipeline stages: tensor, pipeline rank

Stages follow each other: a stage counts its layers from 0. Tensor ranks have parts that are merged when they are read,
one tensor at a time. Nothing but the directories of the files is in memory before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hinny.checkpoint.formats import pickles
from hinny.checkpoint.formats.files import listed
from hinny.checkpoint.formats.foreign import Info, Tensors
from hinny.checkpoint.formats.megatron_args import Args, shown
from hinny.checkpoint.formats.megatron_names import EXTRA_STATE, LAYER
from hinny.checkpoint.formats.table import Along, Cut, Row
from hinny.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")


def iteration_folder(source: Path) -> Path:
    """The folder of the newest iteration, as the tracker file says, or `source` where it is such a folder itself."""
    if (tracker := source / TRACKER).is_file():
        # more than a number or a word is none of Megatron's
        with open(tracker, "rb") as handle:
            told = handle.read(64).decode(errors="replace").strip()
        if not told.isascii() or not (told.isdigit() or told == "release"):
            raise CheckpointError(f"{tracker} says {told!r}; it must be 'release' or the number of an iteration.")
        folder = source / (told if told == "release" else f"iter_{int(told):07d}")
        if not folder.is_dir():
            there = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
            raise CheckpointError(f"{tracker} says {told!r}, but there is no folder {folder.name} beside it; there "
                                  f"are {listed(there)}. Copy the whole checkpoint, or give the folder itself.")
        return folder
    return source


def rank_files(folder: Path) -> list[list[Path]]:
    """The files in `folder` by pipeline and tensor rank. Raises CheckpointError where one is missing."""
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        if rank := RANK.fullmatch(entry.name):
            if rank[3]:
                raise CheckpointError(f"{entry}: folders of three ranks are those of expert parallelism; hinny has no "
                                      "experts.")
            found[int(rank[2] or 0), int(rank[1])] = entry / FILE
    if not found:
        raise CheckpointError(f"{folder} has no folders mp_rank_00 and so on; it holds "
                              f"{listed(sorted(entry.name for entry in folder.iterdir()))}.")
    stages, ranks = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    missing = [f"tensor rank {rank} of pipeline stage {stage}" for stage in range(stages) for rank in range(ranks)
               if (stage, rank) not in found or not found[stage, rank].is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks the {FILE} of {listed(missing)}. Copy those too.")
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


@dataclass
class Part:
    """What one rank holds of one pipeline stage, or of one of several pieces that a rank has of the pipeline."""

    file: Path
    tensors: dict[str, Tensor]


@dataclass
class Shards(Tensors):
    """All tensors of a checkpoint by their name in the whole model; ranks' parts are merged as `merging` says."""

    files: list[list[Path]]
    args: Args
    iteration: object
    parts: dict[str, list[Part]] = field(default_factory=dict)
    """Name in the whole model → its part on each tensor rank, as `local` calls it there."""
    local: dict[str, str] = field(default_factory=dict)
    extra_states: list[str] = field(default_factory=list)
    cuts: dict[str, Cut] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return len(self.files[0])

    def stored(self, name: str) -> list[Tensor]:
        """The parts of one tensor, by rank."""
        return [part.tensors[self.local[name]] for part in self.parts[name]]

    def merging(self, rows: list[Row], twins: Mapping[str, str]) -> None:
        """Merge as `rows` say from now on; a name in `twins` is a copy of another tensor, found equal and left out."""
        for copy, original in twins.items():
            if not all(map(torch.equal, self.stored(copy), self.stored(original))):
                raise CheckpointError(f"{self.parts[copy][0].file}: {copy} must repeat {original}, to which it is "
                                      "tied, and does not. The files are not of one checkpoint.")
            del self.parts[copy]
        self.cuts = {row.theirs: row.cut for row in rows}

    @property
    def infos(self) -> Mapping[str, Info]:
        """Shapes are those of the first rank's parts until `merging` says how they grow."""
        return {name: self._info(name) for name in self.parts}

    def read(self, name: str) -> Tensor:
        stored = self.stored(name)
        if name not in self.cuts:
            return stored[0]
        try:
            return self.cuts[name].merge(stored)
        except ValueError as fault:
            raise CheckpointError(f"{self.parts[name][0].file.parent.parent}: {name}: {fault}. The files are not of "
                                  "one checkpoint.") from None

    def largest_file(self) -> int:
        return max(file.stat().st_size for stage in self.files for file in stage)

    def _info(self, name: str) -> Info:
        first = self.stored(name)[0]
        shape, cut = list(first.shape), self.cuts.get(name)
        if isinstance(cut, Along) and len(shape) > cut.axis:
            shape[cut.axis] *= self.ranks
        return Info(tuple(shape), first.dtype)


def open_shards(folder: Path) -> Shards:
    """All files in the folder of one iteration. Raises CheckpointError for files that do not belong together."""
    files = rank_files(folder)
    trees = [[_load(file) for file in stage] for stage in files]
    first = trees[0][0]
    args = Args(_fields(first, files[0][0]), str(files[0][0]))
    args.agree("expert_model_parallel_size", 1, "hinny, which has no experts,")
    shards = Shards(files, args, first.get("iteration"))
    offset = 0
    for tables in _tables(trees, files):
        parts = [Part(file, _weights(table, file, shards)) for table, file in tables]
        _check_alike(parts)
        layers = 0
        for name in parts[0].tensors:
            match = LAYER.match(name)
            whole = f"{match[1]}{int(match[2]) + offset}.{match[3]}" if match else name
            layers = max(layers, int(match[2]) + 1) if match else layers
            if whole in shards.parts:
                raise CheckpointError(f"{parts[0].file}: {whole} is also in {shards.parts[whole][0].file}; a tensor "
                                      "lies in one pipeline stage.")
            shards.parts[whole], shards.local[whole] = parts, name
        offset += layers
    _check_ranks(shards, offset)
    return shards


def _load(file: Path) -> dict[str, Any]:
    tree = pickles.load(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} holds a {type(tree).__name__}, not a table as Megatron writes it.")
    version = tree.get("checkpoint_version")
    if not isinstance(version, int | float) or version < 2.0:
        raise CheckpointError(f"{file}: checkpoint_version is {shown(version)}; read are 2.0 and 3.0. Before 2.0 the "
                              "rows of query, key and value had another order. Save it again with a later Megatron.")
    return tree


def _fields(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    args = tree.get("args")
    if not isinstance(args, pickles.Record):
        raise CheckpointError(f"{file}: `args` is {shown(args)}, not the options that the model was trained with. "
                              "Without them its activation, norms and positions cannot be known.")
    return args.fields


def _tables(trees: list[list[dict[str, Any]]], files: list[list[Path]]) -> Iterator[list[tuple[object, Path]]]:
    """The tables of weights of all tensor ranks, piece by piece of the pipeline in the order of the layers.

    With several pieces a rank, model0, model1 …, the first piece of every stage comes before the second of any.
    """
    keys = sorted((key for key in trees[0][0] if re.fullmatch(r"model\d*", str(key))), key=lambda key: (len(key), key))
    if keys not in (["model"], [f"model{i}" for i in range(max(len(keys), 1))]):
        raise CheckpointError(f"{files[0][0]} has no table `model`; it holds {listed(map(str, trees[0][0]))}.")
    for key in keys:
        for stage, paths in zip(trees, files, strict=True):
            for tree, file in zip(stage, paths, strict=True):
                if key not in tree:
                    raise CheckpointError(f"{file} has no table `{key}`, which {files[0][0]} has; the files are not of "
                                          "one checkpoint.")
            yield [(tree[key], file) for tree, file in zip(stage, paths, strict=True)]


def _check_ranks(shards: Shards, layers: int) -> None:
    """As many ranks as args says; or others, where a size shows that none is missing: files are merged and cut again by
    tools that leave args as they were."""
    rows = sum(shards.stored(name)[0].shape[0] for name in shards.parts if name.endswith("word_embeddings.weight"))
    for key, found, size, whole in (
            ("tensor_model_parallel_size", shards.ranks, "padded_vocab_size", rows * shards.ranks),
            ("pipeline_model_parallel_size", len(shards.files), "num_layers", layers)):
        if shards.args.fields.get(size) != whole:
            shards.args.agree(key, found, "the number of files")
        elif shards.args.has(key) and shards.args.fields[key] != found:
            told = shown(shards.args.fields[key])
            shards.args.facts[f"args.{key}"] = f"{told}, of the time before its files were merged"


def _weights(table: object, file: Path, shards: Shards) -> dict[str, Tensor]:
    """The tensors of a table; states that are no weights are noted in `shards` and left out."""
    tensors, others = pickles.flatten(table, file)
    extra = [name for name in (*tensors, *others) if name.endswith(EXTRA_STATE)]
    if odd := sorted(others.keys() - set(extra)):
        raise CheckpointError(f"{file}: among the weights is what is no tensor: {listed(odd)}.")
    shards.extra_states += [f"{file.parent.name}: {name}" for name in extra]
    return {name: v for name, v in tensors.items() if name not in extra}


def _check_alike(parts: list[Part]) -> None:
    """Tensor ranks have the same names, shapes and types."""
    for part in parts[1:]:
        if odd := sorted(part.tensors.keys() ^ parts[0].tensors.keys()):
            raise CheckpointError(f"{part.file} and {parts[0].file}: only one of them has {listed(odd)}. The files are "
                                  "not of one checkpoint.")
        for name, v in part.tensors.items():
            first = parts[0].tensors[name]
            if v.shape != first.shape or v.dtype != first.dtype:
                raise CheckpointError(f"{part.file}: {name} is {v.dtype} of shape {list(v.shape)}, and on tensor rank "
                                      f"0 {first.dtype} of shape {list(first.shape)}. The files are not of one "
                                      "checkpoint.")

