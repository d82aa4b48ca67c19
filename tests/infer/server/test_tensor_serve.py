"""`hinny serve --tensor 2` as two processes: both end when the first is told to, or the second is gone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from hinny.infer.engine import Engine
from hinny.infer.request import Request
from hinny.run import Run

SECONDS = 60


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """The processes, as torchrun starts them, and the address; what is still there at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "hinny", "serve", str(run), "--tensor", "2", "--device", "cpu", "--port", "0",
               "--threads", "1", *options]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | shared
                                  | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        assert processes[0].stderr is not None
        lines = []
        while not (found := re.search(r"at (http://\S+)", line := processes[0].stderr.readline())):
            assert line, "".join(lines)
            lines.append(line)
        yield processes, found[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_all_processes_end_when_all_are_told_to_and_the_running_request_is_finished(even_run: Run) -> None:
    asked = {"prompt": "the", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
    with served(even_run.path, "--sequences", "2", "--context", "512") as (processes, url):
        short = httpx.post(url + "/v1/completions", json=asked | {"stream": False, "max_tokens": 12}, timeout=SECONDS)
        with httpx.stream("POST", url + "/v1/completions", json=asked, timeout=SECONDS) as answer:
            lines = answer.iter_lines()
            next(lines)
            # as a launcher does, which signals each of them
            for process in processes:
                process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert '"finish_reason":"length"' in rest[-4]
        assert [process.wait(SECONDS) for process in processes] == [0, 0]
    engine = Engine(even_run.path)
    (wanted,), = engine.complete([Request(tuple(engine.tokenizer.encode("the")), 12, ignore_eod=True)])
    assert short.json()["choices"][0]["text"] == wanted.text


def test_a_process_that_is_killed_ends_the_server_with_a_message(even_run: Run) -> None:
    with served(even_run.path, "--sequences", "2", "--context", "128") as (processes, url):
        assert httpx.get(url + "/health", timeout=SECONDS).status_code == 200
        processes[1].kill()
        _, said = processes[0].communicate(timeout=SECONDS)
    assert processes[0].returncode == 1
    assert "hinny: rank 0: the processes of --tensor have ended: rank 1 is gone without a word" in said
