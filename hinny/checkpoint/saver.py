"""Saves checkpoints while training goes on: a copy on the host is made at once, a thread writes it.

The thread does all of a save, publication and pruning included, in step with the threads of the other ranks, with
which it agrees over a gloo group. So a checkpoint comes into force when its last rank is done, whatever training does
meanwhile, and what `store.save` promises of a killed process holds here too.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hinny.checkpoint.ranks import Ranks
from hinny.checkpoint.store import State, state_of, write
from hinny.errors import CheckpointError
from hinny.run import Run

log = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of `run`, one at a time. A context that waits for the last one, also where it fails.

    group: as for `store.save`, and of all ranks there are; all of them make their saver at the same time, since its
        threads get a gloo group of their own. None: one process has everything.

    Host memory for what this rank saves, weights and moments, is held from the first save on; beside a GPU it is
    pinned, which may round each tensor up to a power of two. Every rank calls `start`, `poll` and `wait` at the same
    steps; an error of one rank's save is raised on all of them there. Wait before torch.distributed is taken down.
    """

    def __init__(self, run: Run, group: dist.ProcessGroup | None = None) -> None:
        self.run = run
        assert group is None or dist.get_world_size(group) == dist.get_world_size(), "a group of all ranks"
        # two threads of a rank that use one group would answer each other's collectives
        self._ranks = Ranks(None if group is None else dist.new_group(backend="gloo"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[Path] | None = None
        self._host: dict[tuple[str, ...], Tensor] = {}

    def start(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any], *,
              keep: bool = False) -> None:
        """Begin to save the checkpoint of `step` and return when its weights may change; arguments as `store.save`.

        Waits for the save before it, and raises its CheckpointError.
        """
        self.wait()
        state = self._copied(state_of(model, optimizer))
        self._saving = self._thread.submit(write, self.run, step, state, copy.deepcopy(extra), keep=keep,
                                           ranks=self._ranks)

    @property
    def done(self) -> bool:
        """Whether nothing is being saved on this rank; the others may be earlier or later by a moment."""
        return self._saving is None or self._saving.done()

    def poll(self, finished: bool) -> Path | None:
        """If all ranks are done, the folder of the checkpoint that is in force now; None while there is none to tell.

        finished: `done` of all ranks, which they have agreed on: beside what else they agree on in each step, as
            whether to stop, it costs no further message. One process gives its own `done`.

        Raises the CheckpointError of the save, on all ranks in the same step.
        """
        return self.wait() if finished else None

    def wait(self) -> Path | None:
        """Wait for the save that was begun; its folder, or None if none was. Raises its CheckpointError, once."""
        saving, self._saving = self._saving, None
        return None if saving is None else saving.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self.wait()
        except CheckpointError as lost:
            if fault is None:
                raise
            # what ended the block is the error to show; this one is no reason to hide it
            log.error("%s", lost)
        finally:
            self._thread.shutdown()

    def _copied(self, state: State) -> State:
        """The same names with tensors on the host, complete when this returns."""
        copied: State = {"model": {}, "optimizer": {}}
        for name, value in state["model"].items():
            copied["model"][name] = self._on_host(("model", name), value)
        for name, moments in state["optimizer"].items():
            copied["optimizer"][name] = {key: self._on_host(("optimizer", name, key), value)
                                         for key, value in moments.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _on_host(self, key: tuple[str, ...], value: Tensor) -> Tensor:
        """A copy of `value` in memory that is used again by the next save; pinned, so that a GPU writes it itself."""
        source = value.detach()
        host = self._host.get(key)
        if host is None:
            host = self._host[key] = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        _local(host).copy_(_local(source), non_blocking=True)
        return host


def _local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value
