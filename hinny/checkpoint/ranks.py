"""The processes that write or read one checkpoint together: what each did, and that all of them know who failed.

They talk over a gloo group, since NCCL can neither be used from a second thread nor carry what is not on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from hinny.errors import HinnyError

T = TypeVar("T")


class RankFailure(Exception):
    """A rank could not do its part; raised on every rank with the reasons of those that failed."""


@dataclass(frozen=True)
class _Done(Generic[T]):
    """What one rank made of its work: a value, or why it failed."""

    value: T | None = None
    failure: str | None = None
    ours: type[HinnyError] | None = None
    """The class of the failure, where its text is a message for the user already."""


class Ranks:
    """The ranks of `group`, a gloo group; without one this process alone, whatever others there are.

    Every rank must call the same methods in the same order, and no other thread may use the group meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        assert group is None or dist.get_backend(group) == "gloo", f"a gloo group, not {dist.get_backend(group)}"
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each rank, in their order. Raises RankFailure on all of them if it failed on one; an
        error of hinny is raised on all of them as it is. One process lets its own exceptions pass.
        """
        if self.group is None:
            return [work()]
        done: list[Any] = [None] * self.size
        mine, fault = _attempt(work)
        self.exchange(lambda: dist.all_gather_object(done, mine, group=self.group))
        if isinstance(fault, KeyboardInterrupt):
            raise fault
        if failures := {rank: one for rank, one in enumerate(done) if one.failure is not None}:
            raise _joined(failures, self.size)
        return [cast(T, one.value) for one in done]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returned on rank 0, which alone does it. Raises RankFailure on all of them if it failed; an
        error of hinny is raised on all of them as it is. One process lets its own exceptions pass.
        """
        if self.group is None:
            return work()
        mine, fault = _attempt(work) if self.rank == 0 else (None, None)
        told: list[Any] = [mine]
        source = dist.get_global_rank(self.group, 0)
        self.exchange(lambda: dist.broadcast_object_list(told, source, group=self.group))
        if isinstance(fault, KeyboardInterrupt):
            raise fault
        (one,) = told
        if one.failure is not None:
            raise _joined({0: one}, self.size)
        return cast(T, one.value)

    def exchange(self, collective: Callable[[], T]) -> T:
        """What a collective over the group returns. Raises RankFailure if a rank is gone or does not answer."""
        try:
            return collective()
        except RuntimeError as fault:
            said = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
            raise RankFailure(f"another rank is gone or does not answer: {said}") from fault


def reason(fault: BaseException) -> str:
    """The cause of a failure in words; DCP's exception holds one failure a rank."""
    if isinstance(fault, CheckpointException) and fault.failures:
        fault, _ = next(iter(fault.failures.values()))
    while fault.__cause__ is not None and not isinstance(fault, RankFailure):
        fault = fault.__cause__
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    return str(fault) or type(fault).__name__


def _joined(failures: dict[int, _Done[Any]], size: int) -> Exception:
    """What is raised on every rank: a message of hinny's as it is, else the reason of each rank that failed."""
    for one in failures.values():
        if one.ours is not None:
            return one.ours(one.failure)
    return RankFailure("; ".join(f"{one.failure} (rank {rank} of {size})" for rank, one in failures.items()))


def _attempt(work: Callable[[], T]) -> tuple[_Done[T], BaseException | None]:
    """Do a rank's part. Whatever goes wrong must reach the other ranks, which wait to hear of it."""
    try:
        return _Done(value=work()), None
    except HinnyError as fault:
        return _Done(failure=str(fault), ours=type(fault)), fault
    except BaseException as fault:
        return _Done(failure=reason(fault)), fault
