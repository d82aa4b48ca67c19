"""Where the records of metrics.jsonl go as well, if [train] loggers asks for it: TensorBoard, Weights & Biases.

Both packages are optional and imported here alone, by name, when a run asks for them.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from hinny.config import Recipe
from hinny.errors import ConfigError, RunError
from hinny.run import Run, write_atomically

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""Logger → the module that it needs. The package that pip installs has the logger's name."""


class Writer(Protocol):
    """One place that records go to."""

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars by step, in RUN/tensorboard; what an earlier session wrote past `step` is hidden."""

    def __init__(self, module: Any, run: Run, recipe: Recipe, step: int) -> None:
        self._writer = module.SummaryWriter(log_dir=str(run.path / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One run of Weights & Biases for all sessions of a run directory, with the recipe as its configuration.

    Project, account and mode are those of its own environment variables (WANDB_PROJECT, WANDB_MODE ...). Its own count
    of steps would refuse the steps that are made again after a crash, so `step` is a figure that the others are drawn
    over: such steps are there twice, alike but for the clock.
    """

    def __init__(self, module: Any, run: Run, recipe: Recipe, step: int) -> None:
        file = run.path / "wandb.id"
        if not file.exists():
            write_atomically(file, secrets.token_hex(8) + "\n")
        try:
            known = file.read_text(encoding="utf-8").strip()
        except OSError as fault:
            raise RunError(f"{file} cannot be read: {fault.strerror}.") from None
        self._run = module.init(id=known, resume="allow", name=run.path.resolve().name, dir=str(run.path),
                                config=recipe.model_dump(mode="json"))
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(record)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[[Any, Run, Recipe, int], Writer]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_loggers(names: Sequence[str] | None) -> None:
    """ConfigError, with what to install, if the package of a logger is missing."""
    for name in names or ():
        _module(name)


@contextmanager
def writing(run: Run, recipe: Recipe, step: int) -> Iterator[list[Writer]]:
    """The writers that `recipe` asks for, of a run that goes on after `step`; closed at the end, whatever happens."""
    with ExitStack() as stack:
        writers = []
        for name in recipe.train.loggers or ():
            writers.append(WRITERS[name](_module(name), run, recipe, step))
            stack.callback(writers[-1].close)
        yield writers


def _module(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as fault:
        raise ConfigError(f'train.loggers has "{name}", which cannot be imported here ({fault}): pip install {name}, '
                          f'or take "{name}" out of train.loggers.') from None
