"""A small study by two processes under torchrun, and taken up elsewhere: the figures are those of one process."""

from __future__ import annotations

import csv
import json
import json.decoder
import os
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hinny.study import conduct

STUDY = """
description = "Two models, two steps."
recipes = ["tiny-transformer", "tiny-mamba2"]
seeds = [1]
match_tolerance = 0.99
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
save_every = 1
[prepare]
[eval]
tasks = ["heldout", "mqar"]
samples = 2
lengths = [256]
pairs = [4]
windows = 2
"""
RUNS = ["tiny-transformer-s1", "tiny-mamba2-s1"]


def figures(folder: Path) -> list[tuple[Any, ...]]:
    """What results/study.json says, without what made it."""
    rows = json.loads((folder / "results" / "study.json").read_text())
    return [tuple(row[key] for key in ("what", "variant", "shape", "value", "low", "high", "unit")) for row in rows]


def test_two_processes_and_a_copied_folder_give_the_figures_of_one(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (text := tmp_path / "text").mkdir()
    for module in (csv, json.decoder, string):
        assert module.__file__
        (text / f"{module.__name__}.txt").write_text(Path(module.__file__).read_text())
    (study := tmp_path / "trial.toml").write_text(STUDY)
    conduct.study(study, out=tmp_path / "one", text=[text], jobs=2)
    expected = figures(tmp_path / "one")
    assert {what for what, *_ in expected} >= {"train_loss", "held_out_loss", "mqar.accuracy"}
    capfd.readouterr()

    # the same by two processes, whose children know nothing of each other
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hinny", "study",
               str(study), "--out", str(tmp_path / "two"), "--text", str(text), "--jobs", "1"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, cwd=Path(__file__).parents[2],
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "two") == expected
    ran = Counter(re.findall(r"\] (.*): \d+ s", done.stdout))
    # one prepares; a process that comes only then looks at the text again
    assert ran.pop("prepare") in (1, 2)
    assert ran == {f"{what} tiny-{name} s1": 1 for what in ("train", "eval") for name in ("transformer", "mamba2")}
    counted = [int(number) for number in re.findall(r"^This process ran (\d+) of 5 jobs\.$", done.stdout, re.MULTILINE)]
    assert len(counted) == 2
    assert min(counted) > 1
    # one has written the report, both have named it
    assert done.stdout.count("Held-out loss (nats/token)") == 1
    assert done.stdout.count(f"Report: {tmp_path / 'two' / 'report.html'}") == 2
    for run in RUNS:
        env = json.loads((tmp_path / "two" / "runs" / run / "env.json").read_text())
        assert env["command"].startswith("python -m hinny train "), env["command"]

    # half done on one machine, it goes on on another
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    for part in ("checkpoints/step-00000002", "results", "evals"):
        shutil.rmtree(tmp_path / "three" / "runs" / RUNS[0] / part)
    shutil.rmtree(tmp_path / "three" / "results")
    shutil.rmtree(tmp_path / "two")
    conduct.study(study, out=tmp_path / "three", text=[text], jobs=2)
    assert figures(tmp_path / "three") == expected
    assert capfd.readouterr().out.count(": reused") == 2
