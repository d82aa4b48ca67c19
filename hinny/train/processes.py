"""The processes of one training: found, joined, and asked in every step whether all go on."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from hinny.checkpoint.ranks import RankFailure, Ranks
from hinny.errors import ConfigError, TrainingError

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[torch.device]:
    """The device of this process, which is joined with those that torchrun or SLURM started beside it.

    Raises ConfigError where a process has no GPU of its own on a machine with GPUs. A failed collective inside the
    block is a TrainingError: another process is gone. Any other fault of PyTorch passes as it is.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if world == 1 or dist.is_initialized():
        with _telling():
            yield torch.device("cuda", local if world > 1 else torch.cuda.current_device()) if cuda \
                else torch.device("cpu")
        return
    if cuda and local >= torch.cuda.device_count():
        raise ConfigError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. Start "
                          "at most as many processes on a machine: torchrun --nproc-per-node.")
    if cuda:
        torch.cuda.set_device(local)
    with _telling():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if dist.get_rank() > 0:
            logging.getLogger("hinny").setLevel(logging.WARNING)
        yield torch.device("cuda", local) if cuda else torch.device("cpu")
        dist.destroy_process_group()


@contextmanager
def _telling() -> Iterator[None]:
    """Says of a collective that failed what it means, also of one between two parts of a save."""
    try:
        yield
    except (RuntimeError, RankFailure) as fault:
        found = fault.__cause__ if isinstance(fault, RankFailure) else fault
        said = str(found).strip()
        # gloo's failures have no class of their own, and begin with the place in its source
        if not isinstance(found, dist.DistError) and (not isinstance(found, RuntimeError) or "gloo" not in said):
            raise
        cause = re.sub(r"^\[\S*\] ", "", said).split(". ")[0].splitlines()[0]
        raise TrainingError(f"another process of this training is gone or does not answer ({cause}). Look for its "
                            "message. The last checkpoint is whole: the same command goes on from there.") from fault


@contextmanager
def _beginning() -> Iterator[None]:
    """What is no error of hinny keeps the training from its beginning, on all ranks."""
    try:
        yield
    except RankFailure as fault:
        raise TrainingError(f"the training could not begin: {fault}.") from fault


class Together:
    """What all processes of a training agree on, over a gloo group that nothing else uses."""

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo") if several else None
        self._waited = 0.0

    def any(self, *mine: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any process; the seconds until the last one is here are counted."""
        if self.group is None:
            return mine
        flags = torch.tensor(mine, dtype=torch.int32)
        start = time.perf_counter()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        self._waited += time.perf_counter() - start
        return tuple(bool(flag) for flag in flags)

    def wait(self) -> None:
        """Go on when all are here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it; on all of them, and so is an error of hinny."""
        with _beginning():
            return Ranks(self.group).first(work)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each, in the order of ranks; an error of hinny on one of them is raised on all."""
        with _beginning():
            return Ranks(self.group).each(work)

    def slowest(self, data_seconds: float, steps: int) -> dict[str, float]:
        """Of the `steps` since the last call, for the records: data_seconds of the process that waited longest for its
        batches; straggler, the rank that the others waited for between steps, and straggler_seconds, how long a step
        they did.
        """
        if self.group is None:
            return {"data_seconds": data_seconds}
        mine = torch.tensor([data_seconds, self._waited / steps], dtype=torch.float64)
        self._waited = 0.0
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        waits = [float(one[1]) for one in every]
        last = min(range(len(waits)), key=waits.__getitem__)
        return {"data_seconds": max(float(one[0]) for one in every), "straggler": float(last),
                "straggler_seconds": max(waits) - waits[last]}
