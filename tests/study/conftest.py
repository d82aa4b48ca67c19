"""A made-up study: the folders and files of a finished one, with invented figures, in seconds and without torch."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hinny.config import Recipe
from hinny.run import Run, row, write_atomically
from hinny.study.conduct import predictions
from hinny.study.config import StudyConfig, load_recipes, load_study
from hinny.study.done import checkpoint
from hinny.study.folder import claim_folder
from hinny.study.plan import Layout

SKILL = {"tiny-transformer": 0.0, "tiny-mamba": 0.07, "tiny-mamba2": 0.04, "tiny-hybrid": -0.08}
"""Invented differences of loss."""
Rows = list[dict[str, Any]]
STUDY = """
description = "Four made-up models."
recipes = ["tiny-transformer", "tiny-mamba", "tiny-mamba2", "tiny-hybrid"]
seeds = [1, 2]
match_tolerance = 0.02
[overrides.train]
seq_len = 256
batch_size = 16
micro_batch_size = 16
steps = 300
eval_every = 50
[prepare]
[eval]
tasks = ["heldout", "phonebook", "mqar", "copy"]
samples = 64
lengths = [64, 96, 128, 192, 256, 320, 384, 512]
pairs = [4, 8, 16, 32]
windows = 128
[bench]
contexts = [64, 256, 1024, 4096]
train_steps = 5
[predict]
recipes = ["8b-transformer", "8b-mamba", "8b-mamba2", "8b-hybrid"]
hardware = ["H100", "H200", "B200", "A100"]
contexts = [1024, 4096, 16384, 32768, 65536, 131072]
batch = 32
"""
ATTENTION = ("tiny-transformer", "tiny-hybrid")


@pytest.fixture(scope="session")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of the shipped tiny recipes whose sizes these tests may count on."""
    file = tmp_path_factory.mktemp("studies") / "trial.toml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="session")
def quick(study_file: Path) -> tuple[StudyConfig, dict[str, Recipe]]:
    """The made-up study and its recipes."""
    config = load_study(study_file)
    return config, load_recipes(config)


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory, quick: tuple[StudyConfig, dict[str, Recipe]]) -> Path:
    """A finished made-up study; read only."""
    root = tmp_path_factory.mktemp("study") / "trial"
    write_study(root, *quick)
    return root


def write_study(root: Path, config: StudyConfig, recipes: dict[str, Recipe]) -> None:
    layout = Layout(root)
    claim_folder(config, recipes, layout)
    layout.data.mkdir()
    (layout.data / "data.json").write_text(json.dumps({
        "fingerprint": "f" * 64, "vocab_size": 4096, "source": {"kind": "standard library", "files": 1700},
        "train": {"documents": 1650, "tokens": 8_000_000, "bytes": 30_000_000}}))
    for seed in config.seeds:
        for name, recipe in recipes.items():
            write_run(Run(layout.run(name, seed)), recipe, seed, config, benched=seed == config.seeds[0])
    layout.results.mkdir(exist_ok=True)
    assert config.predict
    (layout.results / "predict.json").write_text(json.dumps(predictions(config.predict)))


def write_run(run: Run, recipe: Recipe, seed: int, config: StudyConfig, benched: bool) -> None:
    made = {"command": f"hinny train {recipe.name} train.seed={seed}", "commit": "0123456789ab",
            "machine": "Made-up CPU, 2 cores, 8 GiB, Python 3.12.0, torch 2.13.0"}
    run.write_recipe(recipe)
    run.write_env({"device": "cpu", "seed": seed, **made}, resumed=False)
    skill, wobble = SKILL[recipe.name], 0.012 * (seed - 1.5)
    for step in range(10, recipe.train.steps + 1, 10):
        loss = 3.9 + 4.6 * math.exp(-step / 60) + skill * (step - 200) / 100 + wobble
        noise = 0.05 * math.sin(step * (seed + 2))
        tokens = step * recipe.train.batch_size * recipe.train.seq_len
        run.log({"step": step, "tokens": tokens, "loss": loss - 0.4 + noise, "lr": 1e-3, "grad_norm": 1.0,
                 "tokens_per_s": 9000.0, "seconds": 0.4})
        if step % 50 == 0:
            run.log({"step": step, "tokens": tokens, "held_out_loss": loss})
    checkpoint(run.path, recipe).mkdir(parents=True)
    for task, rows in evaluations(recipe.name, skill, wobble, seed, config).items():
        run.save_rows(task, [{**r, **made, "command": f"hinny eval {run.path.name} {task}"} for r in rows])
        asked = {"windows": config.eval.windows} if task == "heldout" else {"samples": config.eval.samples}
        write_atomically(run.path / "evals" / f"{task}.json", json.dumps({"key": asked, "units": []}))
    if benched:
        for what, rows in timings(recipe.name, config).items():
            run.save_rows(what, [{**r, **made, "command": f"hinny bench {what}"} for r in rows])


def evaluations(name: str, skill: float, wobble: float, seed: int, config: StudyConfig) -> dict[str, Rows]:
    def share(what: str, value: float, shape: str) -> dict[str, Any]:
        return row(what, name, value, "share", shape=shape, low=max(0.0, value - 0.1), high=min(1.0, value + 0.1))

    book = []
    for form in ("standard", "reversed"):
        for length in config.eval.lengths:
            reach = 420 if name in ATTENTION else 60
            exact = round(min(1.0, max(0.0, 1.12 - (length / reach) ** 3 * 0.5 - 0.02 * seed)), 3)
            shape = f"form={form} length={length} digits=4"
            book += [share("phonebook.exact", exact, shape),
                     share("phonebook.digits", exact + (1 - exact) * 0.36, shape),
                     share("phonebook.chance_digits", 0.11 + 0.01 * seed, shape)]
    loss = 3.9 + skill + wobble
    shape = "windows=128 length=256"
    held = [row("held_out_loss", name, loss, "nats/token", shape=shape, low=loss - .1, high=loss + .1),
            row("bits_per_byte", name, loss / 2.6, "bits/byte", shape=shape)]
    edges = [0, 4, 8, 16, 32, 64, 128, 256]
    held += [row("loss_by_position", name, loss + 1.4 / (a + 1) ** 0.5, "nats/token", shape=f"position={a}-{b - 1}")
             for a, b in itertools.pairwise(edges)]
    decay = 80 if name in ATTENTION else 9
    mqar = [share("mqar.accuracy", math.exp(-pairs / decay), f"pairs={pairs} length={4 * pairs}")
            for pairs in config.eval.pairs]
    copy = [share("copy.accuracy", math.exp(-n / decay / 8), f"length={n}") for n in config.eval.lengths]
    return {"heldout": held, "phonebook": book, "mqar": mqar, "copy": copy}


def timings(name: str, config: StudyConfig) -> dict[str, Rows]:
    assert config.bench
    grows = {"tiny-transformer": 1.0, "tiny-hybrid": 0.17}.get(name, 0.0)
    rows = []
    for context in config.bench.contexts:
        shape = f"context={context} batch=1"
        speed = 620 / (1 + grows * context / 1500)
        timed = f"{shape} threads=2"
        rows += [row("decode", name, speed, "tokens/s", shape=timed, low=speed * 0.96, high=speed * 1.03),
                 row("prefill", name, 20_000 - 2 * grows * context, "tokens/s", shape=timed),
                 row("state_bytes", name, 60_000 * (grows < 1) + 3072 * grows * context, "bytes", shape=shape)]
    train = row("train", name, 9000 + 20 * len(name), "tokens/s", shape="batch=16 length=256 precision=bf16 threads=2",
                low=8800, high=9900)
    return {"generate": rows, "train": [train]}


@pytest.fixture(scope="session")
def write_made_up() -> Any:
    """`write_study`, for tests that need a study of their own."""
    return write_study
