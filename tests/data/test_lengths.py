"""Lengths of documents are counted as they are, drawn the same every time, and too short ones are told."""

from __future__ import annotations

import json
import logging
import os
from xml.etree import ElementTree

import numpy as np
import pytest

from hinny.config import DataConfig
from hinny.data.lengths import STEPS, Lengths, check_long, long_share, write_plot
from hinny.data.mix import Stream
from hinny.data.prepare import prepare
from hinny.data.shards import Shard, ShardWriter
from hinny.errors import DataError


def test_the_table_counts_documents_and_tokens(tmp_path) -> None:
    lengths = [5000, 3, 1023, 1024, 200_000, 1024, 70, 4096, 9000, 131_072]
    found = Lengths.of(np.array(lengths)).table()
    assert (found["documents"], found["tokens"]) == (10, sum(lengths))
    assert (found["shortest"], found["longest"]) == (3, 200_000)
    assert list(found["at_least"]) == ["1024", "2048", "4096", "8192", "16384", "32768", "65536", "131072"]
    for step in STEPS:
        long = [n for n in lengths if n >= step]
        assert found["at_least"][str(step)] == pytest.approx({"documents": len(long) / 10,
                                                              "tokens": sum(long) / sum(lengths)})
    # half of the documents have at most 1024 tokens, three quarters at most the eighth length
    assert found["quantiles"] == {"0.05": 3, "0.25": 1023, "0.5": 1024, "0.75": 9000, "0.95": 200_000, "0.99": 200_000}


def test_documents_that_are_shown_more_often_count_more_often() -> None:
    rng = np.random.default_rng(0)
    lengths, times = rng.integers(1, 5000, 60), rng.integers(1, 5, 60)
    weighed, repeated = Lengths.of(lengths, times), Lengths.of(np.repeat(lengths, times))
    for share in (0.05, 0.3, 0.5, 0.95):
        assert weighed.quantile(share) == repeated.quantile(share)
    for step in (1, 900, 2048, 4096, 9000):
        assert weighed.at_least(step) == pytest.approx(repeated.at_least(step), abs=1e-12)
    assert weighed.drawn(2048) == repeated.drawn(2048)


def test_a_folder_has_the_table_and_the_plot_of_its_train_documents(folder, corpus, tmp_path) -> None:
    record = json.loads((folder / "data.json").read_text())
    assert record["lengths"] == Lengths.of(Shard(folder / "train").lengths).table()
    plot = (folder / "lengths.svg").read_bytes()
    assert b"tokens of a document" in plot
    assert b"share of all" in plot
    ElementTree.fromstring(plot)
    prepare(tmp_path / "again", text=[corpus], vocab_size=600, held_out=0.1)
    assert (tmp_path / "again" / "lengths.svg").read_bytes() == plot


def test_a_length_that_is_asked_for_is_marked_and_told(corpus, tmp_path) -> None:
    asked = {"text": [corpus], "tokenizer": "bytes", "held_out": 0.1}
    plain = prepare(tmp_path / "d", **asked)
    assert "of_seq_len" not in plain
    before = (tmp_path / "d" / "lengths.svg").read_bytes()
    told = prepare(tmp_path / "d", **asked, seq_len=2048)
    lengths = Shard(tmp_path / "d" / "train").lengths
    assert told["reused"]
    assert told["of_seq_len"] == pytest.approx({"seq_len": 2048, "documents": (lengths >= 2048).mean(),
                                                "tokens": lengths[lengths >= 2048].sum() / lengths.sum()})
    assert "of_seq_len" not in json.loads((tmp_path / "d" / "data.json").read_text())
    marked = (tmp_path / "d" / "lengths.svg").read_bytes()
    assert b"2K: " in marked
    assert b"2K: " not in before
    # the same again is no reason to write
    os.utime(tmp_path / "d" / "lengths.svg", ns=(5, 5))
    prepare(tmp_path / "d", **asked, seq_len=2048)
    assert (tmp_path / "d" / "lengths.svg").stat().st_mtime_ns == 5


def test_a_pair_of_megatrons_has_them_too(tmp_path) -> None:
    with ShardWriter(tmp_path / "made", np.dtype("<u2")) as writer:
        for n in (5, 1, 4, 30, 2):
            writer.add(np.full(n, 65))
            if n != 1:
                writer.end_document()
    record = prepare(tmp_path / "d", megatron=tmp_path / "made", tokenizer="bytes", split="4,1", seq_len=16)
    # 1 and 4 are one document; the last sequence is held out
    assert (record["lengths"]["documents"], record["lengths"]["tokens"]) == (3, 40)
    assert record["of_seq_len"] == {"seq_len": 16, "documents": 1 / 3, "tokens": 0.75}
    assert (tmp_path / "d" / "lengths.svg").is_file()


def test_what_a_run_sees_counts_copies_and_weights(tmp_path) -> None:
    sizes = {"a": [9, 10, 11, 12, 13, 50], "b": [99, 21, 20, 8]}
    for name, lengths in sizes.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"t": name * (n - 1)}) + "\n" for n in lengths))
        prepare(tmp_path / name, jsonl=[tmp_path / f"{name}.jsonl"], field="t", tokenizer="bytes", held_out=0.1)
    train = {name: Shard(tmp_path / name / "train").lengths.tolist() for name in sizes}
    data = DataConfig.model_validate({"blend": {str(tmp_path / "a"): 3.0, str(tmp_path / "b"): 1.0},
                                      "long": {"min_tokens": 50, "weight": 2.0}, "boundaries": "reset"})
    seen = Stream(data, seq_len=8, batch_size=1, seed=0, vocab_size=257, steps=1).lengths()
    share = 0.0
    for name, weight in (("a", 0.75), ("b", 0.25)):
        shown = [n for n in train[name] for _ in range(1 + (n >= 50))]
        share += weight * sum(n for n in shown if n >= 30) / sum(shown)
    assert 0.1 < share < 0.9
    assert seen.at_least(30)[1] == pytest.approx(share, abs=1e-12)


def test_data_without_a_document_beyond_the_base_are_refused_with_figures() -> None:
    lengths = Lengths.of(np.array([100, 4096, 300, 2000]))
    with pytest.raises(DataError, match=r"web: 4 train documents, the longest of 4096 tokens, the median of 300; 0\.0 "
                                        r"% of the tokens are in documents of at least half of train\.seq_len \(16384\)"
                                        r"\. No document is longer than the 4096 tokens .* --min-tokens 4097\)"):
        check_long(lengths, base_len=4096, seq_len=16384, folders=["web"])
    # no extension, nothing to ask
    check_long(lengths, base_len=4096, seq_len=4096, folders=["web"])


@pytest.mark.parametrize(("short", "warned"), [(90, False), (91, True)])
def test_few_tokens_in_long_documents_are_told_once(caplog, short, warned) -> None:
    lengths = Lengths.of(np.array([8192] + [819] * short))
    share = 8192 / (8192 + short * 819)
    assert long_share(lengths, 16384) == pytest.approx(share)
    with caplog.at_level(logging.WARNING, "hinny.train"):
        check_long(lengths, base_len=4096, seq_len=16384, folders=["web"])
    said = [entry.getMessage() for entry in caplog.records if entry.name == "hinny.train"]
    assert len(said) == warned
    if warned:
        assert f"{short + 1} train documents, the longest of 8192 tokens, the median of 819; 9.9 % of" in said[0]


def test_a_plot_that_cannot_be_written_is_told(tmp_path) -> None:
    (tmp_path / "lengths.svg").mkdir()
    with pytest.raises(DataError, match=r"lengths\.svg: cannot be written"):
        write_plot(tmp_path, Lengths.of(np.array([3, 4])), None)
