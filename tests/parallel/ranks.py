"""Runs a function on several processes joined by gloo, as torchrun would join them."""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 240
PRELOAD = ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.pipelining", "sympy"]
"""What ranks import longest: one process has it, and they begin as forks of that one."""


def run_ranks(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, a function of a module, returns on ranks 0 … n-1; fails with a rank's traceback."""
    if torch.cuda.is_available():
        context = mp.get_context("spawn")
    else:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
    results: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a fork has the variables of the process that it came from
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    processes = [context.Process(target=_rank, args=(rank, n, shared, results, function, args), daemon=True)
                 for rank in range(n)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        end = time.monotonic() + SECONDS
        while len(found) < n:
            # what a rank has sent may be here a moment after its end
            alone = all(process.exitcode is not None for process in processes)
            try:
                rank, fault, value = results.get(timeout=5 if alone else 1)
            except queue.Empty:
                if not alone and time.monotonic() < end:
                    continue
                silent = {rank: processes[rank].exitcode for rank in range(n) if rank not in found}
                raise AssertionError(f"ranks gave nothing, or nothing that can be read: exit codes {silent}") from None
            assert fault is None, f"rank {rank}:\n{fault}"
            found[rank] = value
    finally:
        for process in processes:
            process.join(timeout=20 if len(found) == n else 0)
            process.kill()
    return [found[rank] for rank in range(n)]


def _rank(rank: int, n: int, shared: dict[str, str], results: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ.clear()
    os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=n)
        value = function(*args)
        dist.barrier()
        # before the group is taken down, which has been seen to abort
        results.put((rank, None, value))
        results.close()
        results.join_thread()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise
