"""The command line: one verb, one function. Options are checked and explained here; the work is done elsewhere."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hinny.cli.bench import bench
from hinny.cli.data import prepare
from hinny.cli.evaluate import evaluate
from hinny.cli.generate import generate
from hinny.cli.serve import serve
from hinny.cli.shared import Json, Overrides, Threads, print_rows
from hinny.errors import HinnyError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Design, train, evaluate, time and compare Mamba, Mamba-2, Transformer and hybrid models.")


def main() -> None:
    """Run the command line; a user's mistake ends it with one message and exit code 1."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hinny").setLevel(logging.INFO)
    try:
        app()
    except HinnyError as mistake:
        several = os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ
        rank = f"rank {os.environ['RANK']}: " if several else ""
        print(f"hinny: {rank}{mistake}", file=sys.stderr)
        sys.exit(1)


@app.command()
def show(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's file or shipped name.")] = None,
    overrides: Overrides = None,
    pattern: Annotated[bool, typer.Option("--pattern", help="Only allocate a layer pattern.")] = False,
    layers: Annotated[int | None, typer.Option(help="With --pattern: number of layers.")] = None,
    attention_ratio: Annotated[float, typer.Option(help="With --pattern: share of attention layers.")] = 0.0,
    mlp_ratio: Annotated[float, typer.Option(help="With --pattern: share of MLP layers.")] = 0.0,
    override: Annotated[str | None, typer.Option(help="With --pattern: a pattern of one's own to check.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Hardware of the predictions; H100 without it.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak FLOP/s assumed for prefill and for all that "
                                                   "training executes, above 0 and at most 1; 0.3 without it.")] = None,
    as_json: Json = False,
) -> None:
    """Layers, parameters, FLOPs, memory and predicted speed of a recipe; needs no GPU."""
    from hinny.show import MFU, render, show_pattern
    from hinny.show import show as show_recipe

    if pattern:
        if recipe is not None or layers is None:
            raise typer.BadParameter("--pattern takes --layers and no recipe.")
        for option, given in (("--hardware", hardware), ("--mfu", mfu)):
            if given is not None:
                raise typer.BadParameter(f"{option} has no effect with --pattern; drop it.")
        figures = show_pattern(layers, attention_ratio, mlp_ratio, override)
    else:
        if recipe is None:
            raise typer.BadParameter("name a recipe, or use --pattern.")
        if layers is not None or attention_ratio or mlp_ratio or override is not None:
            raise typer.BadParameter("--layers, --attention-ratio, --mlp-ratio and --override go with --pattern; "
                                     "a recipe is changed by key=value, for instance model.n_layers=24.")
        from hinny.config import load_recipe

        figures = show_recipe(load_recipe(recipe, overrides or ()), hardware=hardware or "H100",
                              mfu=MFU if mfu is None else mfu)
    print(json.dumps(figures, indent=1) if as_json else render(figures))


app.command()(prepare)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file or shipped name.")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Folder made by hinny prepare.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; out/NAME by default.")] = None,
    threads: Threads = None,
    profile: Annotated[str | None, typer.Option(metavar="FROM:TO", help="Steps to write a profiler trace of.")] = None,
) -> None:
    """Train a recipe, or go on with a run that was stopped."""
    from hinny.config import load_recipe
    from hinny.progress import training_bar
    from hinny.train.loop import train as run

    loaded = load_recipe(recipe, overrides or ())
    with training_bar(loaded.name) as bar:
        found = run(loaded, out or Path("out") / loaded.name, data=data, progress=bar, threads=threads, profile=profile)
    first = int(os.environ.get("RANK", 0)) == 0
    if not found.finished:
        if first:
            print(f"{found.path}: saved at step {found.steps_done}; run the same command to go on.", file=sys.stderr)
        sys.exit(130)
    if first:
        print(f"{found.path}: finished at step {found.steps_done}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint's folder or Hub id; with --to, a run directory.")],
    target: Annotated[Path | None, typer.Argument(help="The run to write; with --to, the folder.")] = None,
    to: Annotated[str | None, typer.Option(help="Write a run in this format, nemotron_h for instance.")] = None,
    source_format: Annotated[str | None, typer.Option("--from", help="SOURCE's format, where it is not clear.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the mapping, write nothing.")] = False,
    layout: Annotated[str | None, typer.Option(help="megatron: names, released or current.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="megatron: tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="megatron: pipeline-parallel ranks.")] = 1,
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer's file, bytes, or none.")] = None,
    verify: Annotated[str | None, typer.Option(help="Hold it against what is known of this release; without TARGET, "
                                                    "SOURCE is a run that was converted from it.")] = None,
    piqa: Annotated[Path | None, typer.Option(help="With --verify: PIQA as JSON lines, to be scored.")] = None,
    as_json: Json = False,
) -> None:
    """Other programs' checkpoints into runs, and runs into theirs."""
    from hinny.checkpoint.convert import convert as go
    from hinny.checkpoint.shown import render
    from hinny.progress import stage_bar

    if piqa is not None and (verify is None or dry_run):
        raise typer.BadParameter("--piqa goes with --verify, and not with --dry-run.")
    is_run = verify is not None and target is None and not dry_run
    if is_run and (to or source_format or layout or tokenizer or (tp, pp) != (1, 1)):
        raise typer.BadParameter("without a TARGET only --piqa and --json go with --verify.")
    found: dict[str, Any] = {}
    with stage_bar() as progress:
        if not is_run:
            found = go(source, target, to=to, format=source_format, dry_run=dry_run, layout=layout, tp=tp, pp=pp,
                       tokenizer=tokenizer, verify=verify, progress=progress)
        if verify is not None and not dry_run:
            from hinny.evals.released import verify as check

            found["checks"] = check(target or source, verify, piqa=piqa, progress=progress)
    print(json.dumps(found, indent=1) if as_json else render(found))
    if found.get("problems") or not all(item["passed"] for item in found.get("checks", [])):
        sys.exit(1)


app.command("eval")(evaluate)
app.command()(bench)


@app.command()
def tune(
    kernels: Annotated[list[str] | None, typer.Argument(help="Kernels; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of tables; by default the one that launches read.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how kernels are best launched on this machine's GPU."""
    from hinny.tune import tune as measure

    print_rows(measure(kernels or (), out=out), as_json)


app.command()(generate)
app.command()(serve)


@app.command()
def study(
    source: Annotated[str, typer.Argument(help="A study's file or shipped name.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Study directory; out/NAME by default.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text files or folders to train on; may be repeated.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="A JSON-lines file to train on, with --field.")] = None,
    field: Annotated[str | None, typer.Option(help="With --jsonl: the field that holds the text.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time, on each GPU if any.")] = None,
) -> None:
    """The main job: several recipes on the same data, evaluated and timed alike, one report."""
    from hinny.study.conduct import study as run

    run(source, out=out, text=text, jsonl=jsonl, field=field, jobs=jobs, overrides=overrides or ())


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Study directory, or a run with extension.json.")]) -> None:
    """Write the report of a study, or of a run's extension, again from its result files."""
    from hinny.study import extension
    from hinny.study.report import report as write

    print((extension.report if (folder / extension.FILE).is_file() else write)(folder))
