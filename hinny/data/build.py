"""From a source to the files of a data folder, in stages whose finished parts stay: read, tokenizer, encode, join."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hinny import tokenizer as tokenizers
from hinny.data.jobs import (
    SPLITS,
    EncodeJob,
    ExcerptJob,
    ScanJob,
    load_aside,
    load_scan,
    load_tokens,
    scan_name,
    tokens_name,
)
from hinny.data.lengths import Lengths
from hinny.data.origins import Names, write_names, write_numbers
from hinny.data.phonebook import spelling
from hinny.data.pieces import Piece, Source
from hinny.data.shards import ShardWriter, token_dtype
from hinny.data.split import Plan, Scan, plan, salt
from hinny.data.work import Work, damaged, put
from hinny.data.workers import Job, Meter, Workers
from hinny.errors import DataError

BPE_SAMPLE_BYTES = 6_000_000
"""Text that the tokenizer learns from: it bounds time and memory, and a few thousand merges gain nothing from more."""

RECALL_REPEATS = 2000
"""How often the words of phone books are put into that text, where they are asked for."""

LEARNT = "tokenizer.json"
"""The part that holds a learnt tokenizer; a given one is there under its own file's name."""

DIGEST = "tokenizer.sha256"
"""The part that holds the fingerprint of that part: a damaged tokenizer may still be one, that gives other tokens."""

Progress = Callable[[str, float], None]
"""Called with a stage's name (stream, read, tokenizer, encode, join or reused) and the share of it that is done, in
bytes: about every megabyte of text, or every piece of it. The second half of `tokenizer`, the learning itself, is one
call of a library."""


class Build:
    """The making of one data folder: `request` after `plan`, then `write`.

    options: those of `prepare` that the request is made of.
    """

    def __init__(self, source: Source, piece_bytes: int, options: dict[str, Any], work: Work, workers: Workers,
                 report: Progress) -> None:
        self._source = source
        self._piece_bytes = piece_bytes
        self._options = options
        self._salt = salt(options["seed"])
        self._work = work
        self._workers = workers
        self._report = report

    def plan(self) -> Plan:
        """Read all documents once, choose among them and divide them."""
        meter = Meter(self._source.size(), lambda share: self._report("read", share))
        pieces = 0

        def jobs() -> Iterator[Job]:
            nonlocal pieces
            for number, piece in enumerate(self._source.pieces(self._piece_bytes)):
                pieces = number + 1
                if self._work.has(scan_name(number)):
                    meter.settle(piece.size)
                else:
                    yield ScanJob(number, piece, self._work.path, self._salt)

        for _ in self._workers.run(jobs(), meter):
            pass
        self._report("read", 1.0)
        scan = load_scan(self._work.path, pieces, "source_field" in self._options)
        if scan.blank.all():
            raise DataError(f"there is no text: {self._source.description()} has {len(scan.blank)} documents, all "
                            "empty.")
        return plan(scan, self._options)

    def learn(self, planned: Plan, vocab_size: int, recall_words: bool) -> tokenizers.Tokenizer:
        """A tokenizer from the train documents, or the one that was learnt before a stop."""
        if self._work.has(LEARNT):
            return self._learnt()
        sample = planned.sample(BPE_SAMPLE_BYTES)
        wanted = _used(sample)
        meter = self._meter("tokenizer", sample.scan, wanted, 0.5)
        jobs = (ExcerptJob(number, piece, self._salt, *sample.of(number)) for number, piece in self._pieces(wanted))
        found = dict(self._workers.run(jobs, meter))
        texts = [text for number in wanted for text in found[number]]
        self._report("tokenizer", 0.5)
        if recall_words:
            # as often as the common words of a sample of that size, so that each becomes one token
            texts += [spelling()] * RECALL_REPEATS
        learnt = tokenizers.train_bpe(texts, vocab_size)
        self._report("tokenizer", 1.0)
        return learnt

    def _learnt(self) -> tokenizers.Tokenizer:
        """The part; a damaged one is learnt again, the same from the same texts, so that encoded parts stay good."""
        path, digest = self._work.path / LEARNT, self._work.path / DIGEST
        try:
            found = tokenizers.load(path)
        except DataError as fault:
            raise damaged(path, fault) from None
        if not digest.is_file() or digest.read_bytes() != found.fingerprint.encode():
            raise damaged(path, f"its fingerprint is not that of {digest.name}")
        return found

    def write(self, folder: Path, planned: Plan, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
        """Tokenizer and both shards into `folder`; returns the record of data.json."""
        self._encode(planned, tokenizer)
        put(folder, tokenizer.file_name, lambda file: file.write(tokenizer.content))
        dtype = token_dtype(tokenizer.vocab_size)
        counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
        wanted = _used(planned)
        found: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for s, split in enumerate(SPLITS):
            with ShardWriter(folder / split, dtype) as writer:
                for done, number in enumerate(wanted):
                    tokens, lengths, n_bytes = load_tokens(self._work.path, number, split)
                    writer.add_documents(tokens, lengths)
                    found[split].append(lengths)
                    for what, more in (("documents", len(lengths)), ("tokens", len(tokens)), ("bytes", n_bytes)):
                        counts[split][what] += more
                    self._report("join", (s + (done + 1) / len(wanted)) / len(SPLITS))
        lengths_of = {split: np.concatenate(found[split]) for split in SPLITS}
        aside = self._left_out(planned, lengths_of) | self._write_origins(folder, planned)
        for split in SPLITS:
            if not counts[split]["documents"]:
                raise DataError(f"the data set is too small: {planned.n_bytes} bytes leave no {split} text.")
        fingerprint = hashlib.sha256(f"{planned.request} {tokenizer.fingerprint}".encode()).hexdigest()
        empty = int(planned.scan.blank.sum())
        return {"fingerprint": fingerprint, "request": planned.request, "tokenizer_fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "dtype": dtype.name,
                "source": {**self._source.description(), "documents": len(planned.scan.blank) - empty, "empty": empty},
                **counts, "lengths": Lengths.of(lengths_of["train"]).table(), **aside}

    def _left_out(self, planned: Plan, kept: dict[str, np.ndarray]) -> dict[str, Any]:
        """What data.json says of documents that were too short; `kept` has the lengths of all others, by split.

        DataError if a split has no others.
        """
        least = self._options.get("min_tokens")
        if least is None:
            return {}
        short = {split: np.concatenate([load_aside(self._work.path, number, split)[1] for number in _used(planned)])
                 for split in SPLITS}
        every = Lengths.of(np.concatenate([*kept.values(), *short.values()]))
        if every.documents and (empty := [split for split in SPLITS if not len(kept[split])]):
            raise DataError(f"min_tokens {least} leaves no {' and no '.join(empty)} document: of {every.documents} "
                            f"documents {sum(map(len, kept.values()))} are that long; the longest has {every.longest} "
                            f"tokens, the median is {every.quantile(0.5)}. Give a smaller --min-tokens, longer texts "
                            "or, where only the held-out split is empty, a larger --held-out.")
        return {"min_tokens": least, "left_out": {
            split: {"documents": len(short[split]), "tokens": int(short[split].sum())} for split in SPLITS}}

    def _write_origins(self, folder: Path, planned: Plan) -> dict[str, Any]:
        """Where each document is from, into `folder`; what data.json says of it. Nothing where it was not asked for."""
        scan = planned.scan
        if scan.origins is None:
            return {}
        names = Names()
        for split in SPLITS:
            numbers = [np.zeros(0, np.uint32)]
            for number in _used(planned):
                places, _ = load_aside(self._work.path, number, split)
                numbers.append(names.numbers(scan.names, scan.origins[int(scan.starts[number]) + places]))
            write_numbers(folder, split, np.concatenate(numbers))
        write_names(folder, names.listed)
        return {"sources": {"field": self._options["source_field"], "names": len(names.listed)}}

    def _encode(self, planned: Plan, tokenizer: tokenizers.Tokenizer) -> None:
        """The tokens of every chosen document, in the parts."""
        name = tokenizer.file_name
        if not self._work.has(name):
            put(self._work.path, DIGEST, lambda file: file.write(tokenizer.fingerprint.encode()))
            put(self._work.path, name, lambda file: file.write(tokenizer.content))
        elif (path := self._work.path / name).read_bytes() != tokenizer.content:
            raise damaged(path, "it is not the tokenizer that was given")
        wanted = _used(planned)
        missing = [number for number in wanted if not self._work.has(tokens_name(number))]
        meter = self._meter("encode", planned.scan, wanted, 1.0)
        for number in set(wanted) - set(missing):
            meter.settle(int(planned.scan.piece_sizes[number]))
        jobs = (EncodeJob(number, piece, self._salt, *planned.of(number), self._work.path, name,
                          self._options.get("min_tokens", 0))
                for number, piece in self._pieces(missing))
        for _ in self._workers.run(jobs, meter):
            pass
        self._report("encode", 1.0)

    def _pieces(self, numbers: list[int]) -> Iterable[tuple[int, Piece]]:
        """These pieces of the source; what lies behind the last of them is not read."""
        wanted = set(numbers)
        if not wanted:
            return
        for number, piece in enumerate(self._source.pieces(self._piece_bytes)):
            if number in wanted:
                yield number, piece
            if number == numbers[-1]:
                return

    def _meter(self, stage: str, scan: Scan, numbers: list[int], part: float) -> Meter:
        """Counts the bytes of these pieces as the first `part` of a stage."""
        return Meter(int(scan.piece_sizes[numbers].sum()), lambda share: self._report(stage, share * part))


def _used(planned: Plan) -> list[int]:
    """The pieces that have a chosen document, in order."""
    starts = planned.scan.starts
    return [number for number in range(planned.scan.pieces)
            if planned.stops[starts[number]:starts[number + 1]].any()]
