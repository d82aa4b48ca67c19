"""`hinny generate`: every option reaches the draws, and the text comes in pieces."""

from __future__ import annotations

import sys

import pytest

import hinny
from hinny.cli import main
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
