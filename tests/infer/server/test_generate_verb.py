"""`hinny generate`: every option reaches the draws, and the text comes in pieces."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hinny
from hinny.cli import main
from hinny.cli.generate import generate
from hinny.errors import ConfigError
from hinny.run import Run

OPTIONS = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "presence_penalty": 0.5,
           "frequency_penalty": 0.25, "repetition_penalty": 1.25, "seed": 3, "max_tokens": 24}


def written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    monkeypatch.setattr(sys, "argv", ["hinny", "generate", *map(str, options)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    return capsys.readouterr().out


def test_options_reach_the_draws(trained_run: Run, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    line = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", value)]
    found = written(capsys, monkeypatch, trained_run.path, "the self", "--device", "cpu", *line)
    assert found == "".join(hinny.generate(trained_run.path, "the self", **OPTIONS)) + "\n"
    assert found != "".join(hinny.generate(trained_run.path, "the self", **OPTIONS | {"seed": 4})) + "\n"


def test_drafts_change_no_greedy_text(trained_run: Run, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (trained_run.path, "the self the self", "--device", "cpu", "--max-tokens", 20)
    assert written(capsys, monkeypatch, *asked, "--drafts", 3) == written(capsys, monkeypatch, *asked)


class Piped:
    """Standard input that a program has written."""

    def __init__(self, content: bytes, terminal: bool = False) -> None:
        self.buffer, self._terminal = io.BytesIO(content), terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_prompt_comes_from_a_pipe_or_a_file_as_it_is(trained_run: Run, capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "the self\r\nthe \u00e9\n"
    (tmp_path / "prompt").write_bytes(text.encode())
    asked = (trained_run.path, "--device", "cpu", "--max-tokens", 5, "--json")
    true = {"prompt": text, "text": "".join(hinny.generate(trained_run.path, text, max_tokens=5))}
    assert json.loads(written(capsys, monkeypatch, *asked, "--file", tmp_path / "prompt")) == true
    for dash in ((), ("-",)):
        monkeypatch.setattr(sys, "stdin", Piped(text.encode()))
        assert json.loads(written(capsys, monkeypatch, *asked, *dash)) == true


def test_what_is_no_prompt_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="give one of them"):
        generate(nowhere, "the", file=nowhere)
    with pytest.raises(ConfigError, match=r"nowhere cannot be read"):
        generate(nowhere, file=nowhere)
    with pytest.raises(ConfigError, match="the prompt cannot be read"):
        generate(nowhere, "\udcff")
    monkeypatch.setattr(sys, "stdin", Piped(b"the \xff"))
    with pytest.raises(ConfigError, match="the prompt cannot be read"):
        generate(nowhere)
    monkeypatch.setattr(sys, "stdin", Piped(b"", terminal=True))
    with pytest.raises(ConfigError, match="there is no prompt"):
        generate(nowhere)
    with pytest.raises(ConfigError, match="one process alone"):
        generate(nowhere, tensor=2)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_reader_who_leaves_and_ctrl_c_end_it_without_a_trace(trained_run: Run, leaves: bool) -> None:
    command = [sys.executable, "-m", "hinny", "generate", str(trained_run.path), "the", "--device", "cpu", "--threads",
               "1", "--max-tokens", "20000", "--temperature", "1", "--seed", "1", "--stop", "never written"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        if leaves:
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        said = process.stderr.read().decode()
        assert process.wait(20) == (1 if leaves else 130)
    assert "Traceback" not in said
