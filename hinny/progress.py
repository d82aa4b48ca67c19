"""Progress of one long work on the terminal: a bar where there is one; for a training, else, a line now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINES = 10
"""How many lines a training prints at most where there is no terminal."""


def _note(record: dict[str, Any]) -> str:
    seconds = int(record["seconds_left"])
    # the share of the peak rate is there where the device is known
    share = f"  MFU {100 * record['mfu']:.1f} %" if "mfu" in record else ""
    return (f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s{share}  "
            f"{seconds // 60}:{seconds % 60:02d} left")


@contextmanager
def training_bar(name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes the loop's progress records: step, steps, loss, tokens_per_s, seconds_left, perhaps mfu."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(name, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None, note="")

        def update(record: dict[str, Any]) -> None:
            bar.update(task, total=record["steps"], completed=record["step"], note=_note(record))

        yield update


@contextmanager
def stage_bar() -> Iterator[Callable[[str, float], None]]:
    """A function that takes a stage's name and the share of it that is done; silent where there is no terminal."""
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


def _lines(name: str, console: Console) -> Callable[[dict[str, Any]], None]:
    def line(record: dict[str, Any]) -> None:
        if record["step"] % max(1, record["steps"] // LINES) == 0 or record["step"] == record["steps"]:
            console.print(f"{name}  step {record['step']}/{record['steps']}  {_note(record)}", highlight=False)

    return line
