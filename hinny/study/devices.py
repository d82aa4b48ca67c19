"""What of a machine belongs to this process: GPUs and cores, alone or beside others that a launcher started. No torch.

torchrun and srun start one process for each GPU, so that each takes its own; without them a process has all that it may
use. A job has one GPU, which CUDA_VISIBLE_DEVICES names in its environment.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hinny.errors import RunError

log = logging.getLogger(__name__)

LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
"""Variables by which torchrun tells a process that it is one of several; a job is a program of its own."""


@dataclass
class Devices:
    """The GPUs and cores of this process, and how many jobs run on each GPU. Without GPUs jobs run on the CPU."""

    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them: numbers or UUIDs."""
    cores: int = 1
    _load: dict[str, int] = field(default_factory=dict)

    def slots(self, jobs: int | None) -> int:
        """Trainings at a time: `jobs` on each GPU, one if not given; without GPUs `jobs`, or as many as cores."""
        return len(self.gpus) * (jobs or 1) or jobs or self.cores

    def take(self) -> str | None:
        """The GPU with the fewest jobs, which has one more from now on; None without GPUs."""
        if not self.gpus:
            return None
        gpu = min(self.gpus, key=lambda one: self._load.get(one, 0))
        self._load[gpu] = self._load.get(gpu, 0) + 1
        return gpu

    def give_back(self, gpu: str | None) -> None:
        """A job on `gpu` has ended."""
        if gpu is not None:
            self._load[gpu] -= 1


def find_devices(cores: int, env: Mapping[str, str] = os.environ) -> Devices:
    """The share of this process in the machine's GPUs and in its `cores`.

    Several processes of a launcher share them evenly. Where there are more processes than GPUs, some share one.
    """
    gpus, (rank, size) = visible_gpus(env), place(env)
    if "SLURM_GPUS_PER_TASK" in env and "LOCAL_WORLD_SIZE" not in env:
        mine = gpus  # SLURM shows each task its own alone
    elif len(gpus) < size:
        mine = gpus[rank % len(gpus):][:1] if gpus else ()
    else:
        mine = gpus[rank::size]
    return Devices(mine, max(1, cores // size))


def place(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of this process among those that torchrun or srun started on this machine, and how many they are."""
    if "LOCAL_WORLD_SIZE" in env and "LOCAL_RANK" in env:
        return int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"])
    # set in the steps of srun alone, "8(x2),4" for instance; a batch script is one process, however many tasks it has
    if tasks := env.get("SLURM_STEP_TASKS_PER_NODE"):
        groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
        nodes = [int(count) for count, times in groups for _ in range(int(times or 1))]
        number = int(env.get("SLURM_NODEID", 0))
        if number < len(nodes):
            return int(env.get("SLURM_LOCALID", 0)), nodes[number]
        raise RunError(f"SLURM_NODEID is {number}, and SLURM_STEP_TASKS_PER_NODE ({tasks}) tells of {len(nodes)} "
                       "nodes: they are not of one step. Start the study with srun, or unset both.")
    return 0, 1


def visible_gpus(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that a process started from here could use: CUDA_VISIBLE_DEVICES, or else all that nvidia-smi lists.

    A GPU that is cut up (MIG) counts as its parts.
    """
    if (told := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in told.split(",")]
        # CUDA ignores what stands behind an entry that is no device, such as -1
        end = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return tuple(names[:end])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, env=dict(env))
    except OSError:
        return ()
    if listed.returncode != 0:
        said = (listed.stdout + listed.stderr).strip() or "it says nothing"
        log.warning("no GPU is used: nvidia-smi -L ends with status %d (%s). To use some, say which: "
                    "CUDA_VISIBLE_DEVICES=0,1 for instance.", listed.returncode, said)
        return ()
    found: list[str] = []
    for line in listed.stdout.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            found.append(gpu[1])
        elif part := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            if found and found[-1].isdigit():
                found.pop()
            found.append(part[1])
    return tuple(found)


def gpu_memory(gpus: Sequence[str], env: Mapping[str, str] = os.environ) -> int | None:
    """Bytes of the smallest of these GPUs, as nvidia-smi lists them; None where it does not tell, as of parts (MIG)."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", ",".join(gpus)]
    try:
        listed = subprocess.run(asked, capture_output=True, text=True, env=dict(env))
    except OSError:
        return None
    sizes = listed.stdout.split()
    told = listed.returncode == 0 and len(sizes) == len(gpus) and all(size.isdigit() for size in sizes)
    return min(map(int, sizes)) * 2 ** 20 if told and sizes else None


def job_environment(gpu: str | None, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a job: this process's without what a launcher said, and with one GPU if there are any."""
    kept = {name: value for name, value in env.items() if not LAUNCHER.fullmatch(name)}
    return kept if gpu is None else {**kept, "CUDA_VISIBLE_DEVICES": gpu}
