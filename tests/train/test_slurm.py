"""The SLURM scripts stop the training in time, requeue a job that has saved, and nothing else."""

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

SCRIPTS = {path.stem: path for path in (Path(__file__).parents[2] / "docs" / "slurm").glob("*.sbatch")}
TASKS = {"train": 1, "train-multinode": 2, "study": 1}
TRAINING = (("tiny-hybrid", "my data", "my run", "train.steps=5"),
            "train tiny-hybrid train.steps=5 --data my data --out my run\n")
CALLS = {"train": TRAINING, "train-multinode": TRAINING,
         "study": (("quick", "my out", "jobs=2"), "study quick jobs=2 --out my out\n")}
"""Script → its arguments, and those of hinny."""
PROGRAMS = {
    "hinny": """#!/bin/bash
rank=${RANK:-0}
echo "$@" > "$STUB/arguments-$rank"
echo "${LOCAL_RANK:-} ${WORLD_SIZE:-} ${MASTER_ADDR:-} ${MASTER_PORT:-}" > "$STUB/place-$rank"
trap 'sleep 0.2; echo saved > "$STUB/saved-$rank"; exit '"$STATUS" TERM
touch "$STUB/started-$rank"
if [ -n "$ENDS" ]; then exit "$ENDS"; fi
while :; do sleep 0.02; done
""",
    "scontrol": """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" > "$STUB/scontrol"; fi
""",
    # as SLURM's: two tasks, the highest of their statuses; a TERM that it gets itself ends them
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$STUB/srun"; shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > "$STUB/tasks"
trap 'kill -KILL "${tasks[@]}"; exit 137' TERM
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    if [ $status -gt $highest ]; then highest=$status; fi
done
exit $highest
""",
    "scancel": """#!/bin/bash
echo "$@" > "$STUB/scancel"
kill -TERM $(cat "$STUB/tasks")
""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_told_to_stop_saves_and_ends_with_status_130(recipe_of, data, tmp_path, monkeypatch, number):
    (tmp_path / "tiny.toml").write_text(to_toml(recipe_of("-")))
    begin = Stepper.begin

    def signalled(self, index, batch):
        if index == 1:
            os.kill(os.getpid(), number)
        return begin(self, index, batch)

    monkeypatch.setattr(Stepper, "begin", signalled)
    monkeypatch.setattr(sys, "argv", ["hinny", "train", str(tmp_path / "tiny.toml"), "--data", data,
                                      "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert Run(tmp_path / "run").steps_done == 2


def job(script: str, folder: Path, *, send: signal.Signals | None, status: int = 130, ends: str = "",
        **more: str) -> int:
    """The script's exit status, with a training that ends with `status` at SIGTERM or with `ends` by itself."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "STUB": str(folder), "STATUS": str(status), "ENDS": ends,
           "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "8", **more}
    line = ["bash", str(SCRIPTS[script]), *CALLS[script][0]]
    with subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while len(list(folder.glob("started-*"))) < TASKS[script] or (TASKS[script] > 1
                                                                      and not (folder / "tasks").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if send is not None:
            process.send_signal(send)
        if send == signal.SIGTERM:
            # SLURM ends what it has told to stop, and requeues a pre-empted job that is still there
            while len(list(folder.glob("saved-*"))) < TASKS[script]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        return process.wait(20)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_runs_out_of_time_waits_for_the_save_and_is_requeued(tmp_path, script):
    assert job(script, tmp_path, send=signal.SIGUSR1) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    for rank in range(TASKS[script]):
        assert (tmp_path / f"saved-{rank}").exists()
        assert (tmp_path / f"arguments-{rank}").read_text() == CALLS[script][1]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("send", "status", "ends", "code"), [
    (signal.SIGTERM, 130, "", 130),  # cancelled or pre-empted: it saves, and is SLURM's
    (signal.SIGUSR1, 1, "", 1),      # could not save
    (None, 130, "0", 0),             # finished
    (None, 130, "1", 1),             # failed
])
def test_no_other_job_is_requeued(tmp_path, script, send, status, ends, code):
    assert job(script, tmp_path, send=send, status=status, ends=ends) == code
    for rank in range(TASKS[script]):
        assert (tmp_path / f"saved-{rank}").exists() == (send is not None)
    assert not (tmp_path / "scontrol").exists()


def test_a_task_of_an_array_requeues_itself_alone(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    assert job("study", tmp_path, send=signal.SIGUSR1, **array) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 77_3\n"


def test_the_tasks_of_several_machines_know_their_places_and_are_signalled_themselves(tmp_path):
    assert job("train-multinode", tmp_path, send=signal.SIGUSR1) == 0
    assert [(tmp_path / f"place-{rank}").read_text() for rank in range(2)] == [
        "0 2 node-a 20077\n", "1 2 node-a 20077\n"]
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 77\n"
    # one that has ended does not let the others wait until the time is up
    assert {"--wait=60", "--cpus-per-task=8"} == set((tmp_path / "srun").read_text().split())


@pytest.mark.parametrize(("script", "seconds"), [("train", 120), ("train-multinode", 300), ("study", 300)])
def test_the_warning_comes_to_the_script_before_the_end_and_the_job_may_be_requeued(script, seconds):
    options = {line.split()[1] for line in SCRIPTS[script].read_text().splitlines() if line.startswith("#SBATCH ")}
    assert {f"--signal=B:USR1@{seconds}", "--requeue", "--open-mode=append"} <= options
