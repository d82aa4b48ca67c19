"""Megatron's distributed checkpoints come in bit for bit, and their pickle is never run."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron_files import Sizes, layer_of, options, pad, table, weights
from test_megatron_in import HYBRID, assert_same, read
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hinny.checkpoint.formats import megatron
from hinny.errors import CheckpointError

GATED = Sizes(gated=True, vocab=384)


def hybrid_keys(made, sizes, pattern=HYBRID):
    """What a hybrid stores: whole tensors, the mixer's by component."""
    out = table(pattern, made, sizes, "2024-07", 0, 1, layers=(0, len(pattern)))
    for i in [i for i, symbol in enumerate(pattern) if symbol == "M"]:
        theirs, ours = f"decoder.layers.{i}.mixer.", f"layers.{i}.layer."
        for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
            del out[theirs + name]
        out |= {f"{theirs}in_proj.weight.{p}": made[f"{ours}in_proj.{p}.weight"] for p in ("z", "x", "B", "C", "dt")}
        out |= {f"{theirs}conv1d.weight.{p}": made[f"{ours}conv.{p}.weight"].unsqueeze(1) for p in "xBC"}
        out |= {f"{theirs}conv1d.bias.{p}": made[f"{ours}conv.{p}.bias"] for p in "xBC"}
    return out


def gpt_keys(made, sizes, blocks):
    """What a GPT stores: one tensor for all layers, with an axis for them."""
    out = {"embedding.word_embeddings.weight": pad(made["embedding.weight"], 384),
           "output_layer.weight": pad(made["head.weight"], 384)}
    out["decoder.final_layernorm.weight"] = made["norm.weight"]
    layers = [{**layer_of(2 * i, "*", made, sizes, "engine", 0, 1),
               **layer_of(2 * i + 1, "-", made, sizes, "engine", 0, 1)} for i in range(blocks)]
    return out | {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def common(folder, args, kind="torch_dist"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": kind, "sharded_backend_version": 1}))
    return folder


def cut(v, times):
    """Rectangles of a tensor: each axis in as many parts as it is told, (offsets, part)."""
    parts = [list(zip(itertools.accumulate([0, *(len(c) for c in torch.arange(n).chunk(t))]),
                      (len(c) for c in torch.arange(n).chunk(t)), strict=False))
             for n, t in zip(v.shape, times, strict=True)]
    for rectangle in itertools.product(*parts):
        yield tuple(o for o, _ in rectangle), v[tuple(slice(o, o + n) for o, n in rectangle)].clone()


def write(folder, tensors, times=lambda name, v: (1,) * v.dim(), others=(), damage=lambda metadata: None):
    """.metadata and the files of two ranks, as torch.distributed.checkpoint writes them."""
    files, entries, places = [io.BytesIO(), io.BytesIO()], {}, {}
    turn = itertools.cycle(range(2))
    for name, v in tensors.items():
        chunks = []
        for index, (offsets, part) in enumerate(cut(v, times(name, v))):
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            rank = next(turn)
            start = files[rank].tell()
            torch.save(part, files[rank])
            places[MetadataIndex(name, offsets, index)] = _StorageInfo(f"__{rank}_0.distcp", start,
                                                                       files[rank].tell() - start)
            files[rank].seek(0, io.SEEK_END)
        entries[name] = TensorStorageMetadata(TensorProperties.create_from_tensor(v), v.shape, chunks)
    entries |= {name: BytesStorageMetadata() for name in others}
    metadata = Metadata(state_dict_metadata=entries, storage_data=places)
    damage(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_itself_writes_comes_in(tmp_path):
    sizes = Sizes()
    made = weights(HYBRID, sizes)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "tokenizer.json").write_text('{"kind": "bytes"}\n')
    folder = common(tmp_path / "iter_0000007", options(HYBRID, sizes, "2026-06", 4, 2, padded_vocab_size=384))
    dcp.save(hybrid_keys(made, sizes), storage_writer=dcp.FileSystemWriter(folder, overwrite=False), no_dist=True)
    assert megatron.recognises(tmp_path)
    foreign, found = read(tmp_path)
    assert_same(found, made)
    assert foreign.model.vocab_size == 257
    assert foreign.model.mamba2.n_groups == 8
    assert foreign.tensors.largest_file() == max(file.stat().st_size for file in folder.glob("*.distcp"))


def test_tensors_in_pieces_are_put_together(tmp_path):
    sizes = Sizes(vocab=384)
    made = weights(HYBRID, sizes)
    folder = common(tmp_path, options(HYBRID, sizes, "2026-06"))
    keys = hybrid_keys(made, sizes)
    extra = {"optimizer.state.exp_avg.decoder.layers.0.mixer.D": torch.ones(8)}
    write(folder, keys | extra, lambda name, v: (2, 3)[:v.dim()] if v.dim() < 3 else (4, 1, 1),
          ["decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1", "rng_state/shard_0_1"])
    foreign, found = read(folder)
    assert_same(found, made)
    assert foreign.facts["extra states dropped"] == "1"
    assert foreign.facts["not read"] == "1 of the optimiser, 1 of random numbers"


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_stack_of_a_gpt_is_given_layer_by_layer(tmp_path, layers):
    """Chunks of one, some or all layers: only those of the layer that is asked for count."""
    made = weights("*-*-*-", GATED)
    folder = common(tmp_path, options("*-*-*-", GATED, "engine"))
    write(folder, gpt_keys(made, GATED, 3),
          lambda name, v: (4 - layers, 2, *(1,) * v.dim())[:v.dim()] if "layers" in name else (1,) * v.dim())
    foreign, found = read(folder)
    assert_same(found, made)
    assert foreign.model.mlp.activation == "swiglu"


class Harm:
    """Pickles as a call."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def broken(tmp_path, damage, **options_):
    sizes = Sizes(vocab=384)
    folder = common(tmp_path, options("M", sizes, "2026-06"))
    return write(folder, hybrid_keys(weights("M", sizes), sizes, "M"), damage=damage, **options_)


def edit(what, **fields):
    """Change fields of the first chunk's place, or of the first tensor."""
    def damage(metadata):
        part = next(iter(getattr(metadata, what).values()))
        vars(part).update(fields)
    return damage


def harm(metadata):
    metadata.planner_data = Harm()


def overlap(metadata):
    entry = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([192, 16]))] * 2
    place = metadata.storage_data[MetadataIndex("embedding.word_embeddings.weight", (0, 0))]
    metadata.storage_data[MetadataIndex("embedding.word_embeddings.weight", (0, 0), 0)] = place


@pytest.mark.parametrize(("damage", "says"), [
    (harm, r"wants to load posix.system, .*Nothing of it was run"),
    (edit("storage_data", relative_path="../elsewhere"), "names the file '../elsewhere', which is not a file of this"),
    (edit("storage_data", relative_path="/etc/passwd"), "names the file '/etc/passwd', which is not a file of this"),
    (edit("storage_data", length=10**9), "is shorter than .metadata says"),
    (edit("storage_data", transform_descriptors=["zstd"]), "is stored transformed"),
    (edit("state_dict_metadata", size=torch.Size([500, 16])), "do not make up its shape"),
    (edit("state_dict_metadata", chunks=[]), "do not make up its shape"),
    (overlap, "do not make up its shape"),
    (lambda metadata: metadata.storage_data.clear(), "is damaged, or made to harm"),
    (lambda metadata: vars(metadata).update(mcore_data={"output_layer.weight": {"flat": 1}}),
     "stored flattened, which is not read: 1 name: output_layer.weight"),
    (lambda metadata: metadata.state_dict_metadata.update({"router/shard_0": BytesStorageMetadata()}),
     "beside tensors it stores 1 name: router/shard_0"),
], ids=["harm", "parent", "absolute", "long", "transform", "size", "none", "overlap", "places", "flattened", "bytes"])
def test_metadata_that_is_wrong_or_wants_more_is_refused(tmp_path, monkeypatch, damage, says):
    monkeypatch.chdir(tmp_path)
    folder = broken(tmp_path, damage)
    with pytest.raises(CheckpointError, match=says):
        megatron.open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_a_chunk_is_read_as_safely_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "embedding.word_embeddings.weight"

    def replaced(content):
        folder = broken(tmp_path, lambda metadata: vars(metadata.storage_data[MetadataIndex(name, (0, 0))]).update(
            relative_path="x.distcp", offset=0, length=len(content)) or (tmp_path / "x.distcp").write_bytes(content))
        return megatron.open_checkpoint(folder).tensors

    def saved(value):
        torch.save(value, file := io.BytesIO())
        return file.getvalue()

    right = torch.zeros(384, 16, dtype=torch.bfloat16)
    assert torch.equal(replaced(saved(right)).read(name), right)
    with zipfile.ZipFile(squeezed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for info in (whole := zipfile.ZipFile(io.BytesIO(saved(right)))).infolist():
            archive.writestr(info.filename, whole.read(info))
    for content, says in [(saved(Harm()), "wants to load posix.system"), (saved(right[:5]), "is not the part of shape"),
                          (saved(right.float()), "is not the part of shape"), (saved([right]), "is not the part"),
                          (squeezed.getvalue(), "is compressed"), (saved(right)[:-50], "cut short"),
                          (saved(torch.zeros(1).bfloat16().expand(384, 16)), "not stored as that many numbers")]:
        with pytest.raises(CheckpointError, match=says):
            replaced(content).read(name)
    assert not (tmp_path / "ran").exists()


def test_other_kinds_of_distributed_checkpoints_are_refused(tmp_path):
    folder = broken(tmp_path, lambda metadata: None)
    common(folder, options("M", Sizes(), "2026-06"), kind="zarr")
    with pytest.raises(CheckpointError, match="sharded_backend is 'zarr'; read is 'torch_dist'"):
        megatron.open_checkpoint(folder)
    (folder / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no common\.pt"):
        megatron.open_checkpoint(folder)


def test_a_component_that_is_missing_is_named(tmp_path):
    name = "decoder.layers.0.mixer.in_proj.weight.B"
    folder = broken(tmp_path, lambda metadata: metadata.state_dict_metadata.pop(name))
    with pytest.raises(CheckpointError, match=rf"missing: 1 \({name}\)"):
        read(folder)
