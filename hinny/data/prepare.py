"""Text → a data folder: tokenizer, train and held-out shards, and data.json, which says what they are.

The folder appears whole or not at all, and is a pure function of the documents and the options: the same request finds
its folder again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hinny import tokenizer as tokenizers
from hinny.data.folder import DataFolder, read_record
from hinny.data.pairs import SPLIT, read_pair
from hinny.data.phonebook import spelling
from hinny.data.shards import Shard, ShardWriter, token_dtype
from hinny.data.sources import open_source
from hinny.data.split import Plan, plan
from hinny.errors import ConfigError, DataError

FORMAT = 1
"""Raised when the same request would give another folder, so that old folders are not taken for new ones."""

BPE_SAMPLE_BYTES = 6_000_000
"""Text that the tokenizer learns from: it bounds time and memory, and a few thousand merges gain nothing from more."""

RECALL_REPEATS = 2000
"""How often the words of phone books are put into that text, where they are asked for."""

ENCODE_CHARACTERS = 1_000_000
"""Text encoded in one call."""

HELD_OUT = 0.03
"""Share of the text kept from training, where none is asked for."""

VOCAB_SIZE = 4096
"""Tokens of a learnt tokenizer, where none is asked for."""

Progress = Callable[[str, float], None]
"""Called with a stage's name (read, tokenizer, encode or reused) and the share of it that is done.

About every megabyte of text; the second half of `tokenizer`, the learning itself, is one call of a library."""


def prepare(out: str | Path, *, text: Sequence[str | Path] | None = None, jsonl: Sequence[str | Path] | None = None,
            field: str | None = None, tokenizer: str | Path | None = None, vocab_size: int | None = None,
            held_out: float = HELD_OUT, max_bytes: int | None = None, seed: int = 0, recall_words: bool = False,
            megatron: str | Path | None = None, split: str | None = None,
            progress: Progress | None = None) -> dict[str, Any]:
    """Write the data folder `out` and return its data.json, with `reused` true if it was there already.

    text: files and folders, a document per file. jsonl and field: files of JSON lines, a document per line. Neither:
    the running Python's standard library. tokenizer: a file or folder of `tokenizer.load`; else a BPE of `vocab_size`
    tokens, or 4096, is learnt from the train documents. held_out: share of the bytes kept from training; if every
    document is longer than that, the end of the longest one. max_bytes: use a seeded choice of documents up to that
    size. recall_words: the tokenizer also learns the words of phone books, so that recall prompts are short.
    megatron: in place of text, the prefix of a .bin and .idx that Megatron made, with their tokenizer; they are not
    copied. split: their parts for training, held out and unused, in Megatron's words, "99,1,0" without it.
    Raises DataError for text that cannot be used and for a folder that holds something else.
    """
    report = progress or (lambda stage, share: None)
    if megatron is not None:
        idle = {"text": text, "jsonl": jsonl, "field": field, "vocab_size": vocab_size, "max_bytes": max_bytes,
                "recall_words": recall_words or None, "seed": seed or None,
                "held_out": None if held_out == HELD_OUT else held_out}
        return _prepare_pair(Path(out), megatron, tokenizer, SPLIT if split is None else split, idle, report)
    if split is not None:
        raise ConfigError(f"split {split!r} has no effect without megatron; use held_out, or remove it.")
    _check(held_out, max_bytes)
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError(f"vocab_size {vocab_size} has no effect with a given tokenizer; remove one of the two.")
    if tokenizer is not None and recall_words:
        raise ConfigError("recall_words has no effect with a given tokenizer; remove one of the two.")
    vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
    tokenizers.check_vocab_size(vocab_size)
    out = Path(out)
    given = None if tokenizer is None else tokenizers.load(tokenizer)
    options = {"format": FORMAT, "held_out": held_out, "max_bytes": max_bytes, "seed": seed,
               "tokenizer": given.fingerprint if given else f"bpe {vocab_size}",
               "recall_words": recall_words}
    report("read", 0.0)
    planned = plan(open_source(_listed(text), _listed(jsonl), field), options, lambda share: report("read", share))
    report("read", 1.0)
    if known := _existing(out, planned.request):
        report("reused", 1.0)
        return {**known, "reused": True}

    def fill(folder: Path) -> dict[str, Any]:
        record = _write(folder, planned, given or _learn(planned, vocab_size, recall_words, report), report)
        return record | {"held_out": held_out, "max_bytes": max_bytes, "seed": seed, "recall_words": recall_words}

    return _whole(out, planned.request, fill)


def _prepare_pair(out: Path, prefix: str | Path, tokenizer: str | Path | None, split: str, idle: dict[str, Any],
                  report: Progress) -> dict[str, Any]:
    """The folder of a pair that Megatron made; `idle` are options that have no say in it, None where not given."""
    for name, value in idle.items():
        if value is not None:
            raise ConfigError(f"{name} ({value}) has no effect with megatron, whose files are taken as they are; "
                              "remove it.")
    if tokenizer is None:
        raise ConfigError("megatron needs tokenizer, the one that its files were made with.")
    known = tokenizers.load(tokenizer)
    report("read", 0.0)
    record = read_pair(prefix, known, split, lambda share: report("read", share))
    if existing := _existing(out, record["request"]):
        report("reused", 1.0)
        return {**existing, "reused": True}

    def fill(folder: Path) -> dict[str, Any]:
        known.save(folder)
        return record

    return _whole(out, record["request"], fill)


def _whole(out: Path, request: str, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """`fill` a folder beside `out`, add the data.json that it returns, and give it its name."""
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        try:
            record = {**fill(partial), "command": _command()}
            (partial / "data.json").write_text(json.dumps(record, indent=2) + "\n")
            reused = _publish(partial, out, request)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as fault:
        raise DataError(f"{out}: cannot be written: {fault.strerror}. Nothing was kept.") from None
    return {**(reused or record), "reused": reused is not None}


def _check(held_out: float, max_bytes: int | None) -> None:
    if not 0 < held_out <= 0.5:
        raise ConfigError(f"held_out is {held_out}; the share of the text kept from training is above 0, at most 0.5.")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes is {max_bytes}; it must be at least 1.")


def _listed(paths: Sequence[str | Path] | str | Path | None) -> Sequence[str | Path] | None:
    return [paths] if isinstance(paths, str | Path) else paths


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _learn(planned: Plan, vocab_size: int, recall_words: bool, report: Progress) -> tokenizers.Tokenizer:
    report("tokenizer", 0.0)
    texts = planned.sample(BPE_SAMPLE_BYTES, lambda share: report("tokenizer", share / 2))
    report("tokenizer", 0.5)
    if recall_words:
        # as often as the common words of a sample of that size, so that each becomes one token
        texts = [*texts, *[spelling()] * RECALL_REPEATS]
    learnt = tokenizers.train_bpe(texts, vocab_size)
    report("tokenizer", 1.0)
    return learnt


def _write(folder: Path, planned: Plan, tokenizer: tokenizers.Tokenizer, report: Progress) -> dict[str, Any]:
    """Tokenizer and both shards into `folder`; returns the record of data.json."""
    tokenizer.save(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "heldout")}
    with ShardWriter(folder / "train", dtype) as train, ShardWriter(folder / "heldout", dtype) as heldout:
        writers = {"train": train, "heldout": heldout}
        for batch in _batches(planned.pieces()):
            for (split, text), ids in zip(batch, tokenizer.encode_many([text for _, text in batch]), strict=True):
                writers[split].add_document([*ids, tokenizer.eod])
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids) + 1
                counts[split]["bytes"] += len(text.encode())
            report("encode", min(sum(c["bytes"] for c in counts.values()) / planned.n_bytes, 1.0))
    for split, count in counts.items():
        if not count["documents"]:
            raise DataError(f"the data set is too small: {planned.n_bytes} bytes leave no {split} text.")
    fingerprint = hashlib.sha256(f"{planned.request} {tokenizer.fingerprint}".encode()).hexdigest()
    return {"fingerprint": fingerprint, "request": planned.request, "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "dtype": dtype.name,
            "source": {**planned.source.description(), "documents": planned.found, "empty": planned.empty}, **counts}


def _batches(pieces: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _publish(partial: Path, out: Path, request: str) -> dict[str, Any] | None:
    """Give the finished folder its name; the record of another process's folder if that one came first."""
    try:
        os.rename(partial, out)
    except OSError:
        if known := _existing(out, request):
            return known
        raise
    return None


def _existing(out: Path, request: str) -> dict[str, Any] | None:
    """The data.json of `out` if it answers this request, None if there is nothing; anything else is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "data.json").is_file():
        raise DataError(f"{out} exists and is no data folder (it has no data.json); name another folder.")
    record = read_record(out)
    if record["request"] != request:
        raise DataError(f"{out} holds other data: its request is {record['request'][:12]}, this one {request[:12]} "
                        "(other texts or options). Name another folder, or remove this one.")
    if "pair" in record:
        DataFolder(str(out), None).shard("train")
    else:
        for split in ("train", "heldout"):
            Shard(out / split)
    return record
