"""Saves that die of SIGKILL: a rank among others, and one process at each of the moments of a save, in turn.

A program of its own, which forks: the ranks and the many processes that die need not import torch each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import EXTRA, RECIPE, advance, built, contents, differ, stage, trained

from hinny.checkpoint import Saver, clean, latest, load_model, save, store
from hinny.errors import CheckpointError
from hinny.run import Run

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die(*_: Any, **__: Any) -> None:
    """As from kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def pairs(folder: Path) -> dict[str, Any]:
    """Two pairs of ranks save each a run of two stages; how each rank ended, what those that live were told, and what
    is loaded. They are numbered from 0 to 3.
    """
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            _rank(rank, folder)
        children.append(child)
    found: dict[str, Any] = {"codes": [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children],
                             "said": [(folder / f"said-{rank}").read_text() for rank in (0, 3)]}
    expected = contents(trained(built(0), 2)[0])
    for number in (0, 1):
        run = Run(folder / f"pair-{number}")
        found[f"differ {number}"] = differ(contents(load_model(run)), expected)
        clean(run)
        found[f"folders {number}"] = [file.name for file in run.checkpoints.iterdir()]
    return found


def _rank(rank: int, folder: Path) -> None:
    """Rank 1 dies when its shard is written, rank 2, the first of its pair, when all is written and nothing renamed."""
    number = rank // 2
    dist.init_process_group("gloo", init_method=f"file://{folder / f'meeting-{number}'}", rank=rank % 2, world_size=2,
                            timeout=timedelta(seconds=180))
    group = dist.new_group(backend="gloo")
    run = Run(folder / f"pair-{number}")
    if rank % 2 == 0:
        run.write_recipe(RECIPE)
    model, optimizer = trained(stage(built(0), rank % 2, 2), 2)
    save(run, 2, model, optimizer, EXTRA, group=group)
    advance(model, optimizer)
    write_data = dcp.FileSystemWriter.write_data
    if rank == 1:
        dcp.FileSystemWriter.write_data = lambda *a: die(write_data(*a))  # type: ignore[method-assign]
    if rank == 2:
        store.sync = die  # type: ignore[assignment]
    saver = Saver(run, group)
    saver.start(4, model, optimizer, EXTRA)
    try:
        saver.wait()
    except CheckpointError as fault:
        (folder / f"said-{rank}").write_text(str(fault))
    # the group has lost a member: it is not taken down in order
    os._exit(0)


def every_moment(folder: Path) -> dict[str, list[Any]]:
    """Kill the save of step 6 before each thing that it does to a file; what is loaded afterwards, by moment."""
    model, optimizer = trained(built(0), 1)
    base = Run(folder / "base")
    base.write_recipe(RECIPE)
    expected = {}
    for step in (2, 4):
        save(base, step, model, optimizer, EXTRA)
        expected[step] = contents(model)
        advance(model, optimizer)
    expected[6] = contents(model)
    found: dict[str, list[Any]] = {"steps": [], "wrong": [], "left": []}
    for moment in range(1000):
        run = Run(folder / f"run-{moment}")
        shutil.copytree(base.path, run.path)
        child = os.fork()
        if child == 0:
            _save_until(moment, run, model, optimizer)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        good = latest(run)
        assert good is not None
        step = int(good.name.removeprefix("step-"))
        found["steps"].append(step)
        found["wrong"] += differ(contents(load_model(run)), expected[step])
        clean(run)
        found["left"] += [file.name for file in run.checkpoints.iterdir() if not file.name.startswith("step-")]
        shutil.rmtree(run.path)
        if not killed:
            break
    return found


def _save_until(moment: int, run: Run, model: Any, optimizer: Any) -> None:
    """Save, and die before event number `moment`; exit if there are fewer."""
    events = iter(range(moment))

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and (event != "open" or str(run.path) in str(args[0])) and next(events, None) is None:
            die()

    sys.addaudithook(watch)
    with Saver(run) as saver:
        saver.start(6, model, optimizer, EXTRA)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    there = Path(sys.argv[1])
    print(json.dumps({"pairs": pairs(there), "moments": every_moment(there)}))
