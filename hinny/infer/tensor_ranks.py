"""The processes that share an engine's model, as torchrun started them: joined, led by rank 0, ended together.

    every rank   Team(device); load, each
    rank 0       lead: a runner, which the others' follow; close
    others       follow: until rank 0 closes, fails, or is gone
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from hinny.checkpoint.ranks import RankFailure, Ranks
from hinny.errors import ConfigError
from hinny.infer.sums import Sums
from hinny.infer.tensor_runner import Make, TensorRunner, dismiss, follow, link

T = TypeVar("T")


def processes() -> int:
    """How many a launcher started, this one among them."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE") or 1)


def process_rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)


def check_tensor_processes(tensor: int, verb: str = "serve") -> None:
    """ConfigError unless as many processes as `tensor` were started; `verb`: what is shown."""
    if tensor < 1:
        raise ConfigError(f"tensor is {tensor}; it must be 1 or more.")
    there = processes()
    if tensor != there:
        started = "there is 1 process" if there == 1 else f"there are {there} processes"
        raise ConfigError(f"tensor is {tensor}, but {started}; the model is cut over as many as there are: torchrun "
                          f"--nproc-per-node {max(tensor, there)} -m hinny {verb} RUN --tensor {max(tensor, there)}, "
                          "or, on one, without both.")


class Team:
    """This process and the others of its machine. All must make it, and call `each`, at the same time."""

    def __init__(self, device: str) -> None:
        """device: "cpu", or "cuda" for a GPU of its own each.

        ConfigError where a process has none, or where they are on several machines.
        """
        local, cuda = int(os.environ.get("LOCAL_RANK") or 0), torch.device(device).type == "cuda"
        if cuda and local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                              "Start at most as many: torchrun --nproc-per-node.")
        if cuda:
            torch.cuda.set_device(local)
        self._joined = not dist.is_initialized()
        if self._joined:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        world = dist.group.WORLD
        assert world is not None
        self.rank, self.device = dist.get_rank(), torch.device("cuda", local) if cuda else torch.device("cpu")
        self._ranks = Ranks(dist.new_group(backend="gloo"))
        if len(hosts := set(self.each(socket.gethostname))) > 1:
            raise ConfigError(f"the processes are on {len(hosts)} machines, {', '.join(sorted(hosts))}; an engine has "
                              "one. Start them all on one: torchrun --nproc-per-node.")
        if self.rank:
            logging.getLogger("hinny").setLevel(logging.WARNING)
        self.sums = Sums(world, self.device)
        self.failed: Callable[[], None] | None = None
        """Called on rank 0 when the ranks have failed: before `lead`, set it."""
        self._links = link(world)
        self._runner: TensorRunner | None = None

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each rank; RankFailure, or hinny's own error, on all if it failed on one."""
        return self._ranks.each(work)

    def lead(self, make: Make, slots: int, pages: int, page: int) -> TensorRunner:
        """Rank 0's runner, which the others' follow: each makes one with such pools. Once."""
        assert self.rank == 0
        assert self._runner is None
        self._runner = TensorRunner(make, slots, pages, page, self._links, failed=self.failed)
        return self._runner

    def follow(self, make: Make) -> None:
        """On a rank above 0, to the end. As `tensor_runner.follow`; signals are rank 0's: it ends all."""
        assert self.rank > 0
        with _undisturbed():
            follow(make, self._links[0], self.rank)
        self._part()

    def close(self) -> None:
        """Rank 0: let the others end. RankFailure if they have failed."""
        if self._runner is None:
            dismiss(self._links)
        else:
            self._runner.close()
            if self._runner.failure is not None:
                raise RankFailure(self._runner.failure)
        self._part()

    def _part(self) -> None:
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the signals that a launcher or a terminal sends to all processes at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
