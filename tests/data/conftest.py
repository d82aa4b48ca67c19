"""A small corpus of invented text, the data folder made of it, and a stand-in for Hugging Face data sets."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from stand_in_hub import OPTIONS, ROWS, Stream, Table, shards

from hinny.data.prepare import prepare

SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvw" for vowel in "aeio"]


def write_corpus(folder, n_documents=40, seed=0):
    """Files of random sentences of random words, one document each."""
    rng = np.random.default_rng(seed)
    words = np.array(["".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=rng.integers(1, 5)))
                      for _ in range(400)])
    for n in range(n_documents):
        lines = [f"{' '.join(words[rng.integers(400, size=rng.integers(4, 12))])}, {rng.integers(10_000)}.".capitalize()
                 for _ in range(rng.integers(10, 60))]
        (folder / f"{n:03d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def folder(corpus, tmp_path_factory):
    """A data folder; tests must not change it."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    prepare(path, text=[corpus], vocab_size=600, held_out=0.1)
    return path


@pytest.fixture
def datasets(monkeypatch):
    """The stand-in, which records how it is called and serves `module.stream` where a stream is asked for."""
    module = types.ModuleType("datasets")
    module.calls = []
    module.stream = Stream(ROWS)

    def load_dataset(name, config, *, split, streaming):
        module.calls.append((name, config, split, streaming))
        if split not in ("train", "validation"):
            raise ValueError(f"Unknown split {split!r}.")
        rows = ROWS if split == "train" else ROWS[:40]
        return module.stream if streaming else Table(rows)

    module.load_dataset = load_dataset
    module.load_from_disk = lambda name: (
        Table(ROWS) if (Path(name) / "state.json").exists() else {"train": Table(ROWS), "validation": Table(ROWS[:40])})
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.fixture
def expected(tmp_path):
    """The shards of the same documents as JSON lines."""
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prepare(tmp_path / "same", jsonl=[tmp_path / "same.jsonl"], field="text", **OPTIONS)
    return shards(tmp_path / "same")
