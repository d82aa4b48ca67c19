"""The verb `study`: from a study file to a report, in processes that can be stopped and taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from hinny import memory, predict
from hinny.config import Recipe, load_recipe
from hinny.run import command_line, row, write_atomically
from hinny.study.collect import read_table
from hinny.study.config import PredictConfig, load_recipes, load_study
from hinny.study.devices import Devices, find_devices, gpu_memory
from hinny.study.execute import Stages, sigterm_as_interrupt
from hinny.study.folder import claim_folder
from hinny.study.plan import Layout, Stage, stages
from hinny.study.progress import Display
from hinny.study.report import TRANSPOSED, report
from hinny.study.share import Claims
from hinny.study.summary import columns

CACHED, CONTEXT = 1.15, 8e8
"""Five trainings of 13 to 17 GB by prediction filled an H100, and three did not."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def study(source: str | Path, *, out: str | Path | None = None, text: Sequence[str | Path] | None = None,
          jsonl: str | Path | None = None, field: str | None = None, jobs: int | None = None,
          overrides: Iterable[str] = ()) -> Path:
    """Run the study in file `source`, or the shipped one of that name, and return the path of its report.

    out           the study's folder, out/NAME if not given; what is done in it is reused
    text, jsonl   files and folders, or a file of JSON lines, to train on in place of the study's; field names the text
                  in each line
    jobs          trainings at a time: on each GPU, or without GPUs in all
    overrides     `key=value` of the study, for instance overrides.train.steps=50
    Several processes may run the same study in one folder, on one machine or many: each takes what no other has, and
    one writes the report.
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
    devices = find_devices(cores())
    console, claims = Console(), Claims(layout.root)
    with _interruptible(console, layout):
        with claims.holding("folder"):
            claim_folder(config, recipes, layout)
        if devices.gpus:
            _say(console, f"GPUs of this process: {', '.join(devices.gpus)}. Trainings at a time on each: "
                          f"{config.jobs or 1}.")
            if crowded := too_many(recipes, config.jobs or 1, gpu_memory(devices.gpus)):
                _say(console, crowded)
        here = config.model_copy(update={"jobs": devices.slots(config.jobs)})
        plan = stages(here, recipes, layout, cores())
        _run(plan, console, claims, devices)
        # named by its jobs: the report of some is not that of more, should the study have grown meanwhile
        name = f"report-{hashlib.sha256(repr(_names(plan)).encode()).hexdigest()[:12]}"
        with claims.holding(name):
            if claims.due(name):
                _report(layout, rows, console)
                claims.mark(name)
                claims.forget_failures()
    page = layout.root / "report.html"
    _say(console, f"Report: {page}")
    return page


def too_many(recipes: dict[str, Recipe], jobs: int, usable: int | None) -> str:
    """That the largest `jobs` trainings together may not fit a GPU of so many bytes; "" where they do, or unknown.

    A training takes what `hinny.memory` predicts, CACHED times as much in PyTorch's cache, and what CUDA has beside it.
    """
    peaks = sorted(((memory.peak(recipe.model, memory.plan(recipe, 1))["memory_bytes"], name)
                    for name, recipe in recipes.items()), reverse=True)
    # with more of them at a time than recipes, the next seed's
    needs = ([CACHED * peak + CONTEXT for peak, _ in peaks] * jobs)[:jobs]
    if usable is None or jobs == 1 or sum(needs) <= usable:
        return ""
    fitting = max(1, int(usable // needs[0]))
    return (f"{jobs} trainings at a time may not fit a GPU of {usable / 1e9:.0f} GB: {peaks[0][1]} alone takes about "
            f"{needs[0] / 1e9:.0f}. With jobs={fitting} all fit.")


def _run(plan: list[Stage], console: Console, claims: Claims, devices: Devices) -> None:
    total = len(_names(plan))
    with Display(console, total) as display:
        Stages(display, claims, devices).run(plan)
    if display.foreign:
        _say(console, f"This process ran {display.ran} of {total} jobs.")


def _names(plan: list[Stage]) -> list[str]:
    return [job.name for stage in plan for chain in stage.chains for job in chain]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _report(layout: Layout, rows: list[dict[str, object]], console: Console) -> None:
    if rows:
        write_atomically(layout.results / "predict.json", json.dumps(rows, indent=1) + "\n")
    report(layout.root)
    print_table(layout.root, console)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _interruptible(console: Console, layout: Layout) -> Iterator[None]:
    """Within: Ctrl-C and SIGTERM tell how to go on, and end the study with status 130."""
    try:
        with sigterm_as_interrupt():
            yield
    except KeyboardInterrupt:
        _say(console, f"Stopped; what was running has saved. The same command goes on from there: {command_line()} "
                      f"(folder {layout.root}).")
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
    """The short table of the study in `folder`; the best of each measure is bold. Many models are rows."""
    table = read_table(folder)
    names, lines = [table.label(name) for name in table.about["recipes"]], columns(table)
    titles = [f"{line.title} ({line.unit})" if line.unit else line.title for line in lines]
    cells = [[f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in line.cells] for line in lines]
    if len(names) > TRANSPOSED:
        names, titles, cells = titles, names, [list(column) for column in zip(*cells, strict=True)]
    grid = Grid(box=None, pad_edge=False)
    grid.add_column("")
    for name in names:
        grid.add_column(name, justify="right")
    for title, texts in zip(titles, cells, strict=True):
        grid.add_row(title, *texts)
    console.print(grid)
