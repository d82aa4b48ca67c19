"""A small study, one model of it a variant, through the real command line: every verb is a process of its own."""

from __future__ import annotations

import csv
import json.decoder
import string
import textwrap
from pathlib import Path

import pytest

from hinny.config import load_recipe
from hinny.errors import RunError
from hinny.study import conduct
from hinny.study.collect import read_table

STUDY = """
description = "Two models, two steps."
recipes = ["tiny-transformer"]
seeds = [1]
match_tolerance = 0.99
jobs = 1
[overrides.model]
d_model = 64
vocab_size = 512
[overrides.optim]
warmup_samples = 2
[overrides.train]
seq_len = 128
batch_size = 2
micro_batch_size = 2
steps = 2
log_every = 1
eval_every = 1
[prepare]
[eval]
tasks = ["heldout", "phonebook", "mqar", "copy", "choice-cloze", "ruler-fwe"]
ruler_lengths = [768]
max_length = 768
samples = 2
lengths = [256]
pairs = [4]
windows = 2
[bench]
contexts = [16]
train_steps = 1
[[vary]]
name = "grouped"
recipe = "tiny-mamba2"
fit = { key = "model.n_layers" }
plot = "Norm"
overrides = { "model.pattern" = "null", "model.n_layers" = 2, "model.mamba2.n_groups" = 2 }
"""
JOBS = ["train tiny-transformer s1", "eval tiny-transformer s1", "eval ruler tiny-transformer s1",
        "train grouped s1", "eval grouped s1", "eval ruler grouped s1", "bench generate tiny-transformer",
        "bench train tiny-transformer", "bench generate grouped", "bench train grouped"]


def test_a_real_study_runs_is_reused_and_refuses_other_text(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(conduct, "cores", lambda: 1)
    (text := tmp_path / "text").mkdir()
    for module in (csv, json.decoder, string, textwrap):
        assert module.__file__
        (text / f"{module.__name__}.txt").write_text(Path(module.__file__).read_text())
    (study := tmp_path / "trial.toml").write_text(STUDY)
    page = conduct.study(study, out=tmp_path / "out", text=[text])
    capsys.readouterr()

    table = read_table(tmp_path / "out")
    for what in ("train_loss", "held_out_curve", "held_out_loss", "bits_per_byte", "loss_by_position",
                 "phonebook.exact", "phonebook.digits", "phonebook.chance_digits", "mqar.accuracy", "copy.accuracy",
                 "choice-cloze.acc", "ruler-fwe.string_match_all", "ruler.mean", "decode", "prefill", "state_bytes",
                 "train"):
        assert {f.variant for f in table.find(what)} == {"tiny-transformer", "grouped"}, what
    # the rule on training efficiency tells by this that a CPU was timed
    assert all("threads" in f.shape for f in table.find("train"))
    assert table.about["data"]["vocab_size"] == 512
    # a variant was trained as the study says, and stands on its plot
    run = load_recipe(tmp_path / "out" / "runs" / "grouped-s1" / "recipe.toml")
    assert (run.name, run.model.mamba2.n_groups, run.model.d_model, run.train.steps) == ("grouped", 2, 64, 2)
    assert "grouped" in page.read_text().partition('id="sweep0"')[2]

    made = written(tmp_path / "out")
    again = conduct.study(study, out=tmp_path / "out", text=[text])
    out = capsys.readouterr().out
    assert [line.split("] ")[1] for line in out.splitlines() if "reused" in line] == [f"{job}: reused" for job in JOBS]
    assert written(tmp_path / "out") == made
    assert again.read_bytes() == page.read_bytes()

    (text / "csv.txt").write_text("Something else.\n" * 500)
    with pytest.raises(RunError, match=r"prepare failed[\s\S]*holds other data"):
        conduct.study(study, out=tmp_path / "out", text=[text])
    assert written(tmp_path / "out") == made


def written(out: Path) -> dict[str, int]:
    """Files of the data and the runs, with the time of their last change."""
    return {str(file): file.stat().st_mtime_ns for part in ("data", "runs") for file in sorted((out / part).rglob("*"))
            if file.is_file()}
