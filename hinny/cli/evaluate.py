"""The verb that evaluates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hinny.cli.shared import Json, Threads, numbers, print_rows, set_threads


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="Run directory.")] = None,
    tasks: Annotated[list[str] | None, typer.Argument(help="Names of tasks; --list shows them.")] = None,
    suite: Annotated[str | None, typer.Option(help="paper-short, paper-long, synthetic or extension.")] = None,
    list_tasks: Annotated[bool, typer.Option("--list", help="Show all tasks and what they need.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of data sets, laid out as the Hub's ids.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of tasks made at lengths, such as 4096,8192.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each task, at each length.")] = None,
    pairs: Annotated[str | None, typer.Option(help="mqar: numbers of key-value pairs.")] = None,
    windows: Annotated[int | None, typer.Option(help="heldout: windows of the training length.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the samples that are made.")] = None,
    shots: Annotated[int | None, typer.Option(help="Standard tasks: worked examples, if not as the name says.")] = None,
    ruler_version: Annotated[str | None, typer.Option(help="head or 2024-06.")] = None,
    haystack: Annotated[Path | None, typer.Option(help="A text to hide needles in, or for position-text.")] = None,
    truncate: Annotated[str | None, typer.Option(help="What is too long: error, or cut middle or left of its "
                                                      "document.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens that a sample may take; of a model with positions by "
                                                        "default those of its training.")] = None,
    missing: Annotated[str, typer.Option(help="Tasks whose data is not there: error or skip.")] = "error",
    save_samples: Annotated[bool, typer.Option("--save-samples", help="Write every prompt and answer.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run also what is finished.")] = False,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens through the model at once.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp32, or stored: as in the checkpoint; bf16 on "
                                                        "a GPU, fp32 on a CPU.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run: short and long-context tasks, recall, held-out loss. Stopped, the same command goes on."""
    if list_tasks:
        others = (run, tasks or None, suite, data, lengths, samples, pairs, windows, seed, shots, ruler_version,
                  haystack, truncate, max_length, batch_tokens, device, precision, threads)
        if any(option is not None for option in others) or save_samples or again or missing != "error":
            raise typer.BadParameter("--list goes with --json alone.")
        _print_list(as_json)
        return
    if run is None or not (tasks or suite):
        raise typer.BadParameter("name a run, and tasks or a --suite; --list shows them.")
    given: dict[str, Any] = {
        "data": data, "samples": samples, "windows": windows, "seed": seed, "shots": shots, "haystack": haystack,
        "ruler_version": ruler_version, "truncate": truncate, "max_length": max_length, "missing": missing,
        "save_samples": save_samples, "again": again, "batch_tokens": batch_tokens, "device": device,
        "precision": precision, "lengths": None if lengths is None else numbers(lengths, "--lengths"),
        "pairs": None if pairs is None else numbers(pairs, "--pairs")}
    _evaluate(run, tasks or [], suite, given, threads, as_json)


def _evaluate(run: Path, tasks: list[str], suite: str | None, given: dict[str, Any], threads: int | None,
              as_json: bool) -> None:
    from hinny.evals import EvalOptions
    from hinny.evals import evaluate as go
    from hinny.progress import stage_bar

    set_threads(threads)
    try:
        with stage_bar() as progress:
            rows = go(run, tasks, EvalOptions(**given), suite=suite, progress=progress)
    except KeyboardInterrupt:
        print(f"{run}: stopped; run the same command to go on with what is not finished.", file=sys.stderr)
        sys.exit(130)
    if suite == "extension":
        from hinny.study.extension import report

        print(f"Page: {report(run)}", file=sys.stderr)
    print_rows(rows, as_json)


def _print_list(as_json: bool) -> None:
    """A line a task; as JSON also what each needs, with the command that fetches it."""
    from hinny.evals.suites import listing

    found = listing()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    lines = [("task", "suites", "version", "shots", "metrics")]
    lines += [(task["name"] + ("*" if task["data"] else ""), ",".join(task["suites"]), task["version"],
               str(task["shots"]), ",".join(task["metrics"])) for task in found]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    print("* needs data: --list --json says which, how large, under which licence, and how to fetch it.")
