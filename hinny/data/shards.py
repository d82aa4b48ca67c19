"""Token shards on disk: Megatron's indexed data set, a pair PREFIX.bin and PREFIX.idx, byte for byte.

.bin holds the tokens of all sequences, nothing else. .idx, little-endian: 9 bytes of magic, u64 version 1, u8 dtype
code, u64 sequences S, u64 D = documents + 1, S i32 lengths in tokens, S i64 byte offsets of the sequences in .bin,
D i64 document boundaries 0, end of document 1, …, S counted in sequences; multimodal files add S i8 modes.
"""

from __future__ import annotations

import os
import struct
from array import array
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike

from hinny.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(kind)
    for code, kind in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
"""dtype code of .idx → type of a token in .bin. Code 6 is f64 and 7 is f32, as Megatron has them."""


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary below 65500, else int32: Megatron's rule."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def sync(file: IO[bytes]) -> None:
    """Return when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


class ShardWriter:
    """Writes one shard; use as a context manager. The .idx appears only when all went well.

    `dtype` is a numpy integer or float type of DTYPES, see `token_dtype`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        codes = [code for code, known in DTYPES.items() if known == dtype]
        assert codes, f"{dtype} has no code in the .idx format"
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self._code = codes[0]
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self._file = open(f"{self.prefix}.bin", "wb")  # noqa: SIM115  closed by __exit__

    def add(self, tokens: ArrayLike) -> None:
        """Append one sequence to the current document."""
        array = np.asarray(tokens)
        stored = array.astype(self.dtype)
        if not np.array_equal(stored, array):
            raise DataError(f"{self.prefix}.bin: tokens {array.min()} to {array.max()} exceed {self.dtype.name}.")
        self._file.write(stored.tobytes())
        self._lengths.append(len(stored))

    def end_document(self) -> None:
        """Close the current document; the next sequence belongs to another."""
        self._boundaries.append(len(self._lengths))

    def add_document(self, tokens: ArrayLike) -> None:
        """Append a document of one sequence."""
        self.add(tokens)
        self.end_document()

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of one sequence each, end to end: tokens (n,) of the shard's type, lengths (documents,)."""
        assert tokens.dtype == self.dtype, (tokens.dtype, self.dtype)
        assert len(tokens) == lengths.sum(dtype=np.int64), (len(tokens), lengths)
        assert self._boundaries[-1] == len(self._lengths), "a document is open: end_document is missing"
        self._file.write(tokens.tobytes())
        first = len(self._lengths) + 1
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._boundaries.frombytes(np.arange(first, first + len(lengths), dtype=np.int64).tobytes())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, tb: TracebackType | None) -> None:
        with self._file as data:
            if kind is None:
                sync(data)
        if kind is None:
            with open(f"{self.prefix}.idx", "wb") as index:
                index.write(self._index())
                sync(index)

    def _index(self) -> bytes:
        assert self._boundaries[-1] == len(self._lengths), "a shard ends inside a document: end_document is missing"
        lengths = np.array(self._lengths, dtype="<i4")
        offsets = np.cumsum(lengths, dtype="<i8") - lengths
        return b"".join([
            MAGIC, HEADER.pack(VERSION, self._code, len(lengths), len(self._boundaries)), lengths.tobytes(),
            (offsets * self.dtype.itemsize).astype("<i8").tobytes(), np.array(self._boundaries, "<i8").tobytes()])


class Shard:
    """A shard mapped into memory: `len` sequences, `shard[i]` one of them, `tokens(a, b)` any stretch across them.

    document_indices (documents + 1,) counts sequences; document_ends (documents,) counts tokens. DataError if the pair
    is incomplete, foreign, cut off or does not fit together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index = Path(f"{prefix}.idx")
        data = Path(f"{prefix}.bin")
        self._file = str(data)
        for path in (index, data):
            if not path.is_file():
                raise DataError(f"{path} is missing; a shard is a pair of .bin and .idx.")
        try:
            content = index.read_bytes()
            self._file_size = data.stat().st_size
            self._read_index(index, content)
            self._check_data(data, self._file_size)
            self._tokens = np.memmap(data, dtype=self.dtype, mode="r") if self._file_size else np.zeros(0, self.dtype)
        except OSError as fault:
            raise DataError(f"{fault.filename or index}: cannot be read: {fault.strerror}.") from None

    def _read_index(self, path: Path, content: bytes) -> None:
        start = len(MAGIC) + HEADER.size
        if content[:len(MAGIC)] != MAGIC:
            raise DataError(f"{path}: not a Megatron index: begins with {content[:len(MAGIC)]!r}, expected {MAGIC!r}.")
        if len(content) < start:
            raise DataError(f"{path}: cut off: {len(content)} bytes, the header alone has {start}.")
        version, code, n_sequences, n_boundaries = HEADER.unpack_from(content, len(MAGIC))
        if version != VERSION:
            raise DataError(f"{path}: index version {version}, expected {VERSION}.")
        if code not in DTYPES:
            raise DataError(f"{path}: unknown dtype code {code}, expected one of {', '.join(map(str, DTYPES))}.")
        expected = start + 12 * n_sequences + 8 * n_boundaries
        if len(content) not in (expected, expected + n_sequences):
            what = "cut off" if len(content) < expected else "longer than its header says"
            raise DataError(f"{path}: {what}: {len(content)} bytes, expected {expected} for {n_sequences} sequences "
                            f"and {n_boundaries} document boundaries (or {expected + n_sequences} with modes).")
        self.dtype = DTYPES[code]
        self.lengths = np.frombuffer(content, "<i4", n_sequences, start)
        offsets = np.frombuffer(content, "<i8", n_sequences, start + 4 * n_sequences)
        self.document_indices = np.frombuffer(content, "<i8", n_boundaries, start + 12 * n_sequences)
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._starts = ends
        self.n_tokens = int(ends[-1])
        if (self.lengths < 0).any() or not np.array_equal(offsets, ends[:-1] * self.dtype.itemsize):
            raise DataError(f"{path}: damaged: the sequence offsets are not the running sum of the sequence lengths.")
        boundaries = self.document_indices
        if not n_boundaries or boundaries[0] or boundaries[-1] != n_sequences or (np.diff(boundaries) < 0).any():
            raise DataError(f"{path}: damaged: document boundaries must rise from 0 to {n_sequences} sequences.")
        self.document_ends = ends[boundaries[1:]]

    def _check_data(self, path: Path, size: int) -> None:
        expected = self.n_tokens * self.dtype.itemsize
        if size != expected:
            raise DataError(f"{path}: {size} bytes, but its .idx lists {self.n_tokens} tokens of {self.dtype.name}, "
                            f"{expected} bytes; is it of another shard, or cut off?")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        sequence %= len(self)
        return self.tokens(int(self._starts[sequence]), int(self._starts[sequence + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the shard, counted over all sequences; a view of the file, to be copied at once.

        DataError if the file is gone or has another size than when it was opened.
        """
        assert 0 <= start <= stop <= self.n_tokens, (start, stop, self.n_tokens)
        self._check_file()
        return self._tokens[start:stop]

    def _check_file(self) -> None:
        """A map of a file that was cut off ends the process at the first page that is missing: ask its size first."""
        try:
            size = os.stat(self._file).st_size
        except OSError as fault:
            raise DataError(f"{self._file}: it was opened, and now cannot be read: {fault.strerror}. Put the file back "
                            "and go on.") from None
        if size != self._file_size:
            raise DataError(f"{self._file}: {size} bytes, {self._file_size} when it was opened; it was cut off or "
                            "written anew. Put the file back and go on.")

    def part(self, sequences: range) -> Shard:
        """Some consecutive sequences as a shard of their own, which reads the same file; cut documents stay cut."""
        first, last = sequences.start, sequences.stop
        assert 0 <= first <= last <= len(self), (sequences, len(self))
        part = copy(self)
        begin, end = int(self._starts[first]), int(self._starts[last])
        part.lengths = self.lengths[first:last]
        part._starts = self._starts[first:last + 1] - begin
        part._tokens = self._tokens[begin:end]
        part.n_tokens = end - begin
        inner = self.document_indices[(self.document_indices > first) & (self.document_indices < last)]
        part.document_indices = np.concatenate([[first], inner, [last]] if first < last else [[first]]) - first
        part.document_ends = part._starts[part.document_indices[1:]]
        return part

    def documents_of(self, start: int, stop: int) -> np.ndarray:
        """For each token of [start, stop) the number of its document in the shard."""
        return np.searchsorted(self.document_ends, np.arange(start, stop), side="right")


