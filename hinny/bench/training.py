"""The training step, timed as `hinny train` makes it: its optimiser steps on real shards or random tokens, on one
process or on all that torchrun started; beside transformers if asked for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hinny import counts, memory, predict
from hinny.bench.clock import in_turn, median_range
from hinny.bench.gpu_clock import measure_roofs
from hinny.bench.kernel_cases.case import shape_text
from hinny.bench.kernel_table import merge_rows, read_rows
from hinny.bench.peers import on_kernels, transformers_twin
from hinny.bench.training_peer import Timed, check_logits, time_twin, twin_step
from hinny.bench.training_table import key, options_of, render_training
from hinny.config import Recipe, load_recipe
from hinny.data.ahead import Ahead
from hinny.data.makers import made_ahead
from hinny.data.mix import Batch, Stream
from hinny.errors import ConfigError
from hinny.model import Model
from hinny.parallel.initial import init_weights
from hinny.parallel.mesh import Mesh
from hinny.run import row, write_atomically
from hinny.train.build import build
from hinny.train.optim import make_optimizer
from hinny.train.processes import joined
from hinny.train.step import Stepper

WARM_UP = 2


def bench_train(recipe: str, *, steps: int = 5, batch: int | None = None, micro_batches: int = 1,
                length: int | None = None, precision: str | None = None, against: str | None = None,
                data: str | None = None, overrides: Sequence[str] = (), save: Path | None = None,
                markdown: Path | None = None) -> list[dict[str, Any]]:
    """Training tokens/s of a recipe's model, median over `steps` optimiser steps, low and high over them; on GPUs that
    are known its share of their peak (mfu), and the peak of the memory beside what `hinny show` predicts.

    recipe     file or shipped name, changed by overrides key=value
    batch      sequences in a micro-batch, of which each rank makes `micro_batches` in a step; length, precision: of a
               sequence and of products; the recipe's without them
    data       a folder made by `hinny prepare`; random tokens without it
    against    "transformers": the same weights in transformers. On a CPU stepped in turn with ours, fp32 only; on a GPU
               in the run's precision, one after the other, with the fastest kernels that it takes
    save       a JSON file: these rows take the place of the same figures in it, the others stay
    markdown   a Markdown file: the table of the rows of `save`, or of these
    """
    if against not in (None, "transformers"):
        raise ConfigError(f"against is {against!r}; the only peer known is transformers.")
    loaded = load_recipe(recipe, overrides)
    if save is not None:
        # refused now, and not when all is timed
        read_rows(save)
    with joined() as device:
        precision = precision or ("fp32" if against and device.type == "cpu" else loaded.train.precision)
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {precision!r}; it must be fp32 or bf16.")
        if against and device.type == "cpu" and precision != "fp32":
            raise ConfigError("against transformers is timed in fp32 on both sides on a CPU; drop precision.")
        if min(steps, micro_batches, 1 if batch is None else batch, 1 if length is None else length) < 1:
            raise ConfigError(f"steps ({steps}), batch ({batch}), micro_batches ({micro_batches}) and length ({length})"
                              " must be 1 or more.")
        mesh = Mesh(loaded.parallel, device.type)
        if data is not None and loaded.data.blend is not None:
            raise ConfigError(f"data {data!r} names one folder, but data.blend of the recipe names "
                              f"{len(loaded.data.blend)}; remove one of the two.")
        if against and mesh.world > 1:
            raise ConfigError("against transformers is timed on one process; drop against.")
        for name, value in (("optim.z_loss", loaded.optim.z_loss), ("train.segment_len", loaded.train.segment_len)):
            if against and value is not None:
                raise ConfigError(f"against transformers has no {name} ({value}); remove it.")
        timed = _resized(loaded, mesh, steps, batch, micro_batches, length, precision)
        # the shape tells of [parallel] and [train]; other changes make another variant of the recipe
        changes = [change for change in overrides if not change.startswith(("parallel.", "train."))]
        timed = timed.model_copy(update={"name": " ".join([loaded.name, *changes])})
        ours = _Ours(timed, mesh, device, data)
        if against and device.type == "cpu":
            rows = _beside_on_cpu(ours, steps, data)
        else:
            found = ours.timed(steps)
            peer = _beside_on_gpu(timed, ours, steps) if against else None
            rows = _rows(timed, mesh, device, found, data, peer)
    if mesh.rank > 0:
        return []
    if save is not None:
        merge_rows(save, rows, key)
    if markdown is not None:
        write_atomically(markdown, render_training(read_rows(save) if save is not None else rows))
    return rows


class _Ours:
    """Our training, without checkpoints and records."""

    def __init__(self, recipe: Recipe, mesh: Mesh, device: torch.device, data: str | None) -> None:
        self.recipe, self.mesh, self.device = recipe, mesh, device
        objective, pipeline = build(recipe, mesh, device)
        init_weights(objective, recipe.train.seed, draw_on=device)
        self.stepper = Stepper(recipe, objective, make_optimizer(objective.model, recipe.optim), device, mesh, pipeline)
        self._stream = None if data is None else Stream(
            recipe.data.model_copy(update={"path": data}), seq_len=recipe.train.seq_len,
            batch_size=recipe.train.batch_size, seed=recipe.train.seed, vocab_size=recipe.model.vocab_size,
            steps=recipe.train.steps)
        self._done = 0
        size = recipe.train.batch_size // mesh.size("replicate", "shard")
        self._rows = range(size * mesh.index("replicate", "shard"), size * (mesh.index("replicate", "shard") + 1))

    def _ahead(self, first: int, last: int) -> AbstractContextManager[Ahead[Batch]]:
        """The batches of these steps, made as in training."""
        if self._stream is None:
            return Ahead(self.batch, first, last)
        return made_ahead(self._stream, self._rows, first, last, beside=self.device.type == "cuda")

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step."""
        if self._stream is not None:
            return self._stream.batch(step, self._rows)
        size, first = len(self._rows), self._rows.start
        tokens = np.random.default_rng([step, first]).integers(self.recipe.model.vocab_size,
                                                               size=(size, self.recipe.train.seq_len + 1))
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.ones((size, self.recipe.train.seq_len), bool),
                     None, ("random tokens",))

    def step(self) -> float:
        """One optimiser step; its loss."""
        done = self.stepper.step(self._done, self.batch(self._done))
        self._done += 1
        return done.loss

    def timed(self, steps: int) -> Timed:
        """`steps` steps behind the first ones, each begun while the one before it runs, as in training."""
        losses = [self.step() for _ in range(WARM_UP)]
        ends = []
        first, last = self._done, self._done + steps + 1
        with self._ahead(first, last + 1) as batches:
            before = self.stepper.begin(first, batches.get(first))
            for step in range(first + 1, last + 1):
                begun = self.stepper.begin(step, batches.get(step))
                losses.append(before.result().loss)
                ends.append(time.perf_counter())
                before = begun
            losses.append(before.result().loss)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return Timed([end - start for start, end in pairwise(ends)], losses, peak)


def _resized(recipe: Recipe, mesh: Mesh, steps: int, batch: int | None, micro_batches: int, length: int | None,
             precision: str) -> Recipe:
    """The recipe with a short run of these sizes."""
    micro = recipe.train.micro_batch_size if batch is None else batch
    train = recipe.train.model_copy(update={
        "micro_batch_size": micro, "batch_size": micro * micro_batches * mesh.size("replicate", "shard"),
        "steps": WARM_UP + steps + 2, "seq_len": recipe.train.seq_len if length is None else length,
        "precision": precision})
    # the whole run at one rate: its first steps are those that are timed
    optim = recipe.optim.model_copy(update={"schedule": "constant", "warmup_samples": 0, "min_lr": None,
                                            "decay_samples": None})
    return recipe.model_copy(update={"train": train, "optim": optim})


def _rows(recipe: Recipe, mesh: Mesh, device: torch.device, found: Timed, data: str | None,
          peer: tuple[str, Timed] | None) -> list[dict[str, Any]]:
    """Tokens/s; on a GPU also mfu and memory."""
    train = recipe.train
    tokens = train.batch_size * train.seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    hardware = None if name is None else predict.device_called(name)
    sizes = {dim: size for dim, size in mesh.sizes.items() if size > 1}
    shape = shape_text(batch=train.micro_batch_size, micro_batches=train.batch_size // train.micro_batch_size
                       // mesh.size("replicate", "shard"), length=train.seq_len, precision=train.precision, **sizes,
                       **options_of(recipe), data="random" if data is None else "shards",
                       **({"threads": torch.get_num_threads()} if name is None else {"gpus": mesh.world}))
    more: dict[str, Any] = {"shape": shape, "device": name}
    speeds = [tokens / s for s in found.seconds]
    value, low, high = median_range(speeds)
    theirs = None if peer is None else median_range([tokens / s for s in peer[1].seconds])[0]
    rows = [row("train", recipe.name, value, "tokens/s", low=low, high=high, peer=None if peer is None else peer[0],
                peer_value=theirs, ratio=None if theirs is None else value / theirs, **more)]
    if found.losses:
        rows.append(row("train.loss", recipe.name, found.losses[-1], "nats", low=min(found.losses),
                        high=found.losses[0], **more))
    if hardware is not None:
        rate = hardware.flops if train.precision == "bf16" else hardware.flops_fp32
        assert rate is not None
        share = counts.training_flops(recipe.model, train.pass_len) / (rate * mesh.world)
        rows.append(row("train.mfu", recipe.name, value * share, "of peak", low=low * share, high=high * share,
                        bound=_product_rate(device) / rate, peer=None if peer is None else peer[0],
                        peer_value=None if theirs is None else theirs * share, **more))
        predicted = memory.peak(recipe.model, memory.plan(recipe, mesh.world))["memory_bytes"]
        rows.append(row("train.peak_memory", recipe.name, found.peak_memory / 1e9, "GB", bound=predicted / 1e9,
                        **more))
    return rows


def _product_rate(device: torch.device) -> float:
    """FLOP/s of a large product on the GPU at hand."""
    # graphs cannot be captured on the default stream
    with torch.cuda.stream(torch.cuda.Stream(device)):
        return measure_roofs(device).flops_per_s


def _check_same_work(batch: Batch) -> None:
    """The twin reads a row as one document and counts every target."""
    if batch.segments is not None or not batch.mask.all():
        raise ConfigError('against transformers needs data whose documents see each other and whose targets all count: '
                          'set data.boundaries = "leak" and nothing that leaves targets out, or drop data.')


def _beside_on_cpu(ours: _Ours, steps: int, data: str | None) -> list[dict[str, Any]]:
    """Both sides in turn, after the logits of one sequence are found alike."""
    model = ours.stepper.objective.model
    batch = ours.batch(0)
    _check_same_work(batch)
    tokens = torch.from_numpy(np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1))
    twin = transformers_twin(model)
    check_logits(model, twin, tokens)
    seconds = in_turn([ours.step, twin_step(twin, tokens)], repeats=steps)
    peer = (f"transformers {version('transformers')} {type(twin).__name__}", Timed(seconds[1], [], 0))
    return _rows(ours.recipe, ours.mesh, ours.device, Timed(seconds[0], [], 0), data, peer)


def _beside_on_gpu(recipe: Recipe, ours: _Ours, steps: int) -> tuple[str, Timed]:
    """The twin behind ours, whose memory it needs: the same weights, the same loss, the same steps."""
    device = ours.device
    model = Model(recipe.model)
    model.init_weights(recipe.train.seed)
    batches = [ours.batch(step) for step in range(WARM_UP + steps + 1)]
    for batch in batches:
        _check_same_work(batch)
    ours.stepper.objective.load_state_dict({f"model.{k}": v.to(device) for k, v in model.state_dict().items()})
    expected = ours.stepper.loss_sum(batches[0]).item() / batches[0].mask.sum()
    twin, kernels = on_kernels(transformers_twin(model), device)
    del ours.stepper
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return f"transformers {version('transformers')} {type(twin).__name__}{kernels}", time_twin(
        twin, batches, recipe, expected=expected, warm_up=WARM_UP, device=device)
