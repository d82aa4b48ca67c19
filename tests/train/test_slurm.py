"""The SLURM script stops the training in time, requeues a job that has saved, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hinny.cli import main
from hinny.config import to_toml
from hinny.run import Run
from hinny.train.step import Stepper

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "train.sbatch"
HINNY = """#!/bin/bash
echo "$@" > "$STUB/arguments"
trap 'sleep 0.2; echo saved > "$STUB/saved"; exit '"$STATUS" TERM
touch "$STUB/started"
if [ -n "$ENDS" ]; then exit "$ENDS"; fi
while :; do sleep 0.02; done
"""
SCONTROL = """#!/bin/bash
echo "$@" > "$STUB/scontrol"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_told_to_stop_saves_and_ends_with_status_130(recipe_of, data, tmp_path, monkeypatch, number):
    (tmp_path / "tiny.toml").write_text(to_toml(recipe_of("-")))
    step = Stepper.step

    def signalled(self, index, batch):
        if index == 1:
            os.kill(os.getpid(), number)
        return step(self, index, batch)

    monkeypatch.setattr(Stepper, "step", signalled)
    monkeypatch.setattr(sys, "argv", ["hinny", "train", str(tmp_path / "tiny.toml"), "--data", data,
                                      "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert Run(tmp_path / "run").steps_done == 2


def job(folder: Path, *, send: signal.Signals | None, status: int = 130, ends: str = "") -> int:
    """The script's exit status, with a training that ends with `status` at SIGTERM or with `ends` by itself."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("hinny", HINNY), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "STUB": str(folder), "STATUS": str(status), "ENDS": ends,
           "SLURM_JOB_ID": "77"}
    arguments = ["tiny-hybrid", "my data", "my run", "train.steps=5"]
    with subprocess.Popen(["bash", str(SCRIPT), *arguments], env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not (folder / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if send is not None:
            process.send_signal(send)
        return process.wait(20)


def test_a_job_that_runs_out_of_time_waits_for_the_save_and_is_requeued(tmp_path):
    assert job(tmp_path, send=signal.SIGUSR1) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    assert (tmp_path / "arguments").read_text() == "train tiny-hybrid train.steps=5 --data my data --out my run\n"


@pytest.mark.parametrize(("send", "status", "ends", "code"), [
    (signal.SIGTERM, 130, "", 130),  # cancelled: it saves, and stays away
    (signal.SIGUSR1, 1, "", 1),      # could not save
    (None, 130, "0", 0),             # finished
    (None, 130, "1", 1),             # failed
])
def test_no_other_job_is_requeued(tmp_path, send, status, ends, code):
    assert job(tmp_path, send=send, status=status, ends=ends) == code
    assert (tmp_path / "saved").exists() == (send is not None)
    assert not (tmp_path / "scontrol").exists()


def test_the_warning_comes_to_the_script_before_the_end_and_the_job_may_be_requeued():
    options = {line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")}
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= options
