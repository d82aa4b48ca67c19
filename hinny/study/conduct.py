"""The verb `study`: from a study file to a report, in processes that can be stopped and taken up again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from hinny import predict
from hinny.config import load_recipe
from hinny.run import command_line, row, write_atomically
from hinny.study.collect import read_table
from hinny.study.config import PredictConfig, load_recipes, load_study
from hinny.study.execute import run_stage
from hinny.study.folder import claim_folder
from hinny.study.plan import Layout, Stage, stages
from hinny.study.progress import Display
from hinny.study.report import report
from hinny.study.summary import columns

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def study(source: str | Path, *, out: str | Path | None = None, text: Sequence[str | Path] | None = None,
          jsonl: str | Path | None = None, field: str | None = None, jobs: int | None = None,
          overrides: Iterable[str] = ()) -> Path:
    """Run the study in file `source`, or the shipped one of that name, and return the path of its report.

    out           the study's folder, out/NAME if not given; what is done in it is reused
    text, jsonl   files and folders, or a file of JSON lines, to train on in place of the study's; field names the text
                  in each line
    jobs          trainings at a time
    overrides     `key=value` of the study, for instance overrides.train.steps=50
    Raises ConfigError for a study that cannot be run or that changed since the folder was made, RunError when a job
    fails. Ctrl-C lets the running jobs save, tells how to go on, and exits with status 130.
    """
    given = {"prepare.text": [str(path) for path in text] if text else None,
             "prepare.jsonl": str(jsonl) if jsonl else None, "prepare.field": field, "jobs": jobs}
    # quoted, so that TOML reads a path as nothing else
    chosen = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    config = load_study(source, [*overrides, *chosen])
    recipes = load_recipes(config)
    layout = Layout(Path(out) if out else Path("out") / config.name)
    rows = predictions(config.predict) if config.predict else []
    claim_folder(config, recipes, layout)
    console = Console()
    _run(stages(config, recipes, layout, cores()), console, layout)
    if rows:
        write_atomically(layout.results / "predict.json", json.dumps(rows, indent=1) + "\n")
    page = report(layout.root)
    print_table(layout.root, console)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    return page


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _run(plan: list[Stage], console: Console, layout: Layout) -> None:
    total = sum(len(chain) for stage in plan for chain in stage.chains)
    try:
        with Display(console, total) as display:
            for stage in plan:
                run_stage(stage, display)
    except KeyboardInterrupt:
        console.print(f"Stopped; what was running has saved. The same command goes on from there: "
                      f"{command_line()} (folder {layout.root}).", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(INTERRUPTED) from None


def predictions(config: PredictConfig) -> list[dict[str, object]]:
    """Rows of each recipe: bytes of a sequence at each context; decode and prefill speed on each hardware besides."""
    rows: list[dict[str, object]] = []
    for recipe in map(load_recipe, config.recipes):
        for context in config.contexts:
            held = predict.inference_memory(recipe.model, predict.find_hardware(config.hardware[0]),
                                            batch=config.batch, context=context)
            rows.append(row("predicted_sequence", recipe.name, held["bytes_per_sequence"], "bytes",
                            shape=f"context={context}"))
        for name in config.hardware:
            hardware = predict.find_hardware(name)
            for context in config.contexts:
                step = predict.decode(recipe.model, hardware, batch=config.batch, context=context)
                shape = f"hardware={name} batch={config.batch} context={context} fits={'yes' if step['fits'] else 'no'}"
                rows.append(row("predicted_decode", recipe.name, step["tokens_per_s"], "tokens/s", shape=shape))
                read = predict.prefill(recipe.model, hardware, batch=config.batch, context=context, mfu=config.mfu)
                rows.append(row("predicted_prefill", recipe.name, read["tokens_per_s"], "tokens/s",
                                shape=f"{shape} mfu={config.mfu:g}"))
    return rows


def print_table(folder: Path, console: Console) -> None:
    """The short table of the study in `folder`; the best of each row is bold."""
    table = read_table(folder)
    grid = Grid(box=None, pad_edge=False)
    grid.add_column("")
    for name in table.about["recipes"]:
        grid.add_column(table.label(name), justify="right")
    for line in columns(table):
        grid.add_row(f"{line.title} ({line.unit})" if line.unit else line.title,
                     *(f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in line.cells))
    console.print(grid)
