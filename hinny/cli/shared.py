"""What several verbs share: their common options, lists of numbers, rows on the terminal."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
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
