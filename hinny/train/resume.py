"""What a training goes on from, and whether it may: the checkpoint's recipe and words beside those asked for."""

from __future__ import annotations

import json
import time
from typing import Any

from hinny.checkpoint import differences, latest, read_meta, uncut
from hinny.checkpoint.store import VISIBLE_SECONDS
from hinny.config import DIMENSIONS, DataConfig, ParallelConfig, Recipe
from hinny.errors import CheckpointError, ConfigError, RunError
from hinny.run import Run
from hinny.train.extension import check_same, converted

MAY_CHANGE = ("train.log_every", "train.log_seconds", "train.loggers", "train.save_every", "train.keep_every",
              "train.eval_every", "train.cuda_graphs", "data.path", "parallel.schedule", "parallel.recompute",
              "parallel.compile", *(f"parallel.{name}" for name in DIMENSIONS))
"""Keys that a resumed run may change: they don't change the weights, but for the rounding of sums. The data are
compared by fingerprint instead.
"""


def resumable(run: Run, recipe: Recipe, resume: str) -> dict[str, Any] | None:
    """meta.json of the checkpoint to go on from, or None for a new run; refuses a changed recipe."""
    if latest(run) is None:
        return None
    if resume == "never":
        raise RunError(f'{run.path} has a checkpoint of step {run.steps_done}, and resume is "never". '
                       "Use another run directory, or resume.")
    meta = read_meta(run)
    check_same(recipe, run, meta)
    saved, wanted = _comparable(meta["recipe"]), _comparable(recipe.model_dump(mode="json"))
    if converted(meta):
        # no step was made with the other sections
        saved, wanted = {"model": saved["model"]}, {"model": wanted["model"]}
    if changed := differences(saved, wanted, MAY_CHANGE):
        lines = "\n".join(f"  {key}: {old} → {new}" for key, (old, new) in changed.items())
        raise CheckpointError(f"the recipe is not that of the checkpoint of step {meta['step']} in {run.path}:\n"
                              f"{lines}\nUse another run directory, or restore the value.")
    return meta


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe without data.blend, whose folders may move and whose weights are in the fingerprint of the data,
    without [init] and without the cuts into stages.

    Keys that sections have gained since have their defaults.
    """
    data = DataConfig.model_validate(recipe["data"]).model_dump(mode="json", exclude={"blend"})
    parallel = ParallelConfig.model_validate(recipe.get("parallel", {})).model_dump(mode="json")
    # the base is compared by its weights (hinny.train.extension)
    recipe = {key: value for key, value in recipe.items() if key != "init"}
    return {**recipe, "model": uncut(recipe["model"]), "data": data, "parallel": parallel,
            "train": {"cuda_graphs": False, "segment_len": None, **recipe["train"]}}


def check_sight(run: Run, recipe: Recipe, first: Recipe, meta: dict[str, Any] | None) -> None:
    """Refuses a process that has another recipe than the `first`, or does not see the checkpoint that it goes on from.
    """
    # with the cuts into stages: by other cuts a layer would be trained twice, or by nobody
    mine, theirs = ({**_comparable(dump := one.model_dump(mode="json")), "pattern": one.model.pattern,
                     "init": dump["init"]} for one in (recipe, first))
    # the data may lie elsewhere on another machine; they are compared by fingerprint
    if changed := differences(theirs, mine, ("data.path",)):
        key, (old, new) = next(iter(changed.items()))
        raise ConfigError(f"the processes of this training have different recipes: {key} is {old} on the first and "
                          f"{new} on another. Start all of them with the same recipe and options.")
    if meta is None:
        return
    file = run.checkpoints / f"step-{meta['step']:08d}" / "meta.json"
    end = time.monotonic() + VISIBLE_SECONDS
    while not (file.exists() and json.loads(file.read_text(encoding="utf-8")) == meta):
        if time.monotonic() > end:
            raise CheckpointError(f"{file.parent} is what the first process goes on from, and another one does not see "
                                  "it. Put the run directory on a disk that all of them share, and give all the same.")
        time.sleep(0.2)
