"""Whatever ends one process of a training ends the others soon, with a message, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_runs import converted, values_of

from hinny.checkpoint import saver
from hinny.config import Recipe, to_toml
from hinny.errors import CheckpointError, TrainingError
from hinny.model import Model
from hinny.run import Run
from hinny.train.heldout import HeldOut
from hinny.train.loop import train

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(recipe_of) -> Recipe:
    return recipe_of("-", micro_batch_size=2)


@pytest.fixture(scope="module")
def folder(recipe, data, tmp_path_factory) -> Path:
    """Where faulty_runs.py works: a recipe and data; then a run directory of each fault."""
    made = tmp_path_factory.mktemp("faults")
    (made / "tiny.toml").write_text(to_toml(recipe))
    shutil.copytree(data, made / "data")
    converted(made / "converted", values_of(recipe.model, seed=3), config=recipe.model)
    shutil.copytree(made / "converted", made / "converted, one process")
    return made


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    """What faulty_runs.py saw."""
    done = subprocess.run([sys.executable, HERE / "faulty_runs.py", str(folder)], env=ENVIRONMENT, timeout=400,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole(recipe, data, tmp_path_factory) -> Run:
    """The run of one process that nothing ends."""
    return train(recipe, tmp_path_factory.mktemp("whole"), data=data)


def same_as(whole: Run, run: Run) -> None:
    """One record of each step, and the losses of one process but for the order of sums in float32."""
    assert run.finished
    assert [r["step"] for r in run.metrics()] == [r["step"] for r in whole.metrics()]
    for ours, theirs in zip(run.metrics(), whole.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3), ours["step"]


GONE = ("another process of this training is gone or does not answer", "Look for its message",
        "The last checkpoint is whole: the same command goes on from there.")
LOST = ("the checkpoint of step 8 could not be written", "The last good checkpoint is step-00000004")
ENDS = {
    "killed": ([1, -9], 4, GONE, ()),
    "killed_in_save": ([1, -9], 4, (*GONE, *LOST, "another rank is gone"), ()),
    "file_gone": ([1, 1], 8, GONE, ("data-1/train.bin: it was opened, and now cannot be read: No such file",)),
    "file_cut": ([1, 1], 8, GONE, ("data-1/train.bin: 1000 bytes, ", "it was cut off or written anew")),
    "disk_full": ([1, 1], 4, (*LOST, "File too large (rank 1 of 2)"), (*LOST, "File too large (rank 1 of 2)")),
    "not_finite": ([1, 1], 4, ("step 6: the loss is nan", "The step was not applied", "sample 20", "step-00000004"),
                   ("step 6: the loss is nan", "The step was not applied", "sample 22", "step-00000004")),
    "wrong_code": ([1, 1], 4, GONE, ("Traceback", "RuntimeError: a bug of hinny, in two")),
    "records_lost": ([1, 1], 4, ("metrics.jsonl cannot be written: Is a directory",), GONE),
}
"""Fault → the exit codes, the step of the newest checkpoint, what the two ranks say."""


@pytest.mark.parametrize("fault", ENDS)
def test_a_fault_of_one_rank_ends_both_with_a_message_and_the_last_checkpoint_in_force(found, folder, recipe, whole,
                                                                                      fault):
    codes, steps, *told = ENDS[fault]
    assert (found[fault]["codes"], found[fault]["steps"]) == (codes, steps)
    for rank, parts in enumerate(told):
        said = found[fault]["said"][rank]
        assert [part for part in parts if part not in said] == [], said
        if codes[rank] == 1 and fault != "wrong_code":
            assert f"hinny: rank {rank}: " in said
            assert "Traceback" not in said
    records = folder / fault / "metrics"
    if records.exists():
        records.with_suffix(".jsonl").rmdir()
        records.rename(records.with_suffix(".jsonl"))
    same_as(whole, train(recipe, folder / fault, data=str(folder / "data")))


@pytest.mark.parametrize("who", ["one", "both"])
def test_a_signal_to_any_rank_stops_all_after_the_same_step_with_one_save(found, who):
    told = found[f"{who} told to stop"]
    assert (told["codes"], told["steps"]) == ([130, 130], 6)
    # the first process speaks for all
    assert ["saved at step 6; run the same command to go on." in said for said in told["said"]] == [True, False]


def test_the_same_command_goes_on_after_a_signal_and_a_finished_run_is_told_and_left(found, folder, whole):
    assert found["gone on"]["codes"] == found["finished"]["codes"] == [0, 0]
    assert "is finished: step 12 of 12" in found["finished"]["said"][0]
    run = Run(folder / "one")
    same_as(whole, run)
    assert [step.name for step in run.checkpoint_folders()] == ["step-00000008", "step-00000012"]


def test_two_ranks_begin_with_converted_weights_and_one_profile_is_written(found, folder, recipe):
    assert found["converted"]["codes"] == [0, 0]
    run = Run(folder / "converted")
    same_as(train(recipe, folder / "converted, one process", data=str(folder / "data")), run)
    assert run.checkpoint_folders()[0].name == "step-00000000"
    assert [file.name for file in (run.path / "profile").iterdir()] == ["steps-2-3.json"]


def test_ranks_whose_clocks_differ_make_the_same_records(found, folder, whole):
    """Rank 1 has always waited longer than log_seconds, rank 0 never."""
    assert found["late clock"]["codes"] == [0, 0]
    same_as(whole, Run(folder / "clock"))


@pytest.mark.parametrize(("case", "part"), [
    ("in use", "is in use by another process (pid "),
    ("steps to profile", "profile is '3:4'; it must be FROM:TO, steps that this call will make: steps 7 to 12"),
    ("another mesh", "x tensor 4 = 4 x what is left, but there are 2 processes"),
    ("another folder", "another one does not see it. Put the run directory on a disk that all of them share"),
    ("other data", "the data of rank 1 are not those of rank 0"),
    ("another recipe", "different recipes: optim.lr is 0.01 on the first and 0.02 on another")])
def test_what_one_rank_cannot_begin_with_is_told_by_both(found, folder, case, part):
    assert (found[case]["codes"], found[case]["steps"]) == ([1, 1], 6)
    for rank, said in enumerate(found[case]["said"]):
        assert f"hinny: rank {rank}: " in said
        assert part in said
        assert "Traceback" not in said


def test_a_save_that_fails_beside_a_loss_that_is_not_finite_does_not_hide_it(recipe, data, tmp_path, monkeypatch,
                                                                             caplog):
    poisoned, hidden = threading.Event(), Model.hidden

    def full(*_: Any, **__: Any) -> None:
        assert poisoned.wait(20)
        raise CheckpointError("the disk is full")

    def poison(*given: Any, **named: Any) -> torch.Tensor:
        poisoned.set()
        return hidden(*given, **named) * float("nan")

    def progress(now: dict[str, Any]) -> None:
        if now["step"] == 4:
            monkeypatch.setattr(Model, "hidden", poison)

    monkeypatch.setattr(saver, "write", full)
    with pytest.raises(TrainingError, match=r"(?s)step 5: the loss is nan.*good checkpoint: none was saved yet"):
        train(recipe, tmp_path / "run", data=data, progress=progress)
    assert "the disk is full" in caplog.text


def test_a_held_out_loss_that_is_not_finite_ends_the_run_before_its_weights_are_saved(recipe_of, data, tmp_path,
                                                                                      monkeypatch):
    record = HeldOut.record
    monkeypatch.setattr(HeldOut, "record", lambda self, stepper: record(self, stepper) | (
        {"held_out_loss": float("inf")} if stepper.optimizer.param_groups[0]["lr"] < 0.006 else {}))
    claim = r"(?s)step 8: held_out_loss is inf.*they are not saved.*good checkpoint: .*step-00000004"
    with pytest.raises(TrainingError, match=claim):
        train(recipe_of("-", eval_every=4), tmp_path / "run", data=data)
    assert Run(tmp_path / "run").steps_done == 4


def test_torchrun_ends_when_a_process_is_killed_or_it_is_stopped_and_starts_again_where_it_was(recipe_of, data,
                                                                                              tmp_path):
    recipe = recipe_of("-", micro_batch_size=2, steps=150, optim={"lr": 1e-3, "min_lr": 1e-4})
    (tmp_path / "tiny.toml").write_text(to_toml(recipe))
    run = Run(tmp_path / "run")

    def started(upto: int) -> subprocess.Popen[str]:
        """torchrun, once the records are past that step."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                   "hinny", "train", str(tmp_path / "tiny.toml"), "--data", data, "--out", str(run.path)]
        process = subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        end = time.monotonic() + 100
        while not (found := run.metrics()) or found[-1]["step"] < upto:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        # a checkpoint is written beside the steps, and may be behind them on a busy machine
        while not run.steps_done:
            assert time.monotonic() < end
            time.sleep(0.002)
        return process

    def ended(process: subprocess.Popen[str], act: Callable[[dict[int, int]], None]) -> str:
        """What torchrun printed, which ends soon after `act` was called with rank → process."""
        ranks = _ranks(process.pid)
        act(ranks)
        try:
            said, _ = process.communicate(timeout=40)
        finally:
            if process.poll() is None:
                for one in (process.pid, *ranks.values()):
                    os.kill(one, signal.SIGKILL)
        assert process.returncode == 1
        return said

    said = ended(started(6), lambda ranks: os.kill(ranks[1], signal.SIGKILL))
    assert re.search(r"hinny: rank 0: another process of this training is gone.*same command goes on", said), said
    good = run.steps_done
    assert good >= 4
    process = started(good + 4)
    said = ended(process, lambda _: process.send_signal(signal.SIGTERM))
    assert good < run.steps_done < 150, said
    assert f"saved at step {run.steps_done}; run the same command to go on." in said
    same_as(train(recipe, tmp_path / "whole", data=data), train(recipe, run.path, data=data))


def _ranks(launcher: int) -> dict[int, int]:
    """Rank → process, of those that the launcher started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for setting in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if setting.startswith("RANK="):
                found[int(setting.removeprefix("RANK="))] = int(child)
    return found
