"""Short documents are left out of both splits and counted; where a document is from is kept beside its tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in_hub import Stream, Table
from typer.testing import CliRunner

from hinny import tokenizer
from hinny.cli import app
from hinny.data.folder import DataFolder
from hinny.data.prepare import prepare
from hinny.data.shards import Shard
from hinny.errors import ConfigError, DataError

LEAST = 120
"""Tokens; in bytes a document of n bytes has n + 1."""
SIZES = [30, 119, 118, 700, 125, 90, 240, 40, 119, 500, 333, 60, 120, 150, 118]
ROWS = [{"t": chr(ord("a") + n % 26) * (size - 1) + "\n", "repo": f"répo {n * 7 // 3 % 4}", "id": n}
        for n, size in enumerate(SIZES * 4)]
OPTIONS: dict[str, Any] = {"field": "t", "tokenizer": "bytes", "held_out": 0.2}
SHARDS = ("train.bin", "train.idx", "heldout.bin", "heldout.idx")
ORIGINS = ("sources.json", "train.sources.npy", "heldout.sources.npy")


@pytest.fixture
def lines(tmp_path) -> list[Path]:
    """The rows as a plain and a compressed file."""
    texts = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "a.jsonl").write_text("".join(texts[:25]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(texts[25:]).encode(), mtime=0))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]


@pytest.fixture
def small(monkeypatch) -> None:
    """Several pieces."""
    monkeypatch.setattr("hinny.data.pieces.MIN_PIECE_BYTES", 2000)


def content(folder: Path, names: tuple[str, ...] = SHARDS) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def texts(folder: Path, split: str) -> list[str]:
    words, shard = tokenizer.load(folder), Shard(folder / split)
    return [words.decode(shard[i]) for i in range(len(shard))]


def test_exactly_the_short_documents_are_left_out_of_both_splits_and_counted(lines, tmp_path) -> None:
    prepare(tmp_path / "all", jsonl=lines, **OPTIONS)
    record = prepare(tmp_path / "long", jsonl=lines, **OPTIONS, min_tokens=LEAST)
    for split in ("train", "heldout"):
        every = texts(tmp_path / "all", split)
        kept = [text for text in every if len(text) + 1 >= LEAST]
        assert texts(tmp_path / "long", split) == kept
        left = [text for text in every if len(text) + 1 < LEAST]
        assert 0 < len(left) < len(every)
        assert record["left_out"][split] == {"documents": len(left), "tokens": sum(len(text) + 1 for text in left)}
        assert record[split] == {"documents": len(kept), "tokens": sum(len(t) + 1 for t in kept),
                                 "bytes": sum(map(len, kept))}
    # a document of 119 bytes and its end is just long enough
    assert LEAST in Shard(tmp_path / "long" / "train").lengths
    assert record["min_tokens"] == json.loads((tmp_path / "long" / "data.json").read_text())["min_tokens"] == LEAST
    assert {"min_tokens", "left_out", "sources"}.isdisjoint(json.loads((tmp_path / "all" / "data.json").read_text()))


@pytest.mark.usefixtures("small")
def test_every_way_of_reading_gives_the_same_documents(lines, tmp_path, datasets) -> None:
    asked = {**OPTIONS, "min_tokens": LEAST, "source_field": "repo"}
    first = prepare(tmp_path / "one", jsonl=lines, **asked)
    whole = content(tmp_path / "one", SHARDS + ORIGINS)
    datasets.load_dataset = lambda *names, streaming, **more: Stream(ROWS) if streaming else Table(ROWS)
    for name, given in {"workers": {"jsonl": lines, "workers": 2}, "rows": {"hf": "some/name"},
                        "stream": {"hf": "some/name", "stream": True}}.items():
        record = prepare(tmp_path / name, **given, **asked)
        assert content(tmp_path / name, SHARDS + ORIGINS) == whole
        assert (record["fingerprint"], record["left_out"]) == (first["fingerprint"], first["left_out"])
    for n, row in enumerate(ROWS):
        (tmp_path / f"{n:03d}.txt").write_text(row["t"])
    plain = {name: value for name, value in asked.items() if name not in ("field", "source_field")}
    prepare(tmp_path / "files", text=sorted(tmp_path.glob("*.txt")), **plain)
    assert content(tmp_path / "files") == whole[:4]


def test_a_folder_answers_its_own_least_length_alone(lines, tmp_path) -> None:
    prepare(tmp_path / "d", jsonl=lines, **OPTIONS, min_tokens=LEAST)
    assert prepare(tmp_path / "d", jsonl=lines, **OPTIONS, min_tokens=LEAST)["reused"]
    for other in ({}, {"min_tokens": LEAST + 1}, {"min_tokens": LEAST, "source_field": "repo"}):
        with pytest.raises(DataError, match="holds other data"):
            prepare(tmp_path / "d", jsonl=lines, **OPTIONS, **other)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stage", ["read", "encode", "join"])
def test_a_stopped_command_goes_on_and_another_one_is_refused(lines, tmp_path, stage) -> None:
    asked = {**OPTIONS, "min_tokens": LEAST, "source_field": "repo"}

    def stop(found: str, share: float) -> None:
        if found == stage and share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "d", jsonl=lines, **asked, progress=stop)
    for change, message in (({"min_tokens": 9}, f"min_tokens: {LEAST} there, 9 now"),
                            ({"source_field": None}, "source_field: 'repo' there, None now")):
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / "d", jsonl=lines, **{**asked, **change})
    prepare(tmp_path / "d", jsonl=lines, **asked)
    prepare(tmp_path / "again", jsonl=lines, **asked)
    assert content(tmp_path / "d", SHARDS + ORIGINS) == content(tmp_path / "again", SHARDS + ORIGINS)


def test_where_nothing_is_left_the_figures_are_told(lines, tmp_path) -> None:
    longest, median = max(SIZES) + 1, sorted(SIZES * 4)[len(SIZES) * 2 - 1] + 1
    with pytest.raises(DataError, match=rf"min_tokens 9000 leaves no train and no heldout document: of {len(ROWS)} "
                                        rf"documents 0 are that long; the longest has {longest} tokens, the median is "
                                        rf"{median}\."):
        prepare(tmp_path / "d", jsonl=lines, **OPTIONS, min_tokens=9000)
    # half of the text is one document: too much to be held out
    texts = [f"filler {n}" for n in range(59)] + ["x" * 499]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for text in texts))
    with pytest.raises(DataError, match="min_tokens 500 leaves no heldout document: of 60 documents 1 are that long; "
                                        "the longest has 500 tokens, the median is 10"):
        prepare(tmp_path / "d", jsonl=[tmp_path / "c.jsonl"], **OPTIONS, min_tokens=500)
    assert not (tmp_path / "d").exists()


def test_each_document_keeps_its_source(lines, tmp_path) -> None:
    record = prepare(tmp_path / "d", jsonl=lines, **OPTIONS, source_field="repo")
    names = json.loads((tmp_path / "d" / "sources.json").read_text())
    assert record["sources"] == {"field": "repo", "names": len(names)}
    assert sorted(names) == sorted({row["repo"] for row in ROWS})
    found = []
    for split in ("train", "heldout"):
        numbers = DataFolder(str(tmp_path / "d"), None).origins(split)
        assert numbers.dtype == np.uint32
        found += [(text, names[number]) for text, number in zip(texts(tmp_path / "d", split), numbers, strict=True)]
    assert sorted(found) == sorted((row["t"], row["repo"]) for row in ROWS)


def test_the_fingerprint_covers_sources_where_they_are_kept(lines, tmp_path) -> None:
    """And a folder without them is what it was (test_folders_of_earlier_versions_are_known_again)."""
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("".join(json.dumps({**row, "repo": row["repo"] + "x"}) + "\n" for row in ROWS))
    plain = [prepare(tmp_path / f"p{k}", jsonl=paths, **OPTIONS) for k, paths in enumerate((lines, [renamed]))]
    named = [prepare(tmp_path / f"n{k}", jsonl=paths, **OPTIONS, source_field="repo")
             for k, paths in enumerate((lines, [renamed]))]
    assert plain[0]["fingerprint"] == plain[1]["fingerprint"]
    assert len({record["fingerprint"] for record in (plain[0], *named)}) == 3


@pytest.mark.parametrize(("row", "message"), [({"t": "text"}, "line 61: no field 'repo'; it has 't'"),
                                              ({"t": "text", "repo": None}, "line 61: field 'repo' is a NoneType")])
def test_a_document_without_a_source_is_refused_by_its_line(tmp_path, row, message) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*ROWS, row]))
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "d", jsonl=[tmp_path / "a.jsonl"], **OPTIONS, source_field="repo")


@pytest.mark.parametrize(("given", "message"), [
    ({"text": ["a"], "source_field": "repo"}, "source_field 'repo' has no effect without jsonl or hf"),
    ({"source_field": "repo"}, "source_field 'repo' has no effect without jsonl or hf"),
    ({"jsonl": ["a"], "field": "t", "source_field": "t"}, "source_field 't' is the field of the text itself"),
    ({"hf": "a", "source_field": "text"}, "source_field 'text' is the field of the text itself"),
    ({"text": ["a"], "min_tokens": 0}, "min_tokens is 0; it must be at least 1"),
    ({"text": ["a"], "seq_len": 0}, "seq_len is 0; it must be at least 1"),
    ({"megatron": "a", "min_tokens": 5}, r"min_tokens \(5\) has no effect with megatron"),
    ({"megatron": "a", "source_field": "repo"}, r"source_field \(repo\) has no effect with megatron"),
])
def test_options_that_cannot_act_are_refused(tmp_path, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "d", **given)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda d: (d / "train.sources.npy").unlink(), r"train\.sources\.npy: cannot be read"),
    (lambda d: (d / "train.sources.npy").write_bytes(b"\x93NUM"), r"train\.sources\.npy: damaged"),
    (lambda d: np.save(d / "train.sources.npy", np.zeros(3, "<u4")), "sources of 3 documents, 4 names, but the split"),
    (lambda d: (d / "sources.json").write_text("[]"), "0 names, but the split"),
])
def test_damaged_sources_are_refused_by_name(lines, tmp_path, damage, message) -> None:
    prepare(tmp_path / "d", jsonl=lines, **OPTIONS, source_field="repo")
    damage(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        DataFolder(str(tmp_path / "d"), None).origins("train")


def test_the_terminal_tells_what_was_left_out_and_how_much_is_long(lines, tmp_path) -> None:
    arguments = ["prepare", str(tmp_path / "d"), *(a for path in lines for a in ("--jsonl", str(path))), "--field", "t",
                 "--tokenizer", "bytes", "--min-tokens", str(LEAST), "--seq-len", "300"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "d" / "data.json").read_text())
    left, lengths = record["left_out"]["train"], Shard(tmp_path / "d" / "train").lengths
    share = 100 * lengths[lengths >= 300].sum() / lengths.sum()
    words = " ".join(done.output.split())
    assert f"left out, below 120 tokens: {left['documents']} documents, {left['tokens']:,} tokens of training" in words
    assert f"{share:.1f} % of the tokens to train on are in documents of 300 tokens or more" in words
