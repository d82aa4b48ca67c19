"""`hinny serve` as a process: it says where it is, answers, and ends in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import typer

from hinny.cli.serve import serve, size
from hinny.errors import ConfigError
from hinny.infer.server.serving import listen
from hinny.run import Run


@contextmanager
def served(run: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; it is killed at the end if it is still there."""
    command = [sys.executable, "-m", "hinny", "serve", str(run), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert process.stderr is not None
        lines = []
        while not (found := re.search(r"at (http://\S+)", line := process.stderr.readline())):
            assert line, "".join(lines)
            lines.append(line)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_sigterm_lets_a_running_request_finish(trained_run: Run) -> None:
    asked = {"prompt": "the", "max_tokens": 300, "temperature": 0, "stream": True, "ignore_eos": True}
    with served(trained_run.path, "--sequences", "2", "--context", "512", HINNY_API_KEY="secret") as (process, url):
        assert httpx.get(url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(url + "/v1/models", headers=headers).json()["data"][0]["id"] == trained_run.path.name
        with httpx.stream("POST", url + "/v1/completions", json=asked, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert '"finish_reason":"length"' in rest[-4]
        assert rest[-2:] == ["data: [DONE]", ""]
        assert process.wait(20) == 0


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(trained_run: Run, sign: signal.Signals) -> None:
    asked = {"prompt": "the", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with served(trained_run.path, "--sequences", "2", "--drain", "600") as (process, url):
        with httpx.stream("POST", url + "/v1/completions", json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(sign)
            while httpx.get(url + "/health").status_code == 200:
                pass
            process.send_signal(sign)
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
        assert process.wait(20) == 0


def test_an_address_that_cannot_be_had_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be listened at: Address already in use"):
            serve(tmp_path, port=port)
    with pytest.raises(ConfigError, match=r"no\.such\.host"):
        serve(tmp_path, host="no.such.host.invalid")


@pytest.mark.parametrize(("text", "bytes_"), [("512", 512), ("8MiB", 2**23), ("1.5 GiB", 3 * 2**29)])
def test_sizes_have_units(text: str, bytes_: int) -> None:
    assert size(text, "--memory") == bytes_
    with pytest.raises(typer.BadParameter, match="20GiB"):
        size(text + "B", "--memory")


def test_options_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError, match="no API key"):
        serve(tmp_path, api_key_file=tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot be read"):
        serve(tmp_path, api_key_file=tmp_path / "absent")
    with pytest.raises(ConfigError, match="API key"):
        serve(tmp_path, api_key=["two words "])
    with pytest.raises(ConfigError, match="sequences"):
        serve(tmp_path, sequences=0)
    with pytest.raises(ConfigError, match="timeout"):
        serve(tmp_path, timeout=0)
