"""An engine on two processes answers as one on one process does, and all of its processes end together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from hinny.checkpoint.ranks import RankFailure
from hinny.errors import ConfigError
from hinny.infer import engine as engines
from hinny.infer.engine import Engine
from hinny.infer.limits import Limits
from hinny.infer.parts import Part
from hinny.infer.request import Request
from hinny.infer.sampling import Sampling
from hinny.infer.tensor_runner import TensorRunner, follow
from hinny.run import Run

SECONDS = 60
PROMPTS = ("The ", "def main(", "import torch and more of it", "x")
LIMITS = Limits(sequences=3, context=96, step_tokens=24, snapshots=4, page=8)
LONG = tuple(range(80))
"""A prompt that is worth keeping."""
GROWTH = 48
"""Tokens of each of the sequences that do not fit all together."""
BAD_DAY = """
import os, sys
import torch
from hinny.cli import main
from hinny.infer.runner import ModelRunner

torch.set_num_threads(1)
calls, run = iter(range(3)), ModelRunner.run

def fail(self, parts):
    if os.environ["RANK"] == "1" and next(calls, None) is None:
        raise ValueError("a bad day")
    return run(self, parts)

ModelRunner.run = fail
sys.argv = ["hinny", *sys.argv[1:]]
main()
"""


class Nothing:
    """A runner that nobody asks for anything."""

    page, words = 8, 258

    def run(self, parts: Sequence[Part]) -> torch.Tensor:
        raise AssertionError

    def clear_slot(self, slot: int) -> None:
        raise AssertionError

    def copy_slot(self, source: int, target: int) -> None:
        raise AssertionError

    def copy_page(self, source: int, target: int) -> None:
        raise AssertionError


def _requests(engine: Engine) -> list[Request]:
    return [Request(tuple(engine.tokenizer.encode(text)), 14, n=1 + (number == 1), ignore_eod=True)
            for number, text in enumerate(PROMPTS)]


def _answers(engine: Engine) -> dict[str, Any]:
    """All that is asked of an engine; memory for about two of three sequences at their ends."""
    found: dict[str, Any] = {
        "together": [[[c.token for c in one.choices] for one in of] for of in engine.complete(_requests(engine))],
        "read before": [engine.complete([Request(LONG, 5)])[0][0].cached for _ in range(2)],
        "streamed": "".join(engine.stream(PROMPTS[0], max_tokens=20)),
        "drawn": engine.generate(PROMPTS[1], max_tokens=20, sampling=Sampling(temperature=1.0, seed=4))}
    left = engine.stream(PROMPTS[2], max_tokens=60)
    next(left)
    left.close()
    found["after one has left"] = engine.core.stats().running
    grown = engine.complete([Request(tuple(range(10 + i, 18 + i)), GROWTH, ignore_eod=True) for i in range(3)])
    found["grown"] = [[c.token for c in one.choices] for of in grown for one in of]
    return found


def _shared(run: str) -> dict[str, Any] | str | None:
    """What rank 0 finds; rank 1 has less memory, of which the pools must be made."""
    needed = Engine(run, limits=LIMITS).core.stats()
    slots, pages = (engines.pool_sizes(Run(Path(run)).recipe.model, sequences=3, context=96, snapshots=4, drafts=False,
                                       page=8, width=4, ranks=2, budget=None), needed.pages)
    tight = int((slots.slots * slots.slot_bytes + (pages // 2 + 0.5) * slots.page_bytes) / engines.SHARE) + 1
    engines.room = lambda device: tight if dist.get_rank() else 10 ** 12  # type: ignore[assignment]
    engine = Engine(run, limits=LIMITS, tensor=2)
    with pytest.raises(ConfigError, match="one process"):
        engine.logits(torch.zeros(1, 1, dtype=torch.int64))
    if not engine.leads:
        engine.follow()
        return "followed"
    with engine:
        found = _answers(engine)
        with pytest.raises(ConfigError, match="cannot change"):
            engine.within(LIMITS)
        stats = engine.core.stats()
    return found | {"pages": (stats.pages, pages // 2), "preempted": stats.preemptions,
                    "bytes": (stats.bytes, slots.slots * slots.slot_bytes + stats.pages * slots.page_bytes)}


def test_two_processes_answer_as_one(even_run: Run) -> None:
    found, other = run_ranks(2, _shared, str(even_run.path))
    alone = _answers(Engine(even_run.path, limits=LIMITS))
    assert other == "followed"
    assert {key: found[key] for key in alone} == alone
    assert found["read before"][1] > 0
    assert found["pages"][0] == found["pages"][1]
    assert found["bytes"][0] == found["bytes"][1]
    assert found["preempted"] > 0


def test_a_rank_without_room_for_its_pools_is_told_of() -> None:
    leading, following = multiprocessing.Pipe()
    failed, faults = threading.Event(), []

    def no_room(slots: int, pages: int, page: int) -> Any:
        raise MemoryError(f"no room for {slots}, {pages}, {page}")

    def follows() -> None:
        try:
            follow(no_room, following, 1)
        except MemoryError as fault:
            faults.append(fault)

    thread = threading.Thread(target=follows)
    thread.start()
    runner = TensorRunner(lambda *_: Nothing(), 3, 5, 8, [leading], failed=failed.set, unheard=lambda why: None)
    thread.join(SECONDS)
    assert failed.wait(SECONDS)
    with pytest.raises(RankFailure, match="rank 1: no room for 3, 5, 8"):
        runner.clear_slot(0)
    assert len(faults) == 1
    runner.close()
    assert runner.failure == "rank 1: no room for 3, 5, 8"


def test_as_many_processes_must_be_started(even_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tensor is 2, but there is 1 process.*torchrun --nproc-per-node 2 -m hinny "
                                          r"serve RUN --tensor 2"):
        Engine(even_run.path, tensor=2)
    with pytest.raises(ConfigError, match="tensor is 0"):
        Engine(even_run.path, tensor=0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    from hinny.cli.generate import generate

    with pytest.raises(ConfigError, match=r"there are 4 processes.*--nproc-per-node 4 -m hinny generate RUN"):
        generate(even_run.path, "x", device="cpu")


def _started(*command: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)]


def test_a_pass_that_fails_on_one_rank_ends_all_and_is_told(even_run: Run) -> None:
    processes = _started("-c", BAD_DAY, "generate", str(even_run.path), "The ", "--tensor", "2", "--device", "cpu",
                         "--max-tokens", "40")
    try:
        said = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert "hinny: rank 0: the processes of --tensor have ended: rank 1: a bad day." in said[0][1]
    assert "ValueError: a bad day" in said[1][1]
    assert said[1][0] == ""
