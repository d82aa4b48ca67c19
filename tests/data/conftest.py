"""A small corpus of invented text and the data folder made of it."""

import numpy as np
import pytest

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
