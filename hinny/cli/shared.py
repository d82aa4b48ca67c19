"""What several verbs share: their common options, lists of numbers, rows on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from hinny.errors import BackendError

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Tensor = Annotated[int, typer.Option(min=1, help="Processes that share the model, on a GPU each: start as many by "
                                                 "torchrun --nproc-per-node N -m hinny ...")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")]


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers in `text`; a mistake names `option`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 64,128,256.",
                                 param_hint=option) from None


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows of results, as a table or as JSON."""
    from hinny.show import render_rows

    print(json.dumps(rows, indent=1) if as_json else render_rows(rows))


def set_threads(threads: int | None) -> None:
    """PyTorch's threads, without importing it where none are asked for."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def ranks_told() -> Iterator[None]:
    """A process that failed, of those that share a model, is a message without a trace: it has shown its own."""
    from hinny.checkpoint.ranks import RankFailure

    try:
        yield
    except RankFailure as fault:
        raise BackendError(f"the processes of --tensor have ended: {fault}.") from None
