"""Text → a data folder: tokenizer, train and held-out shards, and data.json, which says what they are.

The folder appears whole or not at all, and is a pure function of the documents and the options: the same request finds
its folder again. On the way, finished parts lie beside it (hinny.data.work), from which a stopped command goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hinny import tokenizer as tokenizers
from hinny.data.build import Build, Progress
from hinny.data.folder import DataFolder, read_record
from hinny.data.hub import HubOptions, HubStream
from hinny.data.lengths import Lengths, document_lengths, write_plot
from hinny.data.pairs import SPLIT, read_pair
from hinny.data.pieces import MAX_PIECE_BYTES, Source, piece_size
from hinny.data.shards import Shard
from hinny.data.sources import open_source
from hinny.data.work import Work, put, sync_folder
from hinny.data.workers import Workers
from hinny.errors import ConfigError, DataError

FORMAT = 1
"""Raised when the same request would give another folder, so that old folders are not taken for new ones."""

ENCODE_CHARACTERS = 1_000_000
"""Text encoded in one call, where one process does it all and the tokenizer library shares it among its threads."""

HELD_OUT = 0.03
"""Share of the text kept from training, where none is asked for."""

VOCAB_SIZE = 4096
"""Tokens of a learnt tokenizer, where none is asked for."""


def prepare(out: str | Path, *, text: Sequence[str | Path] | None = None, jsonl: Sequence[str | Path] | None = None,
            field: str | None = None, hf: str | Path | None = None, hf_config: str | None = None,
            hf_split: str | None = None, hf_rows: int | None = None, stream: bool = False,
            tokenizer: str | Path | None = None, vocab_size: int | None = None,
            held_out: float = HELD_OUT, max_bytes: int | None = None, seed: int = 0, recall_words: bool = False,
            megatron: str | Path | None = None, split: str | None = None, min_tokens: int | None = None,
            source_field: str | None = None, seq_len: int | None = None, workers: int = 1,
            progress: Progress | None = None) -> dict[str, Any]:
    """Write the data folder `out` and return its data.json, with `reused` true if it was there already.

    text: files and folders, a document per file. jsonl and field: files of JSON lines, also .gz and .zst, a document
    per line. hf: a data set of the Hub or in a folder, a document per row, its text under field, or "text"; hf_config
    and hf_split are those of `datasets`, hf_rows takes the first rows only, stream reads it without keeping a copy in
    the package's cache. None of them: the running Python's standard library. tokenizer: a file or folder of
    `tokenizer.load`; else a BPE of `vocab_size` tokens, or 4096, is learnt from the train documents. held_out: share
    of the bytes kept from training; if every document is longer than that, the end of the longest one. max_bytes: use
    a seeded choice of documents up to that size. recall_words: the tokenizer also learns the words of phone books, so
    that recall prompts are short. megatron: in place of text, the prefix of a .bin and .idx that Megatron made, with
    their tokenizer; they are not copied. split: their parts for training, held out and unused, in Megatron's words,
    "99,1,0" without it. min_tokens: documents of fewer tokens, their end-of-document token counted, are left out of
    both splits. source_field: with jsonl and hf, what says where a document is from (a book, a repository), which is
    kept (hinny.data.origins). seq_len: a length to mark in the plot of the documents' lengths, and the record then has
    `of_seq_len`: shares of documents and tokens in train documents at least that long. workers: processes that read
    and encode; the folder's bytes are the same with any number.

    A call that was stopped goes on from its finished parts when it is made again.
    Raises DataError for text that cannot be used and for a folder that holds something else.
    """
    report = progress or (lambda stage, share: None)
    out = os.path.abspath(out)  # "." has no name to put parts beside
    hub = {"hf_config": hf_config, "hf_split": hf_split, "hf_rows": hf_rows, "stream": stream or None}
    if megatron is not None:
        idle = {"text": text, "jsonl": jsonl, "field": field, "hf": hf, **hub, "vocab_size": vocab_size,
                "max_bytes": max_bytes, "recall_words": recall_words or None, "seed": seed or None,
                "min_tokens": min_tokens, "source_field": source_field,
                "workers": None if workers == 1 else workers, "held_out": None if held_out == HELD_OUT else held_out}
        _check_lengths(None, seq_len)
        found = _prepare_pair(Path(out), megatron, tokenizer, SPLIT if split is None else split, idle, report)
        return _told(Path(out), found, seq_len)
    if split is not None:
        raise ConfigError(f"split {split!r} has no effect without megatron; use held_out, or remove it.")
    _check(held_out, max_bytes, workers, tokenizer, vocab_size, recall_words)
    _check_lengths(min_tokens, seq_len)
    if hf is None:
        _refuse(hub, "without hf")
    given = None if tokenizer is None else tokenizers.load(tokenizer)
    vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
    options = {"format": FORMAT, "held_out": held_out, "max_bytes": max_bytes, "seed": seed,
               "tokenizer": given.fingerprint if given else f"bpe {vocab_size}",
               "recall_words": recall_words,
               # folders from before these options keep their requests
               **({} if min_tokens is None else {"min_tokens": min_tokens}),
               **({} if source_field is None else {"source_field": source_field})}
    source = open_source(_listed(text), _listed(jsonl), field,
                         None if hf is None else HubOptions(str(hf), hf_config, hf_split, hf_rows, stream),
                         source_field)
    return _told(Path(out), _prepare_source(Path(out), source, options, workers, report, given or vocab_size), seq_len)


def _prepare_source(out: Path, source: Source, options: dict[str, Any], workers: int, report: Progress,
                    tokenizer: tokenizers.Tokenizer | int) -> dict[str, Any]:
    """The folder of a source's documents; `tokenizer` is one, or the size of the vocabulary to learn."""
    stream = source if isinstance(source, HubStream) else None
    piece_bytes = MAX_PIECE_BYTES if stream else piece_size(source.size())
    asked = {**options, **source.inputs()}
    with (Work(out, {**asked, "bytes of a piece": piece_bytes}) as work,
          Workers(workers, ENCODE_CHARACTERS) as pool):
        if stream is not None:
            if known := _streamed(out, asked):
                report("reused", 1.0)
                return {**known, "reused": True}
            stream.fetch(work, lambda share: report("stream", share))
        build = Build(source, piece_bytes, options, work, pool, report)
        planned = build.plan()
        if known := _existing(out, planned.request):
            report("reused", 1.0)
            return {**known, "reused": True}

        def fill(folder: Path) -> dict[str, Any]:
            used = tokenizer
            if isinstance(used, int):
                used = build.learn(planned, used, options["recall_words"])
            settings = {name: options[name] for name in ("held_out", "max_bytes", "seed", "recall_words")}
            # what a stream holds is known when it was read: by this it is found again without that
            return build.write(folder, planned, used) | settings | ({} if stream is None else {"asked": asked})

        return _whole(out, work.path / "folder", planned.request, fill)


def _prepare_pair(out: Path, prefix: str | Path, tokenizer: str | Path | None, split: str, idle: dict[str, Any],
                  report: Progress) -> dict[str, Any]:
    """The folder of a pair that Megatron made; `idle` are options that have no say in it, None where not given."""
    _refuse(idle, "with megatron, whose files are taken as they are")
    if tokenizer is None:
        raise ConfigError("megatron needs tokenizer, the one that its files were made with.")
    known = tokenizers.load(tokenizer)
    report("read", 0.0)
    record = read_pair(prefix, known, split, lambda share: report("read", share))
    if existing := _existing(out, record["request"]):
        report("reused", 1.0)
        return {**existing, "reused": True}

    def fill(folder: Path) -> dict[str, Any]:
        put(folder, known.file_name, lambda file: file.write(known.content))
        return record

    try:
        partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
        return _whole(out, partial, record["request"], fill)
    except OSError as fault:
        raise DataError(f"{out}: cannot be written: {fault.strerror}. Nothing was kept.") from None


def _whole(out: Path, partial: Path, request: str, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """`fill` the folder `partial`, add the data.json that it returns, and give it the name `out`."""
    # what a process that was killed has left
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        record = {**fill(partial), "command": _command()}
        write_plot(partial, _lengths(partial, record), None)
        put(partial, "data.json", lambda file: file.write(f"{json.dumps(record, indent=2)}\n".encode()))
        sync_folder(partial)
        reused = _publish(partial, out, request)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**(reused or record), "reused": reused is not None}


def _check(held_out: float, max_bytes: int | None, workers: int, tokenizer: str | Path | None, vocab_size: int | None,
           recall_words: bool) -> None:
    if not 0 < held_out <= 0.5:
        raise ConfigError(f"held_out is {held_out}; the share of the text kept from training is above 0, at most 0.5.")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes is {max_bytes}; it must be at least 1.")
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it is a number of processes, at least 1.")
    if tokenizer is not None:
        _refuse({"vocab_size": vocab_size, "recall_words": recall_words or None}, "with a given tokenizer")
    elif vocab_size is not None:
        tokenizers.check_vocab_size(vocab_size)


def _check_lengths(min_tokens: int | None, seq_len: int | None) -> None:
    for name, value in (("min_tokens", min_tokens), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")


def _lengths(folder: Path, record: dict[str, Any]) -> Lengths:
    """Of the train documents of a data folder."""
    if pair := record.get("pair"):
        return Lengths.of(document_lengths(Shard(pair["prefix"]).part(range(*pair["train"]))))
    return Lengths.of(document_lengths(Shard(folder / "train")))


def _told(out: Path, record: dict[str, Any], seq_len: int | None) -> dict[str, Any]:
    """The record with what was asked about `seq_len`, which the folder's plot marks from now on."""
    if seq_len is None:
        return record
    lengths = _lengths(out, record)
    write_plot(out, lengths, seq_len)
    documents, tokens = lengths.at_least(seq_len)
    return {**record, "of_seq_len": {"seq_len": seq_len, "documents": documents, "tokens": tokens}}


def _refuse(idle: dict[str, Any], where: str) -> None:
    """ConfigError for an option that is given (not None) where it has no say."""
    for name, value in idle.items():
        if value is not None:
            raise ConfigError(f"{name} ({value}) has no effect {where}; remove it.")


def _listed(paths: Sequence[str | Path] | str | Path | None) -> Sequence[str | Path] | None:
    return [paths] if isinstance(paths, str | Path) else paths


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _publish(partial: Path, out: Path, request: str) -> dict[str, Any] | None:
    """Give the finished folder its name; the record of another process's folder if that one came first."""
    try:
        os.rename(partial, out)
    except OSError:
        if known := _existing(out, request):
            return known
        raise
    # the parts are removed next
    sync_folder(out.parent)
    return None


def _streamed(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The data.json of `out` if a stream was asked for in these words and is there; what it streamed then counts."""
    record = _record(out)
    if record is None or record.get("asked") != json.loads(json.dumps(asked)):
        return None
    return _existing(out, record["request"])


def _record(out: Path) -> dict[str, Any] | None:
    """The data.json of `out`, None if there is nothing; what is no data folder is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "data.json").is_file():
        raise DataError(f"{out} exists and is no data folder (it has no data.json); name another folder.")
    return read_record(out)


def _existing(out: Path, request: str) -> dict[str, Any] | None:
    """The data.json of `out` if it answers this request, None if there is nothing; anything else is refused."""
    record = _record(out)
    if record is None:
        return None
    if record["request"] != request:
        raise DataError(f"{out} holds other data: its request is {record['request'][:12]}, this one {request[:12]} "
                        "(other texts or options). Name another folder, or remove this one.")
    if "pair" in record:
        DataFolder(str(out), None).shard("train")
    else:
        for split in ("train", "heldout"):
            Shard(out / split)
    return record
