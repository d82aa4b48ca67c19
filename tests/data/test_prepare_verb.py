"""`hinny prepare` hands every option to the function of that name, and says how to go on when it is stopped."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hinny.cli import app
from hinny.data import prepare as module

RECORD = {"train": {"documents": 3, "tokens": 4000}, "heldout": {"documents": 1, "tokens": 50}, "vocab_size": 257}
GIVEN: dict[str, Any] = {
    "text": [Path("a"), Path("b")], "jsonl": [Path("c.jsonl.gz")], "field": "body", "hf": "some/name", "hf_config": "C",
    "hf_split": "test", "hf_rows": 7, "stream": True, "tokenizer": Path("t.json"), "vocab_size": 300, "held_out": 0.25,
    "max_bytes": 9, "seed": 4, "recall_words": True, "megatron": Path("m"), "split": "9,1",
    "min_tokens": 12, "source_field": "repo", "seq_len": 16, "workers": 3}


def test_every_option_reaches_the_function_of_that_name(monkeypatch) -> None:
    names = set(inspect.signature(module.prepare).parameters) - {"out", "progress"}
    assert set(GIVEN) == names
    calls = []
    monkeypatch.setattr(module, "prepare", lambda out, **given: calls.append((out, given)) or RECORD)
    arguments = ["prepare", "DIR"]
    for name, value in GIVEN.items():
        option = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            arguments += [option] if one is True else [option, str(one)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "4,000 tokens to train on" in done.output
    (out, given), = calls
    given.pop("progress")
    assert (out, given) == (Path("DIR"), GIVEN)


def test_without_options_it_has_the_functions_own_defaults(monkeypatch) -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(module.prepare).parameters.items()}
    calls = []
    monkeypatch.setattr(module, "prepare", lambda out, **given: calls.append(given) or RECORD)
    assert CliRunner().invoke(app, ["prepare", "DIR"]).exit_code == 0
    for name in GIVEN:
        assert calls[0][name] == defaults[name], name


def test_ctrl_c_ends_it_with_a_word_on_how_to_go_on(monkeypatch) -> None:
    def stop(out: Path, **given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", stop)
    done = CliRunner().invoke(app, ["prepare", "DIR"])
    assert done.exit_code == 130
    assert "DIR: stopped; run the same command to go on" in done.output


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--workers", "two"]])
def test_an_impossible_number_of_workers_is_a_mistake_of_the_command(arguments) -> None:
    assert CliRunner().invoke(app, ["prepare", "DIR", *arguments]).exit_code == 2
