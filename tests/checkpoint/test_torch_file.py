"""A file that is written tensor by tensor is one of torch.save."""

from __future__ import annotations

import argparse
import zipfile

import pytest
import torch

from hinny.checkpoint.formats import pickles
from hinny.checkpoint.formats.torch_file import TorchFile
from hinny.errors import CheckpointError

VALUES = [torch.randn(7, 5), torch.randn(64, 33).bfloat16(), torch.randn(4, 6).half().T, torch.empty(0, 3),
          torch.tensor(2.0, dtype=torch.float64), torch.randn(9, 2)[3:5]]


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it_also_mapped(tmp_path, mmap):
    file = tmp_path / "x.pt"
    with TorchFile(file) as out:
        written = [out.add(value) for value in VALUES]
        out.finish({"values": written, "again": written[1], "n": 3, "none": None, "dtype": torch.bfloat16})
    found = torch.load(file, weights_only=True, mmap=mmap)
    for mine, theirs in zip(VALUES, found["values"], strict=True):
        assert theirs.dtype == mine.dtype
        assert torch.equal(theirs, mine)
        assert theirs.is_contiguous()
        assert theirs.untyped_storage().nbytes() == mine.nbytes
        assert theirs.data_ptr() % 64 == 0
    assert found["again"].data_ptr() == found["values"][1].data_ptr()
    assert (found["n"], found["none"], found["dtype"]) == (3, None, torch.bfloat16)
    assert zipfile.ZipFile(file).testzip() is None


def test_what_reads_nothing_but_torchs_own_files_reads_it(tmp_path):
    with TorchFile(tmp_path / "x.pt") as out:
        out.finish({"model": {"a": out.add(VALUES[0])}, "args": argparse.Namespace(b=1)})
    found = pickles.load(tmp_path / "x.pt")
    assert torch.equal(found["model"]["a"], VALUES[0])
    assert found["args"].fields == {"b": 1}


def test_a_file_that_was_not_finished_is_none(tmp_path):
    with TorchFile(tmp_path / "x.pt") as out:
        out.add(VALUES[0])
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        pickles.load(tmp_path / "x.pt")
