"""Saves and loads the weights and the optimiser of a run with torch.distributed.checkpoint (DCP).

    checkpoints/step-00000100/    .metadata and *.distcp as DCP writes them, and
                    meta.json     step, sha256 of each file, the recipe and its fingerprint, the data's fingerprint …

A run that was converted holds weights alone at step 0 (hinny.checkpoint.weights); they are loaded and verified alike.

A checkpoint is whole or absent: it is written into `.partial-step-…`, synced to the disk and renamed. The last KEEP
are kept, and those that were saved to be kept for ever (meta.json: "kept"). Checksums are verified before anything is
read. Only tensors are stored and they are read without running code, but DCP's own `.metadata` is a pickle: load
checkpoints of your own runs, not a stranger's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hinny.checkpoint import weights as weight_files
from hinny.checkpoint.disk import PARTIAL, sha256, sync, write_synced
from hinny.checkpoint.formats.foreign import Tensors
from hinny.checkpoint.weights import one_process
from hinny.config import Recipe
from hinny.errors import CheckpointError
from hinny.model import Model
from hinny.run import Run

KEEP = 2
"""Checkpoints that stay: the last, and the one before it in case the last is damaged on the disk."""


def save(run: Run, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], *,
         keep: bool = False) -> Path:
    """Write the checkpoint of `step` and prune old ones; returns its folder. `extra` goes into meta.json as it is.
    `keep`: this one is never pruned, whatever the run's settings become.

    Raises CheckpointError, with the last good checkpoint named, if it cannot be written, for instance on a full disk;
    nothing of it stays then.
    """
    assert optimizer.state, "an optimiser before its first step has nothing to save"
    final = run.checkpoints / f"step-{step:08d}"
    if final.exists():
        return final
    partial = final.with_name(PARTIAL + final.name)
    try:
        partial.mkdir(parents=True)
        with one_process():
            # tensors alone: the optimiser's groups and settings come from the recipe
            state = {"model": get_model_state_dict(model),
                     "optimizer": get_optimizer_state_dict(model, optimizer)["state"]}
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial, sync_files=True), no_dist=True)
        sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
        meta = {"step": step, "kept": keep, "files": sums, **extra}
        write_synced(partial / "meta.json", json.dumps(meta, indent=1) + "\n")
        sync(partial)
        _sync_file(run.path / "metrics.jsonl")
        partial.rename(final)
        sync(run.checkpoints)
    except (OSError, CheckpointException) as fault:
        good = latest(run)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {run.checkpoints}: {_reason(fault)}. "
            f"The last good checkpoint is {good.name if good else 'none: none was saved yet'}. "
            "Make room or give write permission, then run the same command to go on from there.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with _removing(run):
        # what was converted is no step of the training: it stays, whatever is trained on from it
        for old in [f for f in run.checkpoint_folders() if not weight_files.are_in(f)][:-KEEP]:
            if not _kept(old):
                _remove(old)
    return final


def _kept(folder: Path) -> bool:
    """Whether a checkpoint was saved to stay; one that no longer says so is not ours to throw away either."""
    try:
        return bool(json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("kept", False))
    except (OSError, ValueError):
        return True


def clean(run: Run) -> None:
    """Remove what an interrupted save or removal left; CheckpointError if it stays. Call it with the run locked."""
    with _removing(run):
        for partial in run.checkpoints.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)


def latest(run: Run) -> Path | None:
    """The folder of the newest checkpoint, or None."""
    return folders[-1] if (folders := run.checkpoint_folders()) else None


def load(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
         step: int | None = None) -> dict[str, Any]:
    """Fill `model` and `optimizer`, in place, from the newest checkpoint or that of `step`; returns its meta.json.

    Raises CheckpointError if there is none, if a file is damaged, or if it does not fit the model; also if an
    optimiser is to be filled from a checkpoint that holds weights alone.
    """
    folder = _folder(run, step)
    meta = read_meta(run, step)
    _verify(run, folder, meta)
    if weight_files.are_in(folder):
        if optimizer is not None:
            raise CheckpointError(f"{folder} holds converted weights and no optimiser state, so no training can be "
                                  "resumed from it; one can begin anew from these weights.")
        _check_names(folder, set(model.state_dict()))
        weight_files.fill(model, folder)
        return meta
    with one_process():
        weights = get_model_state_dict(model)
        state: dict[str, Any] = {"model": weights}
        if optimizer is not None:
            moments = get_optimizer_state_dict(model, optimizer)
            state["optimizer"] = moments["state"]
        try:
            _check_names(folder, set(weights))
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        except (OSError, CheckpointException) as fault:
            raise CheckpointError(f"{folder} could not be loaded: {_reason(fault)}.") from None
        set_model_state_dict(model, weights)
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, optim_state_dict=moments)
    return meta


def read_meta(run: Run, step: int | None = None) -> dict[str, Any]:
    """meta.json of the newest checkpoint or that of `step`."""
    folder = _folder(run, step)
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise _damaged(run, folder, "meta.json", str(fault)) from None


def read_weights(run: Run, step: int | None = None) -> Tensors:
    """The weights of the newest checkpoint, or that of `step`, verified and read one at a time."""
    folder = _folder(run, step)
    _verify(run, folder, read_meta(run, step))
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
    recipe = run.recipe
    saved = read_meta(run, step)["recipe"]["model"]
    if changed := differences(saved, recipe.model.model_dump(mode="json")):
        raise CheckpointError(f"{run.path}: [model] in recipe.toml is not that of the checkpoint, for instance in "
                              f"{next(iter(changed))}. "
                              "Restore recipe.toml, or train again in another run directory.")
    with torch.device(device if dtype is None else "meta"):
        model = Model(recipe.model)
    if dtype is None:
        load(run, model, step=step)
        return model.eval()
    folder = _folder(run, step)
    _verify(run, folder, read_meta(run, step))
    _check_names(folder, set(model.state_dict()))
    weight_files.adopt(model, folder, device)
    return model.eval()


def fingerprint(recipe: Recipe) -> str:
    """sha256 of all that `recipe` says."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


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


def _verify(run: Run, folder: Path, meta: dict[str, Any]) -> None:
    if name := _first_damaged(folder, meta):
        raise _damaged(run, folder, name, "its sha256 is not that in meta.json")


def _first_damaged(folder: Path, meta: dict[str, Any]) -> str | None:
    for name, expected in meta["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            return name
    return None


def _damaged(run: Run, folder: Path, name: str, reason: str) -> CheckpointError:
    whole = None
    for older in reversed([f for f in run.checkpoint_folders() if f.name < folder.name]):
        try:
            if _first_damaged(older, json.loads((older / "meta.json").read_text())) is None:
                whole = older
                break
        except (OSError, ValueError):
            continue
    advice = (f"The checkpoint before it, {whole.name}, is whole: delete {folder} to go on from there." if whole else
              "No earlier checkpoint is whole; start again in another run directory.")
    return CheckpointError(f"{folder / name} is damaged: {reason}. {advice}")


def _check_names(folder: Path, wanted: set[str]) -> None:
    if (stored := set(weight_files.stored(folder).infos)) != wanted:
        odd = sorted(stored ^ wanted)
        raise CheckpointError(f"{folder} is not a checkpoint of this model: {len(odd)} weights are on one side only, "
                              f"for instance {odd[0]}.")


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that it is never seen half removed."""
    doomed = folder.with_name(PARTIAL + folder.name)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _removing(run: Run) -> Iterator[None]:
    """What is still there when this fails is old or half removed: the checkpoints in force are whole."""
    try:
        yield
    except OSError as fault:
        good = latest(run)
        raise CheckpointError(
            f"{fault.filename or run.checkpoints} cannot be removed: {fault.strerror}. The last good checkpoint is "
            f"{good.name if good else 'none: none was saved yet'}. Give write permission or remove it yourself, then "
            "run the same command to go on from there.") from None


def _reason(fault: BaseException) -> str:
    """The cause inside DCP's exception, which holds one failure a rank."""
    if isinstance(fault, CheckpointException) and fault.failures:
        fault = next(iter(fault.failures.values()))[0]
    while fault.__cause__ is not None:
        fault = fault.__cause__
    return fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)


def _sync_file(file: Path) -> None:
    """What the metrics say up to this step must be on the disk before the checkpoint is."""
    if file.exists():
        sync(file)
