"""A checkpoint of the tests' own format."""

import sys

import fake_format
import pytest

from hinny.checkpoint import formats
from hinny.tokenizer import BYTES_FILE


@pytest.fixture
def only_the_fake_format(monkeypatch):
    monkeypatch.setitem(sys.modules, "hinny.checkpoint.formats.fake", fake_format)
    monkeypatch.setattr(formats, "FORMATS", {"fake": "fake"})


@pytest.fixture
def own():
    return fake_format.ours()


@pytest.fixture
def source(tmp_path, own, only_the_fake_format):
    folder = fake_format.write(tmp_path / "source", fake_format.theirs(own))
    (folder / "tokenizer.json").write_bytes(BYTES_FILE)
    return folder
