"""What a study says of its text is what `hinny prepare` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hinny.cli import app
from hinny.config import validate
from hinny.errors import ConfigError
from hinny.study.text import PrepareConfig, command


def words(recall_words: bool = True, **keys: Any) -> list[str]:
    return command(validate(PrepareConfig, keys, "mine.toml"), Path("d"), 8192, recall_words=recall_words)


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, ["--vocab-size", "8192", "--recall-words"]),
    ({"text": ["a", "b"]}, ["--text", "a", "--text", "b", "--vocab-size", "8192", "--recall-words"]),
    ({"jsonl": "f", "field": "t", "max_bytes": 9, "min_tokens": 5, "held_out": 0.1, "workers": 2, "source_field": "s"},
     ["--jsonl", "f", "--field", "t", "--source-field", "s", "--max-bytes", "9", "--min-tokens", "5",
      "--held-out", "0.1", "--workers", "2", "--vocab-size", "8192", "--recall-words"]),
    ({"hf": "n", "hf_config": "c", "hf_split": "p", "hf_rows": 3, "stream": True},
     ["--hf", "n", "--hf-config", "c", "--hf-split", "p", "--hf-rows", "3", "--stream", "--vocab-size", "8192",
      "--recall-words"]),
    ({"tokenizer": "t.json"}, ["--tokenizer", "t.json"])])
def test_every_key_is_an_option_of_the_command(keys: dict[str, Any], expected: list[str]) -> None:
    assert words(**keys) == ["prepare", "d", *expected]


def test_each_key_is_an_option_that_the_command_has() -> None:
    import typer.main
    known = {name for option in typer.main.get_command(app).commands["prepare"].params for name in option.opts}
    assert {f"--{name.replace('_', '-')}" for name in PrepareConfig.model_fields} <= known


def test_words_for_recall_are_learnt_where_recall_is_practised() -> None:
    assert words(recall_words=False) == ["prepare", "d", "--vocab-size", "8192"]


@pytest.mark.parametrize(("keys", "message"), [
    ({"text": ["a"], "hf": "n"}, "text and hf exclude each other"),
    ({"jsonl": "f"}, "jsonl and field belong together"),
    ({"field": "t"}, "field has no effect without jsonl or hf"),
    ({"text": ["a"], "source_field": "s"}, "source_field has no effect without jsonl or hf"),
    ({"hf_rows": 3}, "hf_rows has no effect without hf"),
    ({"jsonl": "f", "field": "t", "stream": True}, "stream has no effect without hf"),
    ({"min_tokens": 0}, "min_tokens is 0")])
def test_what_has_no_effect_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        words(**keys)
