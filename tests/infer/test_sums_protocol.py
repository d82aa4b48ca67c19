"""What ranks tell each other in sums and gatherings of few rows: every order in which it can happen, gone through.

A rank is a list of acts, done one after the other; an act waits until it can be done. All that the ranks can come to is
searched. A number that was lost or written over before it was read shows as a rank that waits for ever, or that reads
another one. The acts are those of hinny/ops/kernels/peers.py: what a launch does is done
when the next one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hinny.infer.prepare import _hidden_of_ranks
from hinny.ops.peers import PLACES

STEPS = 3


class WrongError(Exception):
    """What must not happen has happened."""


@dataclass(frozen=True)
class Act:
    """kind: "put" a sum's words to a rank, "need" a rank's; "meet" all ranks, as in a sum that ends when all have read;
    "raise" a flag of a rank, "lower" one's own that a rank raised, "write" to a rank, "read" what a rank wrote.
    """

    kind: str
    other: int = -1
    place: int = 0
    number: int = 0


def places(layers: int) -> list[int]:
    """Places that a pass through so many layers gives its sums, by the code itself."""
    given: list[int] = []

    def add_norm(norm: Any, x: Any, delta: Any, place: int) -> tuple[Any, Any]:
        given.append(place)
        return x, delta

    block: Any = SimpleNamespace(norm=lambda x: x, layer=SimpleNamespace(forward=lambda x, state, segments: x))
    model: Any = SimpleNamespace(blocks=[block] * layers, norm=None)
    sums: Any = SimpleNamespace(add_norm=add_norm)
    _hidden_of_ranks(model, torch.zeros(1), [None] * layers, sums)
    return given


def summing(ranks: int, given: Sequence[int], *, meet_every: int = 0) -> list[list[Act]]:
    """The ranks' acts in sums at these places; each puts its words to all others, and needs theirs."""
    acts: list[list[Act]] = [[] for _ in range(ranks)]
    for number, place in enumerate(given, 1):
        for rank, own in enumerate(acts):
            others = [other for other in range(ranks) if other != rank]
            if meet_every and number % meet_every == 1 % meet_every:
                own.append(Act("meet", number=number))
            own += [Act("put", other, place, number) for other in others]
            own += [Act("need", other, place, number) for other in others]
    return acts


def gathering(ranks: int, times: int, *, ask: bool = True) -> list[list[Act]]:
    """The acts of one program of each rank in gatherings, of whose results the last is read before the next begins."""
    acts: list[list[Act]] = [[] for _ in range(ranks)]
    for number in range(1, times + 1):
        for rank, own in enumerate(acts):
            others = [other for other in range(ranks) if other != rank]
            for kind in ("raise", "lower") if ask else ():
                own += [Act(kind, other, 0) for other in others]
            own += [Act("write", other, number=number) for other in others]
            for kind in ("raise", "lower"):
                own += [Act(kind, other, 1) for other in others]
            own += [Act("read", other, number=number) for other in others]
    return acts


class World:
    """Where each rank is in its acts, and what lies in the memory of each."""

    def __init__(self, acts: list[list[Act]], at: tuple[int, ...], memory: dict[Any, int],
                 flying: frozenset[tuple[Any, int]] = frozenset()) -> None:
        self.acts, self.at, self.memory, self.flying = acts, at, memory, flying

    def key(self) -> Any:
        return self.at, frozenset(self.memory.items()), self.flying

    def over(self) -> bool:
        return not self.flying and all(i == len(own) for i, own in zip(self.at, self.acts, strict=True))

    def next(self, late: bool) -> list[World]:
        """All that may happen now; late: what is put to another rank arrives at any time from then on."""
        found = [World(self.acts, self.at, self.memory | {place: number}, self.flying - {(place, number)})
                 for place, number in self.flying]
        for rank, i in enumerate(self.at):
            if i < len(self.acts[rank]) and (changed := self._done(rank, self.acts[rank][i])) is not None:
                at = (*self.at[:rank], i + 1, *self.at[rank + 1:])
                if late and self.acts[rank][i].kind == "put":
                    if any(place in changed for place, _ in self.flying):
                        raise WrongError(f"{changed} may overtake what is on its way to the same place")
                    found.append(World(self.acts, at, self.memory, self.flying | set(changed.items())))
                else:
                    found.append(World(self.acts, at, self.memory | changed, self.flying))
        return found

    def _done(self, rank: int, act: Act) -> dict[Any, int] | None:
        """What an act changes in the memory; None: it waits."""
        mine, theirs = ((act.kind in ("raise", "lower"), owner, writer, act.place)
                        for owner, writer in ((rank, act.other), (act.other, rank)))
        if act.kind == "put":
            return {theirs: act.number}
        if act.kind == "need":
            return {} if self.memory.get(mine, 0) == act.number else None
        if act.kind == "meet":
            here = all(own[i:i + 1] == [act] or act in own[:i] for i, own in zip(self.at, self.acts, strict=True))
            return {} if here else None
        if act.kind == "raise":
            return {theirs: 1} if not self.memory.get(theirs, 0) else None
        if act.kind == "lower":
            return {mine: 0} if self.memory.get(mine, 0) else None
        if act.kind == "write":
            return {theirs: act.number}
        if self.memory.get(mine, 0) != act.number:
            raise WrongError(f"rank {rank} reads {self.memory.get(mine, 0)} of rank {act.other}, and not {act.number}")
        return {}


def searched(acts: list[list[Act]], *, late: bool = False) -> int:
    """Goes through all that can happen → how many states there are. WrongError where it goes wrong."""
    first = World(acts, (0,) * len(acts), {})
    seen, open_ = {first.key()}, [first]
    while open_:
        world = open_.pop()
        after = world.next(late)
        if not after and not world.over():
            raise WrongError(f"nobody can go on: {[own[i:i + 1] for i, own in zip(world.at, acts, strict=True)]}")
        for one in after:
            if (key := one.key()) not in seen:
                seen.add(key)
                open_.append(one)
    return len(seen)


@pytest.mark.parametrize("layers", range(1, 10))
def test_neighbouring_sums_have_places_of_their_own(layers: int) -> None:
    given = places(layers)
    assert len(given) == layers
    assert set(given) <= set(range(PLACES))
    repeated = given * 3
    # of one layer the embedding's sum is between them
    assert layers == 1 or all(one != other for one, other in pairwise(repeated))


@pytest.mark.parametrize("layers", [2, 3, 4, 5])
@pytest.mark.parametrize("late", [False, True])
def test_two_ranks_always_come_to_the_end(layers: int, late: bool) -> None:
    acts = summing(2, places(layers) * STEPS)
    # more than one way to the end
    assert searched(acts, late=late) > len(acts[0]) * 3


@pytest.mark.parametrize("layers", [2, 3])
def test_four_ranks_always_come_to_the_end(layers: int) -> None:
    assert searched(summing(4, places(layers) * 2)) > 10_000


def test_three_ranks_do_so_where_words_arrive_late() -> None:
    assert searched(summing(3, [*places(3), *places(3)[:1]]), late=True) > 5_000


@pytest.mark.parametrize("ranks", [2, 4])
def test_with_one_place_for_all_sums_somebody_waits_for_ever(ranks: int) -> None:
    with pytest.raises(WrongError, match="nobody can go on"):
        searched(summing(ranks, [0] * 3))


def test_two_places_are_not_enough_for_steps_with_an_odd_number_of_sums() -> None:
    with pytest.raises(WrongError):
        searched(summing(2, [1, 0, 1] * 2))


def test_one_layer_needs_the_embeddings_sum_in_between() -> None:
    with pytest.raises(WrongError):
        searched(summing(2, places(1) * 3))
    assert searched(summing(2, places(1) * 3, meet_every=1)) > 20
    assert searched(summing(4, places(1) * 3, meet_every=1)) > 1000


@pytest.mark.parametrize(("ranks", "times"), [(2, 4), (3, 3), (4, 2)])
def test_what_was_gathered_is_whole_and_stays_until_it_was_read(ranks: int, times: int) -> None:
    assert searched(gathering(ranks, times)) > 100


def test_without_asking_for_room_a_gathering_overwrites_what_is_still_read() -> None:
    with pytest.raises(WrongError, match="reads 2 of rank"):
        searched(gathering(2, 2, ask=False))
