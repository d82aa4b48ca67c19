"""Batches made ahead are those of the function, in order, and its faults come where their step is asked for."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hinny.config import DataConfig, validate
from hinny.data.ahead import Ahead
from hinny.data.mix import Stream
from hinny.errors import DataError

LONG = 20.0
"""Seconds after which a test that waits has failed."""


class Recorder:
    """A function of the step that can be held at a step, and says when it is there."""

    def __init__(self, hold: set[int] | None = None) -> None:
        self.called: list[int] = []
        self.reached = {step: threading.Event() for step in range(100)}
        self.let = {step: threading.Event() for step in hold or ()}

    def __call__(self, step: int) -> int:
        self.called.append(step)
        self.reached[step].set()
        if step in self.let:
            assert self.let[step].wait(LONG)
        return step * step


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_every_step_gives_what_the_function_gives() -> None:
    with no_thread_is_left(), Ahead(lambda step: step * step, 3, 40, depth=3) as ahead:
        assert [ahead.get(step) for step in range(3, 40)] == [step * step for step in range(3, 40)]


def test_so_many_batches_are_made_beforehand_and_none_behind_the_last() -> None:
    # step 2 is held: when it is reached, 0 and 1 lie ready though nothing was asked for
    make = Recorder(hold={2, 4})
    with Ahead(make, 0, 5, depth=3) as ahead:
        assert make.reached[2].wait(LONG)
        assert make.called == [0, 1, 2]
        make.let[2].set()
        assert ahead.get(0) == 0
        assert make.reached[3].wait(LONG)
        # room for one more was made by the first get, none since
        assert not make.reached[4].is_set()
        assert ahead.get(1) == 1
        assert make.reached[4].wait(LONG)
        make.let[4].set()
        assert [ahead.get(step) for step in (2, 3, 4)] == [4, 9, 16]
    assert make.called == [0, 1, 2, 3, 4]


def test_the_next_batch_is_made_while_the_caller_works() -> None:
    make = Recorder()
    with Ahead(make, 0, 10, depth=1) as ahead:
        assert ahead.get(0) == 0
        # nobody asks for step 1 here
        assert make.reached[1].wait(LONG)


def test_another_step_than_the_next_starts_anew_from_there() -> None:
    make = Recorder(hold={1})
    with Ahead(make, 0, 60, depth=2) as ahead:
        assert ahead.get(0) == 0
        assert make.reached[1].wait(LONG)
        make.let[1].set()
        assert [ahead.get(step) for step in (50, 51, 52)] == [2500, 2601, 2704]
        assert [ahead.get(step) for step in (7, 8)] == [49, 64]
        assert ahead.get(8) == 64
        assert ahead.get(9) == 81


def test_a_batch_begun_for_another_walk_is_thrown_away() -> None:
    make = Recorder(hold={1})
    with Ahead(make, 0, 60, depth=2) as ahead:
        assert ahead.get(0) == 0
        assert make.reached[1].wait(LONG)
        found: list[int] = []
        asking = threading.Thread(target=lambda: found.append(ahead.get(30)))
        asking.start()
        # step 1 ends after step 30 was asked for, or before; either way 30 is what comes
        make.let[1].set()
        asking.join(LONG)
        assert found == [900]


def test_a_fault_comes_at_its_step_as_it_was_and_the_step_can_be_asked_for_again() -> None:
    class Odd(Exception):
        pass

    fault, broken, calls = Odd("step 2"), [2], []

    def make(step: int) -> int:
        calls.append(step)
        if step in broken:
            raise fault
        return step

    with no_thread_is_left(), Ahead(make, 0, 10, depth=5) as ahead:
        assert [ahead.get(0), ahead.get(1)] == [0, 1]
        with pytest.raises(Odd) as raised:
            ahead.get(2)
        assert raised.value is fault
        # nothing behind the fault was made
        assert calls == [0, 1, 2]
        broken.clear()
        assert [ahead.get(2), ahead.get(3)] == [2, 3]


def test_an_interrupt_in_the_function_is_no_hang() -> None:
    def make(step: int) -> int:
        raise KeyboardInterrupt

    with no_thread_is_left(), Ahead(make, 0, 2) as ahead, pytest.raises(KeyboardInterrupt):
        ahead.get(0)


def test_close_ends_the_thread_though_nothing_was_taken_and_twice_is_once() -> None:
    with no_thread_is_left():
        ahead = Ahead(Recorder(), 0, 50)
        ahead.close()
        ahead.close()
        with pytest.raises(AssertionError, match="after close"):
            ahead.get(0)


def test_a_step_behind_the_last_is_our_own_fault() -> None:
    with Ahead(Recorder(), 0, 3) as ahead, pytest.raises(AssertionError, match="step 3 is not below 3"):
        ahead.get(3)


def stream_of(folder) -> Stream:
    config = validate(DataConfig, {"path": str(folder), "boundaries": "reset"}, "data")
    return Stream(config, seq_len=32, batch_size=4, seed=5, vocab_size=600, steps=20)


def test_the_stream_ahead_is_the_stream(folder) -> None:
    plain = stream_of(folder)
    with Ahead(stream_of(folder).batch, 4, 20) as ahead:
        for step in [*range(4, 20), 6, 7]:
            found, expected = ahead.get(step), plain.batch(step)
            assert found.names == expected.names
            assert np.array_equal(found.tokens, expected.tokens)
            assert np.array_equal(found.segments, expected.segments)


def test_a_shard_that_is_cut_off_while_it_is_read_is_a_data_error_with_its_name(folder, tmp_path) -> None:

    copy = shutil.copytree(folder, tmp_path / "d")
    stream = stream_of(copy)
    with Ahead(stream.batch, 0, 20, depth=1) as ahead:
        ahead.get(0)
        os.truncate(copy / "train.bin", 100)
        # the batches that were made before are whole
        with pytest.raises(DataError, match=r"train\.bin: 100 bytes, \d+ when it was opened"):
            [ahead.get(step) for step in range(1, 4)]
