"""Rank 0 leads, the others do the same things in the same order, and what fails on one ends all."""

from __future__ import annotations

import gc
import multiprocessing
import random
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small import small_model
from torch import Tensor

from hinny.checkpoint.ranks import RankFailure
from hinny.infer.head import logits
from hinny.infer.parts import Part
from hinny.infer.prepare import prepare
from hinny.infer.runner import ModelRunner
from hinny.infer.sums import Sums
from hinny.infer.tensor import Head, tensor_parallel
from hinny.infer.tensor_runner import TensorRunner, follow, link, packed, unpacked
from hinny.model import Model
from hinny.state import State

SECONDS, V, WORDS = 60, 36, 33


class Notes:
    """A runner that notes what it is told to do, and fails when it is told to."""

    page, words = 4, 36

    def __init__(self, fails_at: int | None = None) -> None:
        self.notes: list[Any] = []
        self.fails_at = fails_at

    def run(self, parts: Sequence[Part]) -> Tensor:
        self._note("run", [Part(p.slot, list(p.pages), p.start, list(p.tokens), p.wanted) for p in parts])
        return torch.zeros(sum(part.wanted for part in parts), self.words)

    def clear_slot(self, slot: int) -> None:
        self._note("clear", slot)

    def copy_slot(self, source: int, target: int) -> None:
        self._note("slot", source, target)

    def copy_page(self, source: int, target: int) -> None:
        self._note("page", source, target)

    def _note(self, *what: Any) -> None:
        if len(self.notes) == self.fails_at:
            raise ValueError("no room left")
        self.notes.append(what)


class Plain:
    """A runner of a model, a state of its own for each slot, one part after the other."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.states: dict[int, State] = {}

    def run(self, parts: Sequence[Part]) -> Tensor:
        found = []
        for part in parts:
            hidden = self.model.hidden(torch.tensor([part.tokens]), self.states[part.slot])[0]
            found.append(logits(hidden[len(part.tokens) - part.wanted:], self.model.output_weight[:WORDS]))
        return torch.cat(found)

    def clear_slot(self, slot: int) -> None:
        self.states[slot] = self.model.init_state(1)

    def copy_slot(self, source: int, target: int) -> None:
        self.states[target] = self.states[source].fork()

    def copy_page(self, source: int, target: int) -> None:
        """Its keys went with the slot."""


class Follower:
    """A rank that follows in a thread of this process."""

    def __init__(self, runner: Notes) -> None:
        self.leading, following = multiprocessing.Pipe()
        self.fault: BaseException | None = None
        self.thread = threading.Thread(target=self._follow, args=(runner, following), daemon=True)
        self.thread.start()

    def _follow(self, runner: Notes, following: Connection) -> None:
        try:
            follow(lambda *_: runner, following, 1)
        except BaseException as fault:
            self.fault = fault

    def ended(self) -> BaseException | None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.fault


def _steps(seed: int) -> list[list[Part]]:
    """Passes over slots whose pages grow, change and begin anew."""
    draw = random.Random(seed)
    pages: dict[int, list[int]] = {slot: [] for slot in range(4)}
    steps = []
    for _ in range(60):
        parts = []
        for slot in draw.sample(range(4), draw.randint(1, 4)):
            act = draw.random()
            if act < 0.1:
                pages[slot] = [draw.randrange(99) for _ in range(draw.randint(0, 5))]
            elif act < 0.2 and pages[slot]:
                pages[slot][-1] = draw.randrange(99)
            elif act < 0.3:
                del pages[slot][draw.randint(0, 3):]
            pages[slot] += [draw.randrange(99) for _ in range(draw.randint(0, 2))]
            tokens = tuple(draw.randrange(V) for _ in range(draw.randint(1, 6)))
            parts.append(Part(slot, list(pages[slot]), draw.randrange(10 ** 6), tokens, draw.randint(0, len(tokens))))
        steps.append(parts)
    return steps


def test_the_others_do_what_rank_0_does_in_order() -> None:
    mine, theirs = Notes(), [Notes(), Notes()]
    followers = [Follower(notes) for notes in theirs]
    runner = TensorRunner(lambda *_: mine, 3, 5, 4, [one.leading for one in followers])
    for number, parts in enumerate(_steps(0)):
        runner.clear_slot(number)
        assert len(runner.run(parts)) == sum(part.wanted for part in parts)
        runner.copy_slot(number, number + 1)
        runner.copy_page(number + 2, number)
    runner.close()
    assert [one.ended() for one in followers] == [None, None]
    assert len(mine.notes) == 240
    assert theirs[0].notes == theirs[1].notes == mine.notes
    with pytest.raises(RankFailure, match="closed"):
        runner.clear_slot(0)


def test_of_a_sequence_that_decodes_only_new_pages_are_told() -> None:
    sent: dict[int, list[int]] = {}
    known: dict[int, list[int]] = {}
    pages = list(range(1000))
    assert list(unpacked(packed([Part(3, pages, 0, [1])], sent), known)) == [Part(3, pages, 0, [1])]
    list_there = known[3]
    pages.append(7)
    again = packed([Part(3, pages, 1, [5])], sent)
    assert len(again) < 10
    assert list(unpacked(again, known)) == [Part(3, pages, 1, [5])]
    assert known[3] is list_there


def test_what_another_rank_says_at_its_end_is_raised_on_rank_0() -> None:
    follower = Follower(Notes(fails_at=2))
    unheard: list[str] = []
    over = threading.Event()

    def ends(why: str) -> None:
        unheard.append(why)
        over.set()

    mine = Notes()
    runner = TensorRunner(lambda *_: mine, 3, 5, 4, [follower.leading], unheard=ends, grace=0.0)
    for slot in range(3):
        runner.clear_slot(slot)
    # nobody calls any more, as one who waits for ever would not
    assert over.wait(SECONDS)
    assert unheard[0] == "rank 1: no room left"
    for _ in range(2):
        with pytest.raises(RankFailure, match="rank 1: no room left"):
            runner.clear_slot(0)
    assert len(mine.notes) == 3
    assert isinstance(follower.ended(), ValueError)


def test_a_rank_that_goes_without_a_word_is_missed() -> None:
    leading, following = multiprocessing.Pipe()
    over = threading.Event()
    runner = TensorRunner(lambda *_: Notes(), 3, 5, 4, [leading], unheard=lambda why: over.set(), grace=0.0)
    following.close()
    assert over.wait(SECONDS)
    with pytest.raises(RankFailure, match="rank 1 is gone without a word"):
        runner.clear_slot(0)


def test_a_failure_of_rank_0_ends_the_others_and_is_no_longer_answered() -> None:
    followers = [Follower(Notes()), Follower(Notes())]
    runner = TensorRunner(lambda *_: Notes(fails_at=1), 3, 5, 4, [one.leading for one in followers])
    runner.clear_slot(0)
    with pytest.raises(RankFailure, match="rank 0: no room left") as failed:
        runner.clear_slot(1)
    assert isinstance(failed.value.__cause__, ValueError)
    for one in followers:
        fault = one.ended()
        assert isinstance(fault, RankFailure)
        assert str(fault) == "rank 0: no room left"
    with pytest.raises(RankFailure, match="no room left"):
        runner.run([])


def test_who_follows_a_rank_0_that_is_gone_ends() -> None:
    follower = Follower(Notes())
    follower.leading.close()
    fault = follower.ended()
    assert isinstance(fault, RankFailure)
    assert "rank 0 is gone" in str(fault)


def _models(group: dist.ProcessGroup, pattern: str) -> tuple[Plain, ModelRunner]:
    """A runner of a model and one of this rank's part of it."""
    whole, part = (small_model(pattern, vocab_size=V).eval().requires_grad_(False) for _ in range(2))
    sums = Sums(group, torch.device("cpu"))
    tensor_parallel(part, sums)
    prepare(part)
    return Plain(whole), ModelRunner(part, slots=3, pages=12, page=4, words=WORDS, head=Head(part, WORDS, sums))


def _led(pattern: str) -> float | None:
    """On rank 0, how far two ranks are from one: pieces of prompts and single tokens in one pass, then a fork."""
    whole, part = _models(dist.group.WORLD, pattern)
    links = link(dist.group.WORLD)
    if dist.get_rank() > 0:
        follow(lambda *_: part, links[0], 1)
        return None
    draw, gaps = random.Random(0), []
    runner = TensorRunner(lambda *_: part, 3, 12, 4, links)
    pages, starts = [list(range(4 * slot, 4 * slot + 4)) for slot in range(3)], [0] * 3

    def run(*counts: int) -> None:
        parts = [Part(slot, pages[slot][:-(-(starts[slot] + count) // 4)], starts[slot],
                      [draw.randrange(V) for _ in range(count)], min(count, 2)) for slot, count in enumerate(counts)
                 if count]
        gaps.append((runner.run(parts) - whole.run(parts)).abs().max().item())
        for slot, count in enumerate(counts):
            starts[slot] += count

    for one in (runner, whole):
        for slot in range(3):
            one.clear_slot(slot)
    for counts in ((9, 2), (1, 1), (1, 3), (1, 1)):
        run(*counts)
    starts[2] = starts[0]
    for one in (runner, whole):
        one.copy_slot(0, 2)
        for here, there in zip(pages[0], pages[2], strict=True):
            one.copy_page(here, there)
    run(1, 0, 1)
    runner.close()
    return max(gaps)


def _follow_badly(group: dist.ProcessGroup) -> str:
    """Fail in the third pass."""
    runner, left = _models(group, "M-M*-")[1], iter(range(2))

    def fail(module: Any, args: Any) -> None:
        if next(left, None) is None:
            raise ValueError("a bad day")

    runner.model.blocks[-1].layer.register_forward_pre_hook(fail)
    try:
        follow(lambda *_: runner, link(group)[0], 1)
    except ValueError as fault:
        return str(fault)
    raise AssertionError("nothing failed")


def _failed() -> str:
    """What each rank says when rank 1 fails in the middle of a pass, where rank 0 waits for its part of a sum."""
    group = dist.new_group()
    if dist.get_rank() > 0:
        said = _follow_badly(group)
        gc.collect()  # nothing holds the group's connections then, as if the process had ended
        dist.destroy_process_group(group)
        return said
    _, part = _models(group, "M-M*-")
    runner = TensorRunner(lambda *_: part, 3, 12, 4, link(group))
    runner.clear_slot(0)
    for _ in range(2):
        runner.run([Part(0, [0], 0, [1, 2])])
    with pytest.raises(RankFailure) as gone:
        runner.run([Part(0, [0], 0, [1, 2])])
    return str(gone.value)


def _led_and_failed() -> tuple[list[float | None], str]:
    return [_led(one) for one in ("1", "M", "*-", "1*M-")], _failed()


def test_two_ranks_led_by_one_find_what_one_process_finds_and_none_waits_for_one_that_failed() -> None:
    (gaps, told), (_, said) = run_ranks(2, _led_and_failed)
    assert max(gaps) < 1e-9, gaps
    assert said == "a bad day"
    assert told == "rank 1: a bad day"
