"""Which GPUs a process of a study has, alone and under launchers, and what its jobs are told."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from hinny.errors import RunError
from hinny.study import plan
from hinny.study.conduct import too_many
from hinny.study.config import load_recipes, load_study
from hinny.study.devices import Devices, find_devices, gpu_memory, job_environment, place, visible_gpus
from hinny.study.execute import Stages
from hinny.study.plan import Job, Stage
from hinny.study.share import Claims

EIGHT = ",".join(map(str, range(8)))
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "16", "ROLE_NAME": "default",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_ERROR_FILE": "/tmp/error.json"}


def nvidia_smi(folder: Path, says: str, status: int = 0) -> dict[str, str]:
    """An environment in which nvidia-smi says that."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && cat <<'END'\n{says}\nEND\nexit {status}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/bin:/usr/bin"}


def test_all_gpus_of_the_machine_are_found_or_those_that_are_told(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = nvidia_smi(tmp_path, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b)")
    monkeypatch.setenv("PATH", env["PATH"])
    assert visible_gpus(env) == ("0", "1")
    assert visible_gpus({**env, "CUDA_VISIBLE_DEVICES": "1"}) == ("1",)
    assert visible_gpus({**env, "CUDA_VISIBLE_DEVICES": "GPU-b, GPU-a"}) == ("GPU-b", "GPU-a")
    assert visible_gpus({**env, "CUDA_VISIBLE_DEVICES": "3,-1,0"}) == ("3",)
    assert visible_gpus({**env, "CUDA_VISIBLE_DEVICES": ""}) == ()


def test_the_parts_of_a_gpu_that_is_cut_up_count_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = nvidia_smi(tmp_path, """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)
  MIG 3g.40gb     Device  0: (UUID: MIG-x)
  MIG 3g.40gb     Device  1: (UUID: MIG-y)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b)""")
    monkeypatch.setenv("PATH", env["PATH"])
    assert visible_gpus(env) == ("MIG-x", "MIG-y", "1")


def test_without_nvidia_smi_there_is_no_gpu_and_one_that_fails_is_told(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({"PATH": str(tmp_path)}) == ()
    assert not caplog.messages
    env = nvidia_smi(tmp_path, "couldn't communicate with the NVIDIA driver", 9)
    monkeypatch.setenv("PATH", env["PATH"])
    assert visible_gpus(env) == ()
    assert "nvidia-smi -L ends with status 9 (couldn't communicate" in caplog.text


@pytest.mark.parametrize(("env", "expected"), [
    ({}, (0, 1)),
    (TORCHRUN, (3, 8)),
    # srun with 2, 2 and 4 tasks on three nodes
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}, (1, 4)),
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}, (1, 2)),
    # torchrun once on each node
    ({**TORCHRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}, (3, 8)),
    # a batch script, one of an array: alone on what it was given
    ({"SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_ARRAY_TASK_ID": "3"}, (0, 1))])
def test_the_place_on_the_machine_is_what_the_launcher_says(env: dict[str, str], expected: tuple[int, int]) -> None:
    assert place(env) == expected


@pytest.mark.parametrize(("gpus", "rank", "size", "mine"), [
    (EIGHT, 0, 1, tuple(EIGHT.split(","))), (EIGHT, 3, 8, ("3",)), (EIGHT, 1, 2, ("1", "3", "5", "7")),
    (EIGHT, 2, 3, ("2", "5")), ("4,5", 3, 4, ("5",)), ("4,5", 2, 4, ("4",)), ("", 1, 2, ())])
def test_the_processes_of_a_machine_share_its_gpus_evenly(gpus: str, rank: int, size: int,
                                                           mine: tuple[str, ...]) -> None:
    env = {"CUDA_VISIBLE_DEVICES": gpus, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    devices = find_devices(16, env)
    assert devices.gpus == mine
    assert devices.cores == 16 // size


def test_a_node_that_its_step_does_not_tell_of_is_refused() -> None:
    with pytest.raises(RunError, match=r"SLURM_NODEID is 2.*2 nodes"):
        place({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "2"})


def test_what_slurm_gives_to_one_task_is_all_its_own() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2", "SLURM_STEP_TASKS_PER_NODE": "4",
           "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}
    assert find_devices(16, env).gpus == ("0", "1")


def test_jobs_count_for_each_gpu_and_without_one_for_the_process() -> None:
    assert Devices(("0", "1"), 16).slots(3) == 6
    assert Devices(("0", "1"), 16).slots(None) == 2
    assert Devices((), 16).slots(3) == 3
    assert Devices((), 16).slots(None) == 16


def test_a_gpu_with_fewer_jobs_is_taken_first() -> None:
    devices = Devices(("0", "1"))
    assert [devices.take() for _ in range(4)] == ["0", "1", "0", "1"]
    devices.give_back("1")
    assert [devices.take(), devices.take()] == ["1", "0"]
    assert Devices().take() is None


def test_a_job_is_told_nothing_of_the_launcher_and_of_one_gpu_alone() -> None:
    env = {**TORCHRUN, "PATH": "/bin", "CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_JOB_ID": "7"}
    assert job_environment("5", env) == {"PATH": "/bin", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "5"}
    assert job_environment(None, {**TORCHRUN, "PATH": "/bin"}) == {"PATH": "/bin"}


class Silent:
    """Watches nothing."""

    def started(self, job: Job) -> None: ...
    def finished(self, job: Job, seconds: float) -> None: ...
    def reused(self, job: Job, elsewhere: bool = False) -> None: ...
    def waits(self, why: str) -> None: ...
    def tick(self) -> None: ...


def test_the_jobs_of_a_stage_are_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs a GPU at a time, each chain on one GPU to its end."""
    env = nvidia_smi(tmp_path, "GPU 0: NVIDIA H100 (UUID: GPU-a)\nGPU 1: NVIDIA H100 (UUID: GPU-b)")
    for name, value in {**TORCHRUN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(plan, "PROGRAM", (sys.executable, "-c"))

    def job(name: str) -> Job:
        # of the first four, none ends before all have begun
        code = (f"import os, pathlib, time\nfolder = pathlib.Path({str(tmp_path)!r})\n"
                "told = os.environ['CUDA_VISIBLE_DEVICES'], str('RANK' in os.environ)\n"
                f"(folder / {name!r}).write_text(' '.join(told))\n"
                "while len(list(folder.glob('train?'))) < 4: time.sleep(0.01)\n")
        return Job(name, (code,), (tmp_path / name).is_file, tmp_path / "logs" / name)

    devices = find_devices(2)
    chains = [[job(f"train{i}"), job(f"eval{i}")] for i in range(6)]
    Stages(Silent(), Claims(tmp_path), devices).run([Stage(chains, devices.slots(2))])
    told = {name: (tmp_path / name).read_text() for i in range(6) for name in (f"train{i}", f"eval{i}")}
    assert Counter(told[f"train{i}"] for i in range(4)) == {"0 False": 2, "1 False": 2}
    assert all(told[f"train{i}"] == told[f"eval{i}"] for i in range(6))
    assert not any(devices._load.values())


def test_a_launcher_that_tells_half_of_its_place_has_told_none() -> None:
    assert place({"LOCAL_WORLD_SIZE": "2"}) == place({"LOCAL_RANK": "1"}) == (0, 1)


@pytest.mark.parametrize(("says", "status", "gpus", "found"), [
    ("81559\n40960", 0, ("0", "1"), 40960 * 2 ** 20), ("81559", 0, ("1",), 81559 * 2 ** 20),
    ("[N/A]", 0, ("MIG-a",), None), ("No devices were found", 6, ("0",), None), ("81559", 0, ("0", "1"), None)])
def test_the_memory_of_the_smallest_gpu_is_told_or_nothing(
        tmp_path: Path, says: str, status: int, gpus: tuple[str, ...], found: int | None) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$4\" = {','.join(gpus)} ] && cat <<'END'\n{says}\nEND\nexit {status}\n")
    program.chmod(0o755)
    assert gpu_memory(gpus, {"PATH": f"{tmp_path}:/bin:/usr/bin"}) == found


def test_more_trainings_than_fit_a_gpu_are_told_before_they_start() -> None:
    recipes = load_recipes(load_study("ratio", []))
    h100 = 81559 * 2 ** 20
    assert too_many(recipes, 3, h100) == too_many(recipes, 4, h100) == too_many(recipes, 5, None) == ""
    assert too_many(recipes, 5, h100) == ("5 trainings at a time may not fit a GPU of 86 GB: mlp-0 alone takes about "
                                          "20. With jobs=4 all fit.")
    assert too_many(recipes, 1, 10 ** 9) == ""
    one = {"mlp-0": recipes["mlp-0"]}  # its seeds side by side
    assert too_many(one, 4, h100) == ""
    assert "With jobs=4" in too_many(one, 5, h100)
