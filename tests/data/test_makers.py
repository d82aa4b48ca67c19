"""Batches from processes beside the training are the stream's, and what ends one of them is told."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from hinny.config import DataConfig, validate
from hinny.data import makers
from hinny.data.makers import Makers, made_ahead
from hinny.data.mix import Stream
from hinny.errors import DataError


def stream_of(folder: Path, share: float = 0.5) -> Stream:
    practice = {"synthetic": {"share": share, "tasks": {"mqar": 1.0, "copy": 1.0}}} if share else {}
    config = validate(DataConfig, {"path": str(folder), "boundaries": "reset", **practice}, "data")
    return Stream(config, seq_len=64, batch_size=4, seed=5, vocab_size=600, steps=20)


def processes(makers: Makers) -> list[int]:
    return [maker._process.pid for maker in makers._makers]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_step_in_any_order_gives_the_rows_of_the_stream(folder: Path) -> None:
    stream, rows = stream_of(folder), range(1, 3)
    with made_ahead(stream, rows, 4, 20, beside=True) as ahead:
        for step in [*range(4, 9), 15, 16, 6, 7, 19, 19]:
            found, expected = ahead.get(step), stream.batch(step, rows)
            assert found.names == expected.names
            for name in ("tokens", "targets", "mask", "segments"):
                assert np.array_equal(getattr(found, name), getattr(expected, name)), (step, name)


def test_practice_alone_is_worth_processes_and_only_if_they_are_wanted(folder: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(makers, "Makers", lambda stream, rows, last: started.append(last) or _Thread(stream, rows))
    for share, beside in ((0.5, True), (0.5, False), (0.0, True)):
        stream = stream_of(folder, share)
        with made_ahead(stream, range(4), 0, 3, beside=beside) as ahead:
            assert np.array_equal(ahead.get(1).tokens, stream.batch(1).tokens)
    assert started == [3]


class _Thread:
    def __init__(self, stream: Stream, rows: range) -> None:
        self.stream, self.rows = stream, rows

    def __call__(self, step: int) -> object:
        return self.stream.batch(step, self.rows)

    def close(self) -> None:
        pass


def test_a_fault_is_raised_as_it_was_where_its_step_is_asked_for(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "d")
    made = Makers(stream_of(copy, 0.25), range(4), 20)
    try:
        made(0), made(1)  # both have opened it
        os.truncate(copy / "train.bin", 100)
        with pytest.raises(DataError, match=r"train\.bin: 100 bytes, \d+ when it was opened"):
            [made(step) for step in range(2, 9)]
    finally:
        made.close()


def test_a_process_that_is_killed_is_told_and_none_is_left_behind(folder: Path) -> None:
    made = Makers(stream_of(folder), range(4), 20)
    pids = processes(made)
    try:
        made(0)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(DataError, match="a process that makes batches ended with status -9"):
            [made(step) for step in range(1, 6)]
    finally:
        made.close()
        made.close()
    assert not any(map(is_there, pids))
