"""The training loop: recipe + data folder → run directory. There is no other.

A step depends on the recipe, the seed and its number alone, and a checkpoint holds all that the next step needs: a run
that was killed at any moment and started again gives the same losses bit for bit on the same CPU with as many threads.
Started by torchrun it is one training of all processes, spread as [parallel] says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from hinny.checkpoint import clean
from hinny.config import Recipe
from hinny.errors import ConfigError
from hinny.run import Run
from hinny.train.extension import Base, open_base
from hinny.train.interrupt import interruptible
from hinny.train.optim import check_schedule
from hinny.train.processes import Together, joined
from hinny.train.resume import check_sight, resumable
from hinny.train.session import Progress, Session
from hinny.train.trace import traced
from hinny.train.writers import check_loggers, writing

log = logging.getLogger("hinny.train")


def train(recipe: Recipe, out: str | Path, *, data: str | None = None, resume: Literal["auto", "never"] = "auto",
          progress: Progress | None = None, threads: int | None = None, profile: str | None = None) -> Run:
    """Train `recipe` in the run directory `out`, from its newest checkpoint if it has one; returns the run.

    data: a folder made by `hinny prepare`, in place of the recipe's data.path.
    resume: "auto" goes on where the run stopped and returns at once if it is finished, and begins anew from converted
        weights, or from those that [init] names; "never" refuses a directory that has a checkpoint.
    progress: called after every step, by the first process alone, with step, steps, loss, tokens_per_s, seconds_left;
        mfu on a GPU whose peak rate is known, peak_memory_bytes on any.
    threads: CPU threads of PyTorch; its own choice if None.
    profile: "FROM:TO", steps counted from 1 whose profiler trace is written into the run's folder profile/.

    On SIGINT or SIGTERM the step is finished and saved, and the returned run's `finished` is False; the same call
    goes on. Raises ConfigError (also for steps to profile that will not be made), RunError (directory in use),
    DataError (a shard that is gone or cut off), CheckpointError (changed recipe or data, full disk) and TrainingError
    (a loss that is not finite, another process that is gone). What it says meanwhile goes to the logger "hinny.train".
    """
    if resume not in ("auto", "never"):
        raise ConfigError(f'resume is {resume!r}; it must be "auto" or "never".')
    recipe = _with_data(recipe, data)
    check_schedule(recipe.optim, recipe.train.steps * recipe.train.batch_size)
    check_loggers(recipe.train.loggers)
    run = Run(out)
    with joined() as device, _threads(threads), ExitStack() as held:
        together = Together()
        # the others are told, and do not look: a network disk may show them an older state of the directory
        theirs, meta, base = together.first(lambda: (recipe, *_opened(run, recipe, resume, held)))
        together.each(lambda: check_sight(run, recipe, theirs, meta))
        done = 0 if meta is None else meta["step"]
        trace = traced(run, profile, done=done, total=recipe.train.steps)
        if done >= recipe.train.steps:
            log.info("%s is finished: step %d of %d.", run.path, done, recipe.train.steps)
            return run
        session = Session(run, recipe, meta, base, device, together)
        with interruptible() as interrupt:
            if session.mesh.rank == 0:
                with trace, writing(run, recipe, session.step) as session.writers:
                    session.go(interrupt, progress, trace)
            else:
                session.go(interrupt, None, traced(run, None, done=done, total=recipe.train.steps))
        together.wait()
    return run


def _opened(run: Run, recipe: Recipe, resume: str, held: ExitStack) -> tuple[dict[str, Any] | None, Base | None]:
    """What to go on from, as `resumable`, or else what to begin with, as `open_base`; the run is locked until `held` is
    closed.
    """
    held.enter_context(run.lock())
    clean(run)
    meta = resumable(run, recipe, resume)
    return meta, open_base(recipe, run) if meta is None else None


def _with_data(recipe: Recipe, data: str | None) -> Recipe:
    if data is not None:
        if recipe.data.blend is not None:
            raise ConfigError(f"--data {data} names one folder, but data.blend of the recipe names "
                              f"{len(recipe.data.blend)}; remove one of the two.")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(data)})})
    if not recipe.data.folders:
        raise ConfigError("data.path is not set: give --data DIR, a folder made by `hinny prepare`, or set data.path "
                          "or data.blend in the recipe.")
    return recipe


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads set to `count` for a while."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ConfigError(f"threads is {count}; it must be at least 1.")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
