"""Megatron's own files become a data folder without being copied, split by Megatron's rule."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from hinny.cli import app
from hinny.config import DataConfig
from hinny.data.folder import DataFolder
from hinny.data.mix import Stream, heldout_batches
from hinny.data.pairs import split_ranges
from hinny.data.prepare import prepare
from hinny.data.shards import Shard, ShardWriter
from hinny.errors import ConfigError, DataError

SEQUENCES = [[(7 * k + i) % 256 for i in range(3 + k % 5)] + [256] for k in range(40)]


@pytest.fixture
def made(tmp_path):
    """A pair of 40 sequences in documents of one, two, one, two…"""
    with ShardWriter(tmp_path / "made", np.dtype("<u2")) as writer:
        for k, sequence in enumerate(SEQUENCES):
            writer.add(sequence)
            if k % 3 != 1:
                writer.end_document()
    return tmp_path / "made"


def flat(sequences):
    return [token for sequence in sequences for token in sequence]


@pytest.mark.parametrize(("split", "n", "edges"), [
    ("99,1,0", 1000, (0, 990, 1000, 1000)), ("969, 30, 1", 40, (0, 39, 40, 40)), ("1", 7, (0, 7, 7, 7)),
    # halves go to the even number: 2.5 is 2, 3.5 is 4
    ("1,1", 5, (0, 2, 5, 5)), ("1,1", 7, (0, 4, 7, 7)), ("0.8 0.1 0.1", 10, (0, 8, 9, 10)),
    ("8/1/1", 10, (0, 8, 9, 10)),
])
def test_a_split_is_megatrons(split, n, edges):
    assert [(r.start, r.stop) for r in split_ranges(split, n)] == list(pairwise(edges))


@pytest.mark.parametrize("split", ["", "all", "0,1,0", "1,2,3,4", "1,x", "-1,2", "1..2", "."])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(ConfigError, match="split is"):
        split_ranges(split, 10)


def test_the_files_stay_where_they_are_and_the_splits_are_their_sequences(made, tmp_path):
    record = prepare(tmp_path / "d", megatron=made, tokenizer="bytes", split="3,1")
    assert set(os.listdir(tmp_path / "d")) == {"data.json", "tokenizer.json", "lengths.svg"}
    folder = DataFolder(str(tmp_path / "d"), 257)
    train, heldout = folder.shard("train"), folder.shard("heldout")
    assert [train[i].tolist() for i in range(len(train))] == SEQUENCES[:30]
    assert train.tokens(0, train.n_tokens).tolist() == flat(SEQUENCES[:30])
    assert heldout.tokens(0, heldout.n_tokens).tolist() == flat(SEQUENCES[30:])
    assert record["train"] == {"documents": 20, "tokens": len(flat(SEQUENCES[:30]))}
    # sequences 31 and 32 are a document, so is 30
    lengths = [len(s) for s in SEQUENCES]
    assert heldout.document_ends[:2].tolist() == [lengths[30], sum(lengths[30:33])]
    assert (folder.sequences("train")[1], folder.sequences("heldout")[1]) == (range(30), range(30, 40))


def test_a_cut_document_is_two(made):
    """Sequences 1 and 2 are one document; a part that begins at 2 has what is left of it."""
    whole, lengths = Shard(made), [len(s) for s in SEQUENCES]
    first, second = whole.part(range(2)), whole.part(range(2, 5))
    assert whole.document_ends[:3].tolist() == [lengths[0], sum(lengths[:3]), sum(lengths[:4])]
    assert first.document_ends.tolist() == [lengths[0], sum(lengths[:2])]
    assert second.document_ends.tolist() == [lengths[2], lengths[2] + lengths[3], sum(lengths[2:5])]
    assert second.documents_of(0, second.n_tokens).tolist() == [0] * lengths[2] + [1] * lengths[3] + [2] * lengths[4]
    assert whole.part(range(3, 3)).n_tokens == 0


@pytest.mark.parametrize("order", ["windows", "megatron"])
def test_a_run_reads_the_training_part_only_and_scores_the_held_out_one(made, tmp_path, order):
    prepare(tmp_path / "d", megatron=f"{made}.bin", tokenizer="bytes", split="3,1")
    data = DataConfig(path=str(tmp_path / "d"), boundaries="leak", order=order)
    stream = Stream(data, seq_len=8, batch_size=4, seed=0, vocab_size=257, steps=10)
    allowed = {tuple(flat(SEQUENCES[:30])[i:i + 2]) for i in range(len(flat(SEQUENCES[:30])) - 1)}
    if order == "windows":
        for step in range(10):
            for row in stream.batch(step).tokens.tolist():
                assert all(tuple(row[i:i + 2]) in allowed for i in range(7))
    else:
        expected = Shard(made).lengths[:30].sum()
        assert stream.order.indices.document_index.max() == 29
        assert len(stream.order.indices.shuffle_index) == (stream.order.indices.epochs * expected - 1) // 8
    scored = np.concatenate([b.targets[b.mask] for b in heldout_batches(data, seq_len=8, batch_size=2)])
    assert scored.tolist() == flat(SEQUENCES[30:])[1:]


def test_the_same_request_finds_its_folder_and_another_is_refused(made, tmp_path):
    first = prepare(tmp_path / "d", megatron=made, tokenizer="bytes")
    again = prepare(tmp_path / "d", megatron=made, tokenizer="bytes")
    assert (first["reused"], again["reused"]) == (False, True)
    with pytest.raises(DataError, match="holds other data"):
        prepare(tmp_path / "d", megatron=made, tokenizer="bytes", split="1,1")


def test_the_fingerprint_follows_the_tokens(made, tmp_path):
    first = prepare(tmp_path / "d", megatron=made, tokenizer="bytes")
    content = bytearray((tmp_path / "made.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "made.bin").write_bytes(content)
    assert prepare(tmp_path / "e", megatron=made, tokenizer="bytes")["fingerprint"] != first["fingerprint"]


def test_a_pair_that_went_or_changed_is_refused(made, tmp_path):
    prepare(tmp_path / "d", megatron=made, tokenizer="bytes")
    with ShardWriter(made, np.dtype("<u2")) as writer:
        writer.add_document([1, 2, 3])
    with pytest.raises(DataError, match=r"1 sequences, but .*says 40; the pair was made anew"):
        DataFolder(str(tmp_path / "d"), 257).shard("train")
    (tmp_path / "made.idx").unlink()
    with pytest.raises(DataError, match=r"made\.idx is missing"):
        DataFolder(str(tmp_path / "d"), 257).shard("train")


def test_tokens_that_the_tokenizer_lacks_are_refused(made, tmp_path):
    with ShardWriter(made, np.dtype("<i4")) as writer:
        writer.add_document([1, 300])
    with pytest.raises(DataError, match=r"token 300, but the tokenizer has the tokens 0 to 256"):
        prepare(tmp_path / "d", megatron=made, tokenizer="bytes", split="1")
    with ShardWriter(made, np.dtype("<i4")) as writer:
        writer.add_document([1, -2])
    with pytest.raises(DataError, match=r"token -2, but"):
        prepare(tmp_path / "d", megatron=made, tokenizer="bytes", split="1")
    with ShardWriter(made, np.dtype("<f4")) as writer:
        writer.add_document([1.0])
    with pytest.raises(DataError, match="tokens are float32"):
        prepare(tmp_path / "d", megatron=made, tokenizer="bytes", split="1")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({}, "megatron needs tokenizer"),
    ({"tokenizer": "bytes", "text": ["x"]}, r"text \(\['x'\]\) has no effect with megatron"),
    ({"tokenizer": "bytes", "held_out": 0.2}, r"held_out \(0.2\) has no effect"),
    ({"tokenizer": "bytes", "vocab_size": 500}, r"vocab_size \(500\) has no effect"),
    ({"tokenizer": "bytes", "recall_words": True}, "recall_words"), ({"tokenizer": "bytes", "seed": 3}, "seed"),
])
def test_options_that_have_no_say_are_refused(made, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "d", megatron=made, **options)


def test_a_split_without_a_pair_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="split '1,1' has no effect without megatron"):
        prepare(tmp_path / "d", text=[corpus], split="1,1")


def test_the_command_line_does_the_same(made, tmp_path):
    found = CliRunner().invoke(app, ["prepare", str(tmp_path / "d"), "--megatron", str(made), "--tokenizer", "bytes",
                                     "--split", "3,1", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "d" / "data.json").read_text())["pair"]["train"] == [0, 30]
