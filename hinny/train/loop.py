"""The training loop: recipe + data folder → run directory. There is no other.

A step depends on the recipe, the seed and its number alone, and a checkpoint holds all that the next step needs: a run
that was killed at any moment and started again gives the same losses bit for bit on the same CPU with as many threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from hinny.checkpoint import clean, differences, fingerprint, latest, load, read_meta, save
from hinny.config import DataConfig, Recipe
from hinny.data.folder import record_name
from hinny.data.mix import Stream
from hinny.errors import CheckpointError, ConfigError, RunError, TrainingError
from hinny.model import Model
from hinny.run import Run, environment
from hinny.train.heldout import HeldOut
from hinny.train.interrupt import Interrupt, interruptible
from hinny.train.metrics import Meter, peak_memory, seconds_at_peak
from hinny.train.optim import check_schedule, make_optimizer
from hinny.train.step import Step, Stepper
from hinny.train.trace import Trace, traced
from hinny.train.writers import Writer, check_loggers, writing

Progress = Callable[[dict[str, Any]], None]

MAY_CHANGE = ("train.log_every", "train.log_seconds", "train.loggers", "train.save_every", "train.keep_every",
              "train.eval_every", "data.path")
"""Keys that a resumed run may change: they don't change the weights. The data are compared by fingerprint instead."""

log = logging.getLogger(__name__)


def train(recipe: Recipe, out: str | Path, *, data: str | None = None, resume: Literal["auto", "never"] = "auto",
          progress: Progress | None = None, threads: int | None = None, profile: str | None = None) -> Run:
    """Train `recipe` in the run directory `out`, from its newest checkpoint if it has one; returns the run.

    data: a folder made by `hinny prepare`, in place of the recipe's data.path.
    resume: "auto" goes on where the run stopped and returns at once if it is finished, and begins anew from converted
        weights; "never" refuses a directory that has a checkpoint.
    progress: called after every step with step, steps, loss, tokens_per_s, seconds_left; mfu on a GPU whose peak rate
        is known, peak_memory_bytes on any.
    threads: CPU threads of PyTorch; its own choice if None.
    profile: "FROM:TO", steps counted from 1 whose profiler trace is written into the run's folder profile/.

    On SIGINT or SIGTERM the step is finished and saved, and the returned run's `finished` is False; the same call
    goes on. Raises ConfigError (also for steps to profile that will not be made), RunError (directory in use),
    CheckpointError (changed recipe or data, full disk) and TrainingError (a loss that is not finite). What it says
    meanwhile goes to the logger "hinny.train".
    """
    if resume not in ("auto", "never"):
        raise ConfigError(f'resume is {resume!r}; it must be "auto" or "never".')
    recipe = _with_data(recipe, data)
    check_schedule(recipe.optim, recipe.train.steps * recipe.train.batch_size)
    check_loggers(recipe.train.loggers)
    run = Run(out)
    with run.lock(), _threads(threads):
        clean(run)
        meta = _resumable(run, recipe, resume)
        trace = traced(run, profile, done=0 if meta is None else meta["step"], total=recipe.train.steps)
        if meta is not None and meta["step"] >= recipe.train.steps:
            log.info("%s is finished: step %d of %d.", run.path, meta["step"], recipe.train.steps)
            return run
        session = Session(run, recipe, meta)
        with interruptible() as interrupt, trace, writing(run, recipe, session.step) as session.writers:
            session.go(interrupt, progress, trace)
    return run


class Session:
    """One process's share of a run: from a checkpoint, or from the start, to the end or an interrupt."""

    def __init__(self, run: Run, recipe: Recipe, meta: dict[str, Any] | None) -> None:
        config = recipe.train
        self.run = run
        self.recipe = recipe
        self.stream = Stream(recipe.data, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed,
                             vocab_size=recipe.model.vocab_size, steps=config.steps)
        self._check_data(meta)
        self.device = device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        if accelerator is not None:
            torch.cuda.reset_peak_memory_stats(device)
        model = Model(recipe.model)
        if meta is None:
            model.init_weights(config.seed)
        elif converted(meta):
            load(run, model)
        model.to(device)
        self.stepper = Stepper(recipe, model, make_optimizer(model, recipe.optim), device)
        self.held_out = HeldOut(recipe) if config.eval_every is not None else None
        if meta is not None and not converted(meta):
            load(run, model, self.stepper.optimizer)
        self.step = 0 if meta is None else int(meta["step"])
        self.meter = Meter(tokens_per_step=config.batch_size * config.seq_len, steps=config.steps,
                           seconds=0.0 if meta is None else meta["seconds"],
                           seconds_at_peak=seconds_at_peak(recipe, accelerator))
        self.writers: list[Writer] = []
        self._recorded = time.monotonic()
        self._write_start(accelerator, resumed=meta is not None)

    def _check_data(self, meta: dict[str, Any] | None) -> None:
        if meta is not None and converted(meta):
            _check_tokenizer(self.run, Path(next(iter(self.recipe.data.folders))))
        elif meta is not None and meta["data_fingerprint"] != self.stream.fingerprint:
            folders = ", ".join(self.recipe.data.folders)
            raise CheckpointError(
                f"the data of {folders} are not those of the checkpoint in {self.run.path}: fingerprint "
                f"{meta['data_fingerprint'][:12]} → {self.stream.fingerprint[:12]}. Give the data that the run "
                "began with, or use another run directory.")

    def _write_start(self, accelerator: str | None, *, resumed: bool) -> None:
        threads = torch.get_num_threads()
        if resumed and (before := self.run.env["threads"]) != threads:
            log.warning("the run had %d threads and has %d now: sums may round differently from here on.",
                        before, threads)
        self.run.write_recipe(self.recipe)
        self.run.write_env(environment(device=self.device.type, seed=self.recipe.train.seed, threads=threads,
                                       data_fingerprint=self.stream.fingerprint, accelerator=accelerator),
                           resumed=resumed)
        self.run.keep_metrics(self.step)
        self._adopt_data()
        log.info("%s: from step %d to %d on %s.", self.run.path, self.step, self.recipe.train.steps,
                 self.device.type)

    def _adopt_data(self) -> None:
        """Keep what the run is trained on: the tokenizer, data.json of every folder; say how often it sees each."""
        folders = [Path(folder) for folder in self.recipe.data.folders]
        self.run.adopt(*folders[0].glob("tokenizer.*"))
        for k, folder in enumerate(folders):
            self.run.adopt(folder / "data.json", name=record_name(k))
        for name, epochs in self.stream.epochs.items():
            log.info("%s: %.2f epochs in %d steps.", name, epochs, self.recipe.train.steps)

    def go(self, interrupt: Interrupt, progress: Progress | None, trace: Trace) -> None:
        """Train until the last step, or until the step in which `interrupt` is asked for; save."""
        config = self.recipe.train
        while self.step < config.steps and not interrupt.asked:
            with trace.step(self.step + 1):
                done = self._timed_step()
            last = self.step == config.steps
            # a checkpoint promises the records up to it, so it comes after them
            late = config.log_seconds is not None and time.monotonic() - self._recorded >= config.log_seconds
            if self.step % config.log_every == 0 or late or last:
                self._record(done)
            if self.held_out is not None and config.eval_every and (self.step % config.eval_every == 0 or last):
                self._log({"step": self.step, "tokens": self._tokens, **self.held_out.record(self.stepper)})
            if self.step % config.save_every == 0 or last:
                self._save()
            if progress is not None:
                progress({"step": self.step, "steps": config.steps, "loss": done.loss,
                          **self.meter.speed(), "seconds_left": self.meter.seconds_left(self.step),
                          **peak_memory(self.device)})
        if 0 < self.step < config.steps:
            self._save()
            log.info("saved at step %d; run the same command to go on.", self.step)

    def _timed_step(self) -> Step:
        start = time.perf_counter()
        batch = self.stream.batch(self.step)
        waited = time.perf_counter() - start
        try:
            done = self.stepper.step(self.step, batch)
        except TrainingError as fault:
            good = latest(self.run)
            raise TrainingError(f"{fault} The last good checkpoint: {good or 'none was saved yet'}.") from None
        self.step += 1
        self.meter.add(time.perf_counter() - start, waited)
        return done

    @property
    def _tokens(self) -> int:
        return self.step * self.meter.tokens_per_step

    def _record(self, done: Step) -> None:
        self._recorded = time.monotonic()
        z_loss = {} if done.z_loss is None else {"z_loss": done.z_loss}
        self._log({"step": self.step, "tokens": self._tokens, "loss": done.loss, **z_loss, "lr": done.lr,
                   "grad_norm": done.grad_norm, **self.meter.record(), **peak_memory(self.device)})

    def _log(self, record: dict[str, Any]) -> None:
        self.run.log(record)
        for writer in self.writers:
            writer.write(record)

    def _save(self) -> None:
        keep_every = self.recipe.train.keep_every
        save(self.run, self.step, self.stepper.model, self.stepper.optimizer,
             {"tokens": self._tokens, "seconds": self.meter.seconds, "data_fingerprint": self.stream.fingerprint,
              "recipe_fingerprint": fingerprint(self.recipe), "recipe": self.recipe.model_dump(mode="json")},
             keep=keep_every is not None and self.step % keep_every == 0)


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


def _resumable(run: Run, recipe: Recipe, resume: str) -> dict[str, Any] | None:
    """meta.json of the checkpoint to go on from, or None for a new run; refuses a changed recipe."""
    if latest(run) is None:
        return None
    if resume == "never":
        raise RunError(f'{run.path} has a checkpoint of step {run.steps_done}, and resume is "never". '
                       "Use another run directory, or resume.")
    meta = read_meta(run)
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
    """A saved recipe without data.blend: its folders may move, and its weights are in the fingerprint of the data.

    Keys that [data] has gained since have their defaults.
    """
    return {**recipe, "data": DataConfig.model_validate(recipe["data"]).model_dump(mode="json", exclude={"blend"})}


def converted(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint is of converted weights: training begins with them, at step 0, with a new optimiser."""
    return "source" in meta


def _check_tokenizer(run: Run, data: Path) -> None:
    """The data of a run that began elsewhere must be in the words of its model."""
    theirs, ours = ({f.name: f.read_bytes() for f in folder.glob("tokenizer.*")} for folder in (data, run.path))
    if ours and theirs != ours:
        raise CheckpointError(f"the tokenizer of {data} is not that of {run.path}, whose weights know no other. "
                              f"Prepare the data with it: hinny prepare DIR --tokenizer {run.path / next(iter(ours))}.")


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
