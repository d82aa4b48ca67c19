"""JSON lines are the same documents in pieces of any size, plain or compressed, and a cut-off file is refused."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import types
import zlib
from pathlib import Path

import pytest

from hinny.data.lines import JSONLines, fields_of_line
from hinny.errors import DataError

TEXTS = ["one", "", "two é\nlines", "x" * 300, "three", *(f"text {n}" for n in range(40))]
# blank lines, an end of line in the other manner, none at the end
CONTENT = "\n\n".join(json.dumps({"t": text}, ensure_ascii=False) for text in TEXTS).replace("\n\n", "\r\n", 3).encode()
LINE_NUMBERS = [1, 2, 3, *range(4, 4 + 2 * (len(TEXTS) - 3), 2)]


@pytest.fixture
def zstandard(monkeypatch) -> None:
    """A stand-in for the package: zlib's frames by the same calls."""
    module = types.ModuleType("zstandard")
    module.ZstdDecompressor = lambda: types.SimpleNamespace(decompressobj=zlib.decompressobj)  # type: ignore[attr-defined]
    module.ZstdError = zlib.error  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zstandard", module)


def written(tmp_path: Path, ending: str, content: bytes = CONTENT) -> Path:
    """The content as a file; compressed ones have two frames, which end within a line."""
    path = tmp_path / f"a.jsonl{ending}"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zlib.compress}[ending]
    path.write_bytes(compress(content[:100]) + compress(content[100:]))
    return path


@pytest.mark.usefixtures("zstandard")
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_pieces_of_any_size_have_every_line_once_in_order(tmp_path, monkeypatch, ending) -> None:
    path = written(tmp_path, ending)
    # blocks smaller than a line, so that pieces end within them
    monkeypatch.setattr("hinny.data.lines.BLOCK", 16)
    source = JSONLines([path, path], "t")
    for piece_bytes in [*range(1, 60), 333, 10_000]:
        pieces = [pickle.loads(pickle.dumps(piece)) for piece in source.pieces(piece_bytes)]
        documents = [document for piece in pieces for document in piece.documents()]
        assert [document.data.decode() for document in documents] == TEXTS * 2
        assert sum(piece.size for piece in pieces) == source.size() == 2 * path.stat().st_size
        if piece_bytes in (1, 7, 10_000):
            assert [document.name for document in documents] == [f"{path} line {n}" for n in LINE_NUMBERS] * 2
    assert len(list(source.pieces(200))) > 6


@pytest.mark.usefixtures("zstandard")
@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [3, 20, -1, -30])
def test_a_cut_off_or_foreign_file_is_refused_by_name(tmp_path, ending, cut) -> None:
    path = written(tmp_path, ending)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending}: not a whole (gzip|zstd) file"):
        list(JSONLines([path], "t").documents())
    path.write_bytes(CONTENT)
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending}: not a"):
        list(JSONLines([path], "t").documents())


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_fault_far_into_a_file_is_told_by_its_line(tmp_path, ending) -> None:
    path = written(tmp_path, ending, b'{"t": "fine"}\n\n' * 50 + b'{"u": "a"}\n' + b'{"t": "fine"}\n' * 50)
    pieces = list(JSONLines([path], "t").pieces(40))
    found = []
    for piece in pieces:
        try:
            list(piece.documents())
        except DataError as fault:
            found.append(str(fault))
    assert found == [f"{path} line 101: no field 't'; it has 'u'."]


def test_zst_without_its_package_is_refused_before_anything_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"b\.jsonl\.zst: reading \.zst needs the package zstandard: pip install "):
        JSONLines([tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"], "t")


def test_zst_by_the_real_package(tmp_path) -> None:
    package = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    compress = package.ZstdCompressor().compress
    path.write_bytes(compress(CONTENT[:100]) + compress(CONTENT[100:]))
    assert [document.data.decode() for document in JSONLines([path], "t").documents()] == TEXTS
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="not a whole zstd file"):
        list(JSONLines([path], "t").documents())


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_json_that_python_cannot_hold_is_refused_with_its_line(value: str) -> None:
    with pytest.raises(DataError, match=r"file\.jsonl line 7: not JSON"):
        fields_of_line(f'{{"text": "a", "other": {value}}}'.encode(), "text", None, lambda: "file.jsonl line 7")
