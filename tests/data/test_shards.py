"""Shards are Megatron's files byte for byte, both ways, and anything else is refused with what was found."""

import os
import struct

import numpy as np
import pytest

from hinny.data.shards import DTYPES, Shard, ShardWriter, token_dtype
from hinny.errors import DataError

# documents: [1 2 3] + [4 5], then [], then [6]: four sequences
SEQUENCES = [[1, 2, 3], [4, 5], [], [6]]
DOCUMENTS = [0, 2, 3, 4]
LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}


def hand_made(code):
    """.idx and .bin of SEQUENCES, packed field by field from the format's description."""
    size = struct.calcsize(f"<{LETTERS[code]}")
    lengths = [len(s) for s in SEQUENCES]
    offsets = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", 4, 4)
    index += struct.pack("<4i", *lengths) + struct.pack("<4q", *offsets) + struct.pack("<4q", *DOCUMENTS)
    return index, b"".join(struct.pack(f"<{len(s)}{LETTERS[code]}", *s) for s in SEQUENCES)


@pytest.fixture
def prefix(tmp_path):
    return put(tmp_path / "s", *hand_made(8))


def put(prefix, index, data):
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(data)
    return prefix


@pytest.mark.parametrize("code", LETTERS)
def test_hand_made_files_of_every_dtype_are_read(tmp_path, code):
    shard = Shard(put(tmp_path / "s", *hand_made(code)))
    assert len(shard) == 4
    assert [shard[i].tolist() for i in range(4)] == SEQUENCES
    assert shard[-1].tolist() == [6]
    assert shard.document_indices.tolist() == DOCUMENTS
    assert shard.document_ends.tolist() == [5, 5, 6]
    assert shard.n_tokens == 6
    assert shard.tokens(2, 6).tolist() == [3, 4, 5, 6]
    assert shard.documents_of(3, 6).tolist() == [0, 0, 2]
    assert struct.calcsize(f"<{LETTERS[code]}") == shard.dtype.itemsize


@pytest.mark.parametrize("code", LETTERS)
def test_the_writer_makes_exactly_those_bytes(tmp_path, code):
    with ShardWriter(tmp_path / "s", DTYPES[code]) as writer:
        writer.add(SEQUENCES[0])
        writer.add(SEQUENCES[1])
        writer.end_document()
        writer.add_document(SEQUENCES[2])
        writer.add_document(np.array(SEQUENCES[3]))
    assert ((tmp_path / "s.idx").read_bytes(), (tmp_path / "s.bin").read_bytes()) == hand_made(code)


def test_documents_laid_end_to_end_make_the_same_bytes_as_one_by_one(tmp_path):
    documents = [[1, 2, 3], [], [4], [5, 6]]
    with ShardWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)
    with ShardWriter(tmp_path / "b", np.dtype("<u2")) as writer:
        writer.add_documents(np.array([1, 2, 3], "<u2"), np.array([3, 0]))
        writer.add_document([4])
        writer.add_documents(np.array([], "<u2"), np.array([], int))
        writer.add_documents(np.array([5, 6], "<u2"), np.array([2]))
    for end in ("bin", "idx"):
        assert (tmp_path / f"b.{end}").read_bytes() == (tmp_path / f"a.{end}").read_bytes()


@pytest.mark.parametrize("what", ["removed", "cut off", "longer"])
def test_a_file_that_changes_under_an_open_shard_is_refused_by_name(prefix, what):
    shard = Shard(prefix)
    part = shard.part(range(1, 4))
    file = prefix.with_suffix(".bin")
    if what == "removed":
        file.unlink()
    else:
        os.truncate(file, 4 if what == "cut off" else 400)
    message = "now cannot be read: No such file" if what == "removed" else r"4(00)? bytes, 12 when it was opened"
    for read in (lambda: shard.tokens(0, 2), lambda: shard[0], lambda: part.tokens(0, 1)):
        with pytest.raises(DataError, match=message) as refusal:
            read()
        assert str(file) in str(refusal.value)


def test_files_with_modes_are_read_as_well(prefix):
    index, data = hand_made(8)
    assert Shard(put(prefix, index + bytes(4), data))[1].tolist() == [4, 5]


def test_a_shard_without_tokens_is_whole(tmp_path):
    with ShardWriter(tmp_path / "s", np.dtype("<u2")):
        pass
    shard = Shard(tmp_path / "s")
    assert (len(shard), shard.n_tokens, len(shard.document_ends)) == (0, 0, 0)


def test_the_token_type_follows_the_vocabulary():
    assert token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")
    assert token_dtype(256_000) == np.dtype("<i4")


def test_a_token_too_large_for_its_type_is_refused_and_leaves_no_index(tmp_path):
    with pytest.raises(DataError, match=r"tokens 5 to 65536 exceed uint16"), \
            ShardWriter(tmp_path / "s", np.dtype("<u2")) as writer:
        writer.add_document([5, 65536])
    assert not (tmp_path / "s.idx").exists()


def test_a_sequence_out_of_range_is_an_index_error(prefix):
    with pytest.raises(IndexError, match="sequence 4 of 4"):
        Shard(prefix)[4]


INDEX = hand_made(8)[0]


@pytest.mark.parametrize(("index", "message"), [
    (b"PK\x03\x04" + INDEX[4:], r"not a Megatron index: begins with b'PK.*expected b'MMIDIDX"),
    (b"", "not a Megatron index"),
    (INDEX[:20], "cut off: 20 bytes, the header alone has 34"),
    (INDEX[:9] + struct.pack("<Q", 2) + INDEX[17:], "index version 2, expected 1"),
    (INDEX[:17] + b"\x09" + INDEX[18:], "unknown dtype code 9, expected one of 1, 2, 3, 4, 5, 6, 7, 8"),
    (INDEX[:-3], r"cut off: 111 bytes, expected 114 for 4 sequences and 4 document boundaries"),
    (INDEX + b"xy", "longer than its header says: 116 bytes, expected 114"),
    (INDEX[:34] + struct.pack("<4i", 3, 3, -1, 1) + INDEX[50:], "not the running sum"),
    (INDEX[:50] + struct.pack("<4q", 0, 6, 8, 10) + INDEX[82:], "not the running sum"),
    (INDEX[:82] + struct.pack("<4q", 0, 3, 2, 4), "document boundaries must rise from 0 to 4"),
    (INDEX[:82] + struct.pack("<4q", 0, 2, 3, 5), "document boundaries must rise from 0 to 4"),
])
def test_a_damaged_or_foreign_index_is_refused_with_what_was_found(prefix, index, message):
    put(prefix, index, hand_made(8)[1])
    with pytest.raises(DataError, match=message) as refusal:
        Shard(prefix)
    assert str(prefix) + ".idx" in str(refusal.value)


def test_tokens_that_do_not_match_the_index_are_refused(prefix):
    put(prefix, INDEX, hand_made(4)[1])
    with pytest.raises(DataError, match=r"s\.bin: 24 bytes, but its .idx lists 6 tokens of uint16, 12 bytes"):
        Shard(prefix)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_half_a_pair_is_refused(prefix, missing):
    prefix.with_suffix(missing).unlink()
    with pytest.raises(DataError, match=rf"s\{missing} is missing"):
        Shard(prefix)


def test_an_unreadable_index_is_refused(prefix, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"s\.idx: cannot be read: Permission denied"):
        Shard(prefix)
