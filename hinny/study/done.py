"""What tells that a training or an evaluation of a study is done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from hinny.config import Recipe
from hinny.errors import RunError
from hinny.run import Run, weights_print
from hinny.study.config import StudyConfig
from hinny.study.tasks import is_asked


def trained(run: Path, recipe: Recipe, data: Path, spared: bool) -> bool:
    """Whether the training is done: its last checkpoint is there, or nothing needs it any more (`spared`) and its
    records go to the last step. RunError if it was done on other data than the folder `data` holds now.
    """
    if not checkpoint(run, recipe).is_dir() and not (spared and recorded(run) == recipe.train.steps):
        return False
    prints = [json.loads(file.read_text())["fingerprint"] for folder in (run, data)
              if (file := folder / "data.json").is_file()]
    if len(set(prints)) > 1:
        raise RunError(f"{run} was trained on other data than {data} holds now ({prints[0][:12]}, {prints[1][:12]}). "
                       "Choose another folder with --out, or prepare the old text again.")
    return True


def extends(run: Path, base: Path) -> None:
    """RunError if the extension in `run` went on from other weights than `base` has now."""
    began = Run(run).env.get("init") if (run / "env.json").is_file() else None
    folders = Run(base).checkpoint_folders()
    if began is None or not folders:
        return
    meta = json.loads((folders[-1] / "meta.json").read_text(encoding="utf-8"))
    if weights_print(meta) != began["weights"]:
        raise RunError(f"{run} went on from other weights than {base} has now, which was trained again. Remove {run}, "
                       "and the same command extends anew.")


def check_kept(run: Path, recipe: Recipe, extended: Iterable[Path]) -> None:
    """RunError if a finished training without its checkpoint would be trained again though `extended` went on from it.

    On a GPU a second training gives other weights, and figures of both would be compared.
    """
    if checkpoint(run, recipe).is_dir() or recorded(run) != recipe.train.steps:
        return
    if there := next((one for one in extended if recorded(one)), None):
        raise RunError(f"the checkpoint of {run} is gone, and what is still to be done needs it; {there} went on from "
                       f"it. Bring it back, or remove {run} and all that went on from it: the same command trains "
                       "them anew.")


def recorded(run: Path) -> int:
    """The last step of which the run has a record; 0 without one."""
    return max((record["step"] for record in Run(run).metrics()), default=0)


def checkpoint(run: Path, recipe: Recipe) -> Path:
    """The checkpoint of the last step; checkpoints are whole or absent, so it tells a finished training."""
    return run / "checkpoints" / f"step-{recipe.train.steps:08d}"


def asked(config: StudyConfig, run: Path, tasks: Iterable[str]) -> bool:
    """Whether the results in force are those of the study's own sizes, not of an evaluation by hand since."""
    records = {task: run / "evals" / f"{task}.json" for task in tasks}
    return all(file.is_file() and is_asked(config.eval, task, json.loads(file.read_text(encoding="utf-8")))
               for task, file in records.items())


def newer(files: list[Path], than: Path) -> bool:
    """Whether all `files` exist and none is older than `than`."""
    return than.exists() and all(f.is_file() and f.stat().st_mtime >= than.stat().st_mtime for f in files)
