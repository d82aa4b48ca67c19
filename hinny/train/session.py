"""One process's share of a run: from a checkpoint, or from the start, to the end or an interrupt."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hinny.checkpoint import Saver, fingerprint, latest, load
from hinny.config import Recipe
from hinny.data.ahead import Ahead
from hinny.data.folder import record_name
from hinny.data.lengths import check_long, write_plot
from hinny.data.makers import made_ahead
from hinny.data.mix import Batch, Stream
from hinny.errors import CheckpointError, DataError, TrainingError
from hinny.parallel.initial import init_weights
from hinny.parallel.mesh import Mesh
from hinny.run import Run, environment
from hinny.train.build import build, check
from hinny.train.extension import Base, check_tokenizer, converted
from hinny.train.heldout import HeldOut
from hinny.train.interrupt import Interrupt
from hinny.train.metrics import Meter, peak_memory, seconds_at_peak
from hinny.train.optim import make_optimizer
from hinny.train.processes import Together
from hinny.train.step import Begun, Step, Stepper
from hinny.train.trace import Trace
from hinny.train.writers import Writer

Progress = Callable[[dict[str, Any]], None]

log = logging.getLogger("hinny.train")


class Session:
    """Trains `recipe` in `run` on `device`, together with the other processes of the mesh if there are any.

    meta: meta.json of the checkpoint to go on from, None for a new run. base: what a new run begins with, None for its
    own first weights. The first process writes the records.
    """

    def __init__(self, run: Run, recipe: Recipe, meta: dict[str, Any] | None, base: Base | None, device: torch.device,
                 together: Together) -> None:
        config = recipe.train
        self.run, self.recipe, self.device, self.together = run, recipe, device, together
        self.mesh = Mesh(recipe.parallel, device.type)
        check(recipe, self.mesh, device)
        self._open_data(meta, base)
        accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        if accelerator is not None:
            torch.cuda.reset_peak_memory_stats(device)
        objective, pipeline = build(recipe, self.mesh, device)
        self.stepper = Stepper(recipe, objective, make_optimizer(objective.model, recipe.optim), device, self.mesh,
                               pipeline)
        self.origin = meta.get("init") if meta is not None else None if base is None else base.record
        if meta is not None:
            load(run, objective.model, None if converted(meta) else self.stepper.optimizer, group=together.group)
        elif base is not None:
            load(base.run, objective.model, step=base.step, group=together.group)
        else:
            init_weights(objective, config.seed)
        self.held_out = HeldOut(recipe, self.mesh) if config.eval_every is not None else None
        self.step = 0 if meta is None else int(meta["step"])
        self._begun: Begun | None = None
        self._done: Step | None = None
        at_peak = seconds_at_peak(recipe, accelerator)
        self.meter = Meter(tokens_per_step=config.batch_size * config.seq_len, steps=config.steps,
                           seconds=0.0 if meta is None else meta["seconds"],
                           seconds_at_peak=None if at_peak is None else at_peak / self.mesh.world)
        self.saver = Saver(run, together.group)
        self.writers: list[Writer] = []
        self._recorded, self._recorded_step = time.monotonic(), self.step
        together.first(lambda: self._write_start(accelerator, resumed=meta is not None))

    def _open_data(self, meta: dict[str, Any] | None, base: Base | None) -> None:
        config = self.recipe.train

        def opened() -> str:
            self.stream = Stream(self.recipe.data, seq_len=config.seq_len, batch_size=config.batch_size,
                                 seed=config.seed, vocab_size=self.recipe.model.vocab_size, steps=config.steps)
            return self.stream.fingerprint

        prints = self.together.each(opened)
        if odd := [rank for rank, found in enumerate(prints) if found != prints[0]]:
            raise DataError(f"the data of rank {odd[0]} are not those of rank 0: fingerprint {prints[odd[0]][:12]} and "
                            f"{prints[0][:12]}. Give all processes the same data.")
        if meta is None and base is not None:
            check_tokenizer(base.run, Path(next(iter(self.recipe.data.folders))))
            self.together.first(lambda: check_long(self.stream.lengths(), base_len=base.length, seq_len=config.seq_len,
                                                   folders=list(self.recipe.data.folders)))
        elif meta is not None and converted(meta):
            check_tokenizer(self.run, Path(next(iter(self.recipe.data.folders))))
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
        env = environment(device=self.device.type, seed=self.recipe.train.seed, threads=threads,
                          data_fingerprint=self.stream.fingerprint, accelerator=accelerator)
        # told here too: checkpoints may be deleted
        self.run.write_env(env if self.origin is None else {**env, "init": self.origin}, resumed=resumed)
        self.run.keep_metrics(self.step)
        self._adopt_data()
        if self.step == 0 and self.origin is not None:
            log.info("%s begins with the weights of %s, step %d, trained on sequences of %d tokens.", self.run.path,
                     self.origin["from"], self.origin["step"], self.origin["seq_len"])
        log.info("%s: from step %d to %d on %s.", self.run.path, self.step, self.recipe.train.steps,
                 self.device.type if self.mesh.world == 1 else f"{self.mesh.world} x {self.device.type}")

    def _adopt_data(self) -> None:
        """Keep what the run is trained on: the tokenizer, data.json of every folder, how long documents are; say how
        often it sees each folder.
        """
        folders = [Path(folder) for folder in self.recipe.data.folders]
        self.run.adopt(*folders[0].glob("tokenizer.*"))
        for k, folder in enumerate(folders):
            self.run.adopt(folder / "data.json", name=record_name(k))
        write_plot(self.run.path, self.stream.lengths(), self.recipe.train.seq_len)
        for name, epochs in self.stream.epochs.items():
            log.info("%s: %.2f epochs in %d steps.", name, epochs, self.recipe.train.steps)

    def go(self, interrupt: Interrupt, progress: Progress | None, trace: Trace) -> None:
        """Train until the last step, or until the step in which `interrupt` is asked for on any process; save."""
        config = self.recipe.train
        with self.saver, made_ahead(self.stream, self._rows(), self.step, config.steps,
                                    beside=self.device.type == "cuda") as batches:
            stop = self._agree(interrupt)
            while self.step < config.steps and not stop:
                with trace.step(self.step + 1):
                    self._timed_step(batches)
                last = self.step == config.steps
                assert self._done is not None
                self._write(self._done, last=last)
                if self.step % config.save_every == 0 or last:
                    self._save()
                if progress is not None:
                    progress({"step": self.step, "steps": config.steps, "loss": self._done.loss,
                              **self.meter.speed(), "seconds_left": self.meter.seconds_left(self.step),
                              **peak_memory(self.device)})
                stop = self._agree(interrupt)
            if 0 < self.step < config.steps:
                self._finish()
                self._save()
        if 0 < self.step < config.steps:
            log.info("saved at step %d; run the same command to go on.", self.step)

    def _agree(self, interrupt: Interrupt) -> bool:
        """Whether any process was asked to stop; tells of a checkpoint that all have finished."""
        stop, saving = self.together.any(interrupt.asked, not self.saver.done)
        self.saver.poll(not saving)
        return stop

    def _rows(self) -> range:
        """This rank's rows of a batch."""
        rows = self.recipe.train.batch_size // self.mesh.size("replicate", "shard")
        first = self.mesh.index("replicate", "shard") * rows
        return range(first, first + rows)

    def _timed_step(self, batches: Ahead[Batch]) -> None:
        """Begin a step and wait for the one before it, so that a GPU always has one to go on with; where something is
        made of this one's numbers or weights, wait for it too.
        """
        start = time.perf_counter()
        batch = batches.get(self.step)
        waited = time.perf_counter() - start
        try:
            begun = self.stepper.begin(self.step, batch)
        except TrainingError as fault:
            raise self._ended(str(fault)) from None
        self._finish()
        self._begun = begun
        self.step += 1
        if self._is_needed():
            self._finish()
        self.meter.add(time.perf_counter() - start, waited)

    def _is_needed(self) -> bool:
        """Whether the step just begun is recorded, asked or saved, or is the first that progress can tell of."""
        config = self.recipe.train
        often = [config.log_every, config.save_every, *([config.eval_every] if config.eval_every else [])]
        return (self.step == config.steps or any(self.step % every == 0 for every in often)
                or config.log_seconds is not None or self._done is None)

    def _finish(self) -> None:
        """Wait for the step that was begun last, if nobody has."""
        begun, self._begun = self._begun, None
        try:
            if begun is not None:
                self._done = begun.result()
        except TrainingError as fault:
            raise self._ended(str(fault)) from None

    def _ended(self, fault: str) -> TrainingError:
        """The error that ends the training, with the checkpoint to go back to."""
        try:
            self.saver.wait()
        except CheckpointError as lost:
            # no reason to hide the fault that came with it
            log.error("%s", lost)
        return TrainingError(f"{fault} The last good checkpoint: {latest(self.run) or 'none was saved yet'}.")

    @property
    def _tokens(self) -> int:
        return self.step * self.meter.tokens_per_step

    def _write(self, done: Step, *, last: bool) -> None:
        """The records of this step, if it has any; then `done` is what it did."""
        config = self.recipe.train
        late = config.log_seconds is not None and time.monotonic() - self._recorded >= config.log_seconds
        if config.log_seconds is not None:
            # no two clocks agree, and all make the record or none
            (late,) = self.together.any(late)
        if self.step % config.log_every == 0 or late or last:
            steps = self.step - self._recorded_step
            self._recorded, self._recorded_step = time.monotonic(), self.step
            z_loss = {} if done.z_loss is None else {"z_loss": done.z_loss}
            speed = self.meter.record()
            self._log({"step": self.step, "tokens": self._tokens, "loss": done.loss, **z_loss, "lr": done.lr,
                       "grad_norm": done.grad_norm, **speed, **self.together.slowest(speed["data_seconds"], steps),
                       **peak_memory(self.device)})
        if self.held_out is not None and config.eval_every and (self.step % config.eval_every == 0 or last):
            losses = self.held_out.record(self.stepper)
            if not all(map(math.isfinite, losses.values())):
                raise self._ended(f"step {self.step}: held_out_loss is {losses['held_out_loss']} with the weights that "
                                  "this step made; they are not saved.")
            self._log({"step": self.step, "tokens": self._tokens, **losses})

    def _log(self, record: dict[str, Any]) -> None:
        if self.mesh.rank > 0:
            return
        self.run.log(record)
        for writer in self.writers:
            writer.write(record)

    def _save(self) -> None:
        keep_every = self.recipe.train.keep_every
        # a checkpoint promises the records up to it, which are written before it
        self.saver.start(self.step, self.stepper.objective.model, self.stepper.optimizer,
                         {"tokens": self._tokens, "seconds": self.meter.seconds,
                          "data_fingerprint": self.stream.fingerprint,
                          "recipe_fingerprint": fingerprint(self.recipe),
                          "recipe": self.recipe.model_dump(mode="json"),
                          **({} if self.origin is None else {"init": self.origin})},
                         keep=keep_every is not None and self.step % keep_every == 0)
