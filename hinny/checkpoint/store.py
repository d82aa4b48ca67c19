"""Saves and loads the weights and the optimiser of a run with torch.distributed.checkpoint (DCP), on any ranks.

    checkpoints/step-00000100/    .metadata and __RANK_*.distcp as DCP writes them, and
                    meta.json     step, sha256 of each file, the recipe and its fingerprint, the data's fingerprint …

A run that was converted holds weights alone at step 0 (hinny.checkpoint.weights); they are loaded and verified alike.

A checkpoint is whole or absent: it is written into `.partial-step-…`, synced to the disk and renamed. The last ones
are kept (hinny.checkpoint.retention), and those that were saved to be kept for ever (meta.json: "kept"). Checksums are
verified before anything is read. Only tensors are stored and they are read without running code, but DCP's own
`.metadata` is a pickle: load checkpoints of your own runs, not a stranger's.

Many ranks write one checkpoint, each its shards, in a folder that all of them see; weights have the names that they
have in hinny.Model, whatever wraps it and whichever ranks hold it. So it can be loaded on any other ranks and mesh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from hinny.checkpoint import weights as weight_files
from hinny.checkpoint.disk import PARTIAL, sha256, sync, write_synced
from hinny.checkpoint.formats.foreign import Tensors
from hinny.checkpoint.ranks import RankFailure, Ranks, reason
from hinny.checkpoint.retention import last_good, prune
from hinny.checkpoint.verification import check_names, damaged, verify
from hinny.checkpoint.weights import one_process
from hinny.config import ModelConfig, Recipe
from hinny.errors import CheckpointError
from hinny.model import Model
from hinny.run import Run

State = dict[str, dict[str, Any]]
"""What a checkpoint stores: "model", name → tensor, and "optimizer", name → its moments and step count."""

VISIBLE_SECONDS = 60
"""How long a file that another node wrote may take to be seen here: network file systems cache what a folder holds."""


def save(run: Run, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], *,
         keep: bool = False, group: dist.ProcessGroup | None = None) -> Path:
    """Write the checkpoint of `step` and prune old ones; returns its folder. `extra` goes into meta.json as it is.
    `keep`: this one is never pruned, whatever the run's settings become.

    group: a gloo group of the ranks that hold the model, each its shards (DTensor), or its own weights, or the same
        as the others; all of them call this. None: one process has everything.

    Raises CheckpointError, on every rank, with the last good checkpoint named, if it cannot be written, for instance
    on a full disk; nothing of it stays then.
    """
    return write(run, step, state_of(model, optimizer), extra, keep=keep, ranks=Ranks(group))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """What is saved of a model and its optimiser: the tensors themselves, no copies."""
    assert optimizer.state, "an optimiser before its first step has nothing to save"
    # tensors alone: the optimiser's groups and settings come from the recipe
    moments = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer)["state"])
    return {"model": get_model_state_dict(model), "optimizer": moments}


def write(run: Run, step: int, state: State, extra: dict[str, Any], *, keep: bool, ranks: Ranks) -> Path:
    """As `save`, of the part of `state` that each of `ranks` has."""
    final = run.checkpoints / f"step-{step:08d}"
    partial = final.with_name(PARTIAL + final.name)
    try:
        if ranks.first(final.exists):
            return final
        ranks.first(lambda: partial.mkdir(parents=True))
        sums = _write_shards(partial, state, ranks)
        ranks.first(lambda: _publish(run, partial, final, {"step": step, "kept": keep, "files": sums, **extra}))
    except (OSError, CheckpointException, RankFailure) as fault:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {run.checkpoints}: {reason(fault)}. "
            f"The last good checkpoint is {last_good(run)}. "
            "Make room or give write permission, then run the same command to go on from there.") from None
    finally:
        # rank 0 alone, which renames it: another rank that lost touch would empty what is about to be in force
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    ranks.first(lambda: prune(run))
    return final


def _write_shards(folder: Path, state: State, ranks: Ranks) -> dict[str, str]:
    """Write what each rank has; returns the sha256 of each file, of all ranks."""
    # nothing is copied ahead from a GPU: what a thread writes is on the host, and its GPU would be the first
    writer = dcp.FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
    if ranks.group is None:
        assert not _sharded(state), "the shards of many ranks are saved with their group"
        with one_process():
            dcp.save(state, storage_writer=writer, no_dist=True)
        return _sums(folder, "*")
    try:
        ranks.exchange(lambda: dcp.save(state, storage_writer=writer, process_group=ranks.group))
    except CheckpointException as fault:
        raise RankFailure("; ".join(f"{reason(one)} (rank {rank} of {ranks.size})"
                                    for rank, (one, _) in sorted(fault.failures.items()))) from None
    mine = ranks.each(lambda: _sums(folder, f"__{ranks.rank}_*.distcp"))
    index = ranks.first(lambda: _sums(folder, ".metadata"))
    sums = {name: digest for part in (index, *mine) for name, digest in part.items()}
    ranks.first(lambda: _await(folder, set(sums)))
    return sums


def _sharded(state: State) -> bool:
    return any(isinstance(value, DTensor) for value in state["model"].values())


def _sums(folder: Path, names: str) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob(names))}


def _await(folder: Path, names: set[str]) -> None:
    """Wait until the files that all ranks wrote are seen here. Raises OSError if they are not."""
    end = time.monotonic() + VISIBLE_SECONDS
    while missing := names - {file.name for file in folder.iterdir()}:
        if time.monotonic() > end:
            raise OSError(f"{min(missing)} was written by another rank and is not seen by rank 0; put the run "
                          "directory on a disk that all nodes share")
        time.sleep(0.2)


def _publish(run: Run, partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Put in force what is written: from the rename on it is the newest checkpoint."""
    write_synced(partial / "meta.json", json.dumps(meta, indent=1) + "\n")
    sync(partial)
    _sync_file(run.path / "metrics.jsonl")
    partial.rename(final)
    sync(run.checkpoints)


def load(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, step: int | None = None, *,
         group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Fill `model` and `optimizer`, in place, from the newest checkpoint or that of `step`; returns its meta.json.

    group: a gloo group of the ranks that hold the model, cut in any way, whatever ranks saved it; all of them call
        this, share the reading of checksums, and read each what it holds. None: this process alone.

    Raises CheckpointError, on every rank, if there is none, if a file is damaged, or if it does not fit the model; also
    if an optimiser is to be filled from a checkpoint that holds weights alone.
    """
    ranks = Ranks(group)
    folder = run.checkpoints
    try:
        name, meta = ranks.first(lambda: (_folder(run, step).name, read_meta(run, step)))
        folder /= name
        verify(run, folder, meta, ranks)
        weights = get_model_state_dict(model)
        check_names(folder, set(weights), ranks)
        if weight_files.are_in(folder):
            if optimizer is not None:
                raise CheckpointError(f"{folder} holds converted weights and no optimiser state, so no training can be "
                                      "resumed from it; one can begin anew from these weights.")
            ranks.each(lambda: weight_files.fill(weights, folder))
        else:
            ranks.each(lambda: _read_shards(folder, model, weights, optimizer))
    except (OSError, CheckpointException, RankFailure) as fault:
        raise CheckpointError(f"{folder} could not be loaded: {reason(fault)}.") from None
    return meta


def _read_shards(folder: Path, model: nn.Module, weights: dict[str, Any],
                 optimizer: torch.optim.Optimizer | None) -> None:
    """Read what this rank holds, into the tensors themselves."""
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        moments = get_optimizer_state_dict(model, optimizer)
        assert moments["state"], "an optimiser is filled before the first gradient or after a step"
        state["optimizer"] = moments["state"]
    with one_process():
        # each rank reads for itself: what it needs is said by its tensors
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    set_model_state_dict(model, weights)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, optim_state_dict=moments)


def read_meta(run: Run, step: int | None = None) -> dict[str, Any]:
    """meta.json of the newest checkpoint or that of `step`."""
    folder = _folder(run, step)
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise damaged(run, folder, "meta.json", str(fault), Ranks()) from None


def read_weights(run: Run, step: int | None = None) -> Tensors:
    """The weights of the newest checkpoint, or that of `step`, verified and read one at a time."""
    folder = _folder(run, step)
    verify(run, folder, read_meta(run, step), Ranks())
    return weight_files.stored(folder)


def load_model(run: Run | str | Path, device: str | torch.device = "cpu", step: int | None = None,
               dtype: Literal["stored"] | None = None) -> Model:
    """The model of `run` with the weights of its newest checkpoint or that of `step`, in evaluation mode.

    dtype: None for float32 parameters; "stored" for the types in the checkpoint, so that bfloat16 weights take two
    bytes each. On the CPU these are mapped from the files, which must then stay as they are.
    """
    if dtype not in (None, "stored"):
        raise CheckpointError(f'dtype is {dtype!r}; it must be None (float32) or "stored".')
    run = run if isinstance(run, Run) else Run(run)
    if dtype is None:
        with torch.device(device):
            model = Model(_config(run, step))
        load(run, model, step=step)
        return model.eval()
    model, _ = open_model(run, step)
    weight_files.adopt(model, _folder(run, step), device)
    return model.eval()


def open_model(run: Run, step: int | None = None) -> tuple[Model, Tensors]:
    """The model of `run` on the meta device, and its weights, verified, to be read one at a time: those of the newest
    checkpoint or that of `step`.
    """
    with torch.device("meta"):
        model = Model(_config(run, step))
    weights = read_weights(run, step)
    check_names(_folder(run, step), set(model.state_dict()), Ranks())
    return model, weights


def _config(run: Run, step: int | None) -> ModelConfig:
    """[model] of a run, which must be that of the checkpoint."""
    config = run.recipe.model
    saved = read_meta(run, step)["recipe"]["model"]
    if changed := differences(uncut(saved), uncut(config.model_dump(mode="json"))):
        raise CheckpointError(f"{run.path}: [model] in recipe.toml is not that of the checkpoint, for instance in "
                              f"{next(iter(changed))}. "
                              "Restore recipe.toml, or train again in another run directory.")
    return config


def fingerprint(recipe: Recipe) -> str:
    """sha256 of all that `recipe` says."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def uncut(model: dict[str, Any]) -> dict[str, Any]:
    """A saved [model] whose pattern has no cuts: into which stages it was cut is no part of a model."""
    return {**model, "pattern": model["pattern"].replace("|", "")}


def differences(old: dict[str, Any], new: dict[str, Any], ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (old value, new value), for every value of two nested tables that differs; None where absent."""
    flat_old, flat_new = flat(old), flat(new)
    changed = [key for key in {**flat_old, **flat_new} if flat_old.get(key) != flat_new.get(key)]
    return {key: (flat_old.get(key), flat_new.get(key)) for key in changed if key not in ignore}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _folder(run: Run, step: int | None) -> Path:
    folders = run.checkpoint_folders()
    if step is not None:
        folders = [folder for folder in folders if folder.name == f"step-{step:08d}"]
    if not folders:
        known = ", ".join(folder.name for folder in run.checkpoint_folders()) or "none; train it first"
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(f"{run.path} has no checkpoint{wanted}. It has: {known}.")
    return folders[-1]


def _sync_file(file: Path) -> None:
    """What the metrics say up to this step must be on the disk before the checkpoint is."""
    if file.exists():
        sync(file)
