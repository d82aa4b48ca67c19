"""A reader that answers as it is told, and a place without network that has the data sets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness_data
import numpy as np
import pytest

from hinny.infer.reading.requests import Generate, Generated, Score, Scored, Usage
from hinny.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
Likes = Callable[[str, str], bool]


class Scripted:
    """A reader that finds a continuation likely where it `likes` it after a prompt, and writes `answers`."""

    tokenizer = BYTES

    def __init__(self, likes: Likes, answers: dict[str, str] | None = None) -> None:
        self.usage = Usage()
        self.likes, self.answers = likes, answers or {}
        self.calls: list[str] = []
        self.asked: list[tuple[str, str]] = []

    def score(self, requests: Sequence[Score], progress: Any = None) -> list[Scored]:
        self.calls.append("score")
        return [self._scored(BYTES.decode(request.context), BYTES.decode(request.continuation))
                for request in requests]

    def _scored(self, context: str, continuation: str) -> Scored:
        self.asked.append((context, continuation))
        n = len(continuation.encode())
        # the same in all for every continuation of one kind, whatever its length
        each = np.zeros(n)
        each[0] = -1.0 if self.likes(context, continuation) else -200.0
        return Scored(each, np.zeros(n, dtype=np.int64), False)

    def generate(self, requests: Sequence[Generate], progress: Any = None) -> list[Generated]:
        self.calls.append("generate")
        self.asked += [(BYTES.decode(request.prompt), "") for request in requests]
        return [Generated((1,), self.answers.get(BYTES.decode(request.prompt), "nonsense"), "stop")
                for request in requests]


@pytest.fixture(scope="module", name="root")
def offline_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small files of all data sets; nothing of the network can be reached, and MMLU has two subjects."""
    import datasets
    from lm_eval.tasks import TaskManager

    def refused(*_: Any) -> None:
        raise AssertionError("the network was asked")

    every = TaskManager.all_subtasks.fget
    with pytest.MonkeyPatch.context() as patch:
        # nothing may be kept from one run to the next, nor written beside the user's own tables
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("root") / "absent")
        patch.setattr(socket.socket, "connect", refused)
        patch.setattr(TaskManager, "all_subtasks", property(
            lambda self: [task for task in every(self) if not task.startswith("mmlu")
                          or any(subject in task for subject in harness_data.SUBJECTS)]))
        folder = tmp_path_factory.mktemp("root")
        harness_data.write(folder)
        yield folder
        assert not Path(datasets.config.HF_DATASETS_CACHE).exists()
