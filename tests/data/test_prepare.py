"""A data folder holds exactly the documents, apart, is the same every time, and appears whole or not at all."""

import hashlib
import json
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest

from hinny import tokenizer
from hinny.data import prepare as module
from hinny.data.build import Build
from hinny.data.prepare import prepare
from hinny.data.shards import Shard
from hinny.data.split import line_end
from hinny.errors import ConfigError, DataError


def texts(folder, split):
    """The documents of a split as text, and whether each ends in eod."""
    t, shard = tokenizer.load(folder), Shard(folder / split)
    assert all(shard[i][-1] == t.eod and t.eod not in shard[i][:-1] for i in range(len(shard)))
    return [t.decode(shard[i]) for i in range(len(shard))]


def test_the_shards_hold_every_document_once_in_order_and_apart(corpus, folder):
    documents = [path.read_text() for path in sorted(corpus.iterdir())]
    train, heldout = texts(folder, "train"), texts(folder, "heldout")
    assert [d for d in documents if d in train] == train
    assert [d for d in documents if d in heldout] == heldout
    assert sorted(train + heldout) == sorted(documents)
    share = sum(map(len, heldout)) / sum(map(len, documents))
    assert 0.08 < share <= 0.1


def test_data_json_says_what_the_folder_holds(folder):
    record = json.loads((folder / "data.json").read_text())
    for split in ("train", "heldout"):
        shard = Shard(folder / split)
        n_bytes = sum(len(text.encode()) for text in texts(folder, split))
        assert record[split] == {"documents": len(shard), "tokens": shard.n_tokens, "bytes": n_bytes}
    t = tokenizer.load(folder)
    assert (record["vocab_size"], record["eod"], record["tokenizer_fingerprint"]) == (600, t.eod, t.fingerprint)
    assert record["dtype"] == "uint16"
    assert record["source"]["documents"] == 40
    assert record["command"]
    assert set(os.listdir(folder)) == {"data.json", "tokenizer.json", "train.bin", "train.idx", "heldout.bin",
                                       "heldout.idx", "lengths.svg"}


def test_the_tokenizer_is_learnt_from_train_documents_only(tmp_path):
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"word{n} " + "common words again and again in every document " * 20)
    (tmp_path / "secret.txt").write_text("zqxjkv" * 25)
    # whichever seed holds the odd document out must not have learnt its word
    for seed in range(60):
        out = tmp_path / f"out{seed}"
        prepare(out, text=[tmp_path / f"{n}.txt" for n in range(30)] + [tmp_path / "secret.txt"], vocab_size=270,
                seed=seed, held_out=0.1)
        if any("zqxjkv" in text for text in texts(out, "heldout")):
            assert "zq" not in (out / "tokenizer.json").read_text()
            return
    pytest.fail("no seed held the document out")


def test_the_same_request_gives_the_same_bytes(corpus, folder, tmp_path):
    again = prepare(tmp_path / "again", text=[corpus], vocab_size=600, held_out=0.1)
    assert not again["reused"]
    for name in os.listdir(folder):
        if name != "data.json":
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert again["fingerprint"] == json.loads((folder / "data.json").read_text())["fingerprint"]


def test_a_second_call_reuses_the_folder_and_says_so(corpus, folder):
    before = {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder)}
    stages = []
    again = prepare(folder, text=[corpus], vocab_size=600, held_out=0.1,
                    progress=lambda stage, share: stages.append(stage))
    assert again["reused"]
    assert "reused" in stages
    assert "encode" not in stages
    assert {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder)} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"held_out": 0.2}, {"vocab_size": 500}, {"max_bytes": 9000}])
def test_other_options_refuse_the_folder_and_leave_it_whole(corpus, folder, change):
    before = (folder / "data.json").read_bytes()
    with pytest.raises(DataError, match=r"holds other data: its request is [0-9a-f]{12}.*Name another folder"):
        prepare(folder, **{"text": [corpus], "vocab_size": 600, "held_out": 0.1, **change})
    assert (folder / "data.json").read_bytes() == before


def test_changed_text_refuses_the_folder(corpus, folder, tmp_path):
    changed = shutil.copytree(corpus, tmp_path / "corpus")
    (changed / "007.txt").write_text("another text\n")
    with pytest.raises(DataError, match="holds other data"):
        prepare(folder, text=[changed], vocab_size=600, held_out=0.1)


def test_a_folder_of_something_else_is_refused_and_an_empty_one_is_filled(corpus, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is no data folder"):
        prepare(tmp_path / "other", text=[corpus], tokenizer="bytes")
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert not prepare(tmp_path / "empty", text=[corpus], tokenizer="bytes")["reused"]


def test_a_reused_folder_with_a_damaged_shard_is_refused(corpus, tmp_path):
    prepare(tmp_path / "d", text=[corpus], tokenizer="bytes")
    os.truncate(tmp_path / "d" / "train.bin", 100)
    with pytest.raises(DataError, match=r"train\.bin: 100 bytes"):
        prepare(tmp_path / "d", text=[corpus], tokenizer="bytes")


def test_a_given_tokenizer_is_used_and_goes_with_the_folder(corpus, folder, tmp_path):
    with_bytes = prepare(tmp_path / "b", text=[corpus], tokenizer="bytes")
    assert with_bytes["vocab_size"] == 257
    assert with_bytes["train"]["tokens"] == with_bytes["train"]["bytes"] + with_bytes["train"]["documents"]
    with_file = prepare(tmp_path / "f", text=[corpus], tokenizer=folder)
    assert with_file["tokenizer_fingerprint"] == tokenizer.load(folder).fingerprint
    assert tokenizer.load(tmp_path / "f").content == tokenizer.load(folder).content
    with pytest.raises(ConfigError, match=r"vocab_size \(600\) has no effect with a given tokenizer"):
        prepare(tmp_path / "n", text=[corpus], tokenizer="bytes", vocab_size=600)


def test_max_bytes_takes_documents_from_all_over_the_source(corpus, tmp_path):
    record = prepare(tmp_path / "d", text=[corpus], tokenizer="bytes", max_bytes=20_000)
    used = record["train"]["bytes"] + record["heldout"]["bytes"]
    assert 19_000 < used <= 20_000
    numbers = [n for n, path in enumerate(sorted(corpus.iterdir()))
               if any(path.read_text().startswith(t) for t in texts(tmp_path / "d", "train"))]
    assert min(numbers) < 10
    assert max(numbers) >= 30
    other = prepare(tmp_path / "e", text=[corpus], tokenizer="bytes", max_bytes=20_000, seed=1)
    assert texts(tmp_path / "e", "train") != texts(tmp_path / "d", "train")
    assert other["fingerprint"] != record["fingerprint"]


def test_equal_documents_never_stand_on_both_sides(tmp_path):
    for n in range(60):
        (tmp_path / f"{n:02d}.txt").write_text(f"document {n % 20} " * 30)
    for seed in range(5):
        out = tmp_path / f"out{seed}"
        prepare(out, text=[tmp_path / f"{n:02d}.txt" for n in range(60)], tokenizer="bytes", held_out=0.2, seed=seed)
        train, heldout = texts(out, "train"), texts(out, "heldout")
        assert not set(train) & set(heldout)
        assert len(train) + len(heldout) == 60
        assert len(heldout) >= 9


def test_a_single_book_gives_its_end_to_the_held_out_split(tmp_path):
    book = "".join(f"Line {n} of a long book, with some é in it.\n" for n in range(1000))
    (tmp_path / "book.txt").write_text(book)
    record = prepare(tmp_path / "d", text=tmp_path / "book.txt", tokenizer="bytes", held_out=0.1)
    (train,), (heldout,) = texts(tmp_path / "d", "train"), texts(tmp_path / "d", "heldout")
    assert train + heldout == book
    assert heldout.startswith("Line 9")
    assert record["heldout"]["bytes"] == pytest.approx(0.1 * len(book.encode()), rel=0.02)


def test_a_cut_falls_on_a_line_or_between_characters():
    assert line_end(b"one\ntwo\nthree", 9) == 8
    assert line_end("éééé".encode(), 5) == 4
    assert line_end(b"short", 99) == 5


def test_jsonl_documents_are_lines(tmp_path):
    documents = [f"Document number {n} says something.\n" * 5 for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in [*documents, "", "  "]))
    record = prepare(tmp_path / "d", jsonl=tmp_path / "a.jsonl", field="body", tokenizer="bytes", held_out=0.2)
    assert sorted(texts(tmp_path / "d", "train") + texts(tmp_path / "d", "heldout")) == sorted(documents)
    assert (record["source"]["documents"], record["source"]["empty"]) == (50, 2)


def test_the_default_text_is_pythons_own_library(tmp_path):
    record = prepare(tmp_path / "d", max_bytes=400_000, vocab_size=1000)
    assert record["source"]["kind"] == "standard library"
    assert 390_000 < record["train"]["bytes"] + record["heldout"]["bytes"] <= 400_000
    # merges pay: under half as many tokens as bytes
    assert record["train"]["tokens"] < record["train"]["bytes"] / 2
    assert record["vocab_size"] == 1000


@pytest.mark.parametrize(("content", "message"), [
    ("ab", "too small: 2 bytes leave no heldout text"),
    ("a short text", "too small: 12 bytes leave no heldout text"),
])
def test_a_text_too_small_to_divide_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "d", text=[tmp_path / "a.txt"], tokenizer="bytes")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_of_empty_files_is_refused(tmp_path):
    (tmp_path / "t").mkdir()
    for n in range(3):
        (tmp_path / "t" / f"{n}.txt").write_text("\n")
    with pytest.raises(DataError, match=r"there is no text: .* 3 documents, all empty"):
        prepare(tmp_path / "d", text=[tmp_path / "t"])


@pytest.mark.parametrize(("options", "message"), [
    ({"held_out": 0.0}, r"held_out is 0\.0"), ({"held_out": 0.7}, r"held_out is 0\.7"),
    ({"max_bytes": 0}, "max_bytes is 0"),
])
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "d", **options)


@pytest.mark.parametrize("size", [0, 256])
def test_a_vocabulary_too_small_for_bytes_is_refused_before_anything_is_read(tmp_path, size):
    stages = []
    with pytest.raises(DataError, match=f"vocab_size {size} is too small"):
        prepare(tmp_path / "d", vocab_size=size, progress=lambda stage, share: stages.append(stage))
    assert stages == []


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_progress_is_reported_all_along(corpus, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("hinny.data.workers.REPORT_BYTES", 4000)
    monkeypatch.setattr(module, "ENCODE_CHARACTERS", 4000)
    monkeypatch.setattr("hinny.data.pieces.MIN_PIECE_BYTES", 8000)
    source = {"text": [corpus]}
    if kind == "jsonl":
        lines = [json.dumps({"t": path.read_text()}) + "\n" for path in sorted(corpus.iterdir())]
        (tmp_path / "c.jsonl").write_text("".join(lines))
        source = {"jsonl": [tmp_path / "c.jsonl"], "field": "t"}
    seen = []
    prepare(tmp_path / "d", **source, vocab_size=400, progress=lambda stage, share: seen.append((stage, share)))
    assert list(dict.fromkeys(stage for stage, _ in seen)) == ["read", "tokenizer", "encode", "join"]
    for stage in ("read", "tokenizer", "encode", "join"):
        shares = [share for name, share in seen if name == stage]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0, abs=0.01)
        # the learning itself, the second half of its stage, is one step
        steps = [b - a for a, b in pairwise(shares) if b <= 0.5 or stage != "tokenizer"]
        assert len(steps) >= 8
        assert max(steps) < 0.2


def test_a_text_that_changes_between_the_passes_is_noticed(tmp_path, monkeypatch):
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(f"document {n}\n" * 9)
    write = Build.write

    def meddle(*arguments):
        (tmp_path / "4.txt").write_text("changed 4..\n" * 9)
        return write(*arguments)

    monkeypatch.setattr(Build, "write", meddle)
    with pytest.raises(DataError, match=r"4\.txt changed while it was read"):
        prepare(tmp_path / "d", text=[tmp_path / f"{n}.txt" for n in range(10)], tokenizer="bytes", held_out=0.2)


def test_lines_that_go_missing_between_the_passes_are_noticed(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"t": f"document {n} " * 9}) + "\n" for n in range(30)))
    write = Build.write

    def meddle(*arguments):
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
        return write(*arguments)

    monkeypatch.setattr(Build, "write", meddle)
    with pytest.raises(DataError, match="29 documents where there were 30"):
        prepare(tmp_path / "d", jsonl=[file], field="t", tokenizer="bytes", held_out=0.2)


def test_a_folder_that_appears_meanwhile_is_taken_if_it_is_the_same(corpus, tmp_path, monkeypatch):
    prepare(tmp_path / "first", text=[corpus], tokenizer="bytes")
    write = Build.write

    def overtaken(*arguments):
        record = write(*arguments)
        os.rename(tmp_path / "first", tmp_path / "d")
        return record

    monkeypatch.setattr(Build, "write", overtaken)
    assert prepare(tmp_path / "d", text=[corpus], tokenizer="bytes")["reused"]
    assert os.listdir(tmp_path) == ["d"]


def test_folders_of_earlier_versions_are_known_again(tmp_path):
    """Fingerprint and bytes of this text as they were when one process did all of it in one go."""
    for n in range(20):
        (tmp_path / f"{n:02d}.txt").write_text(f"document {n % 15} says é and little else.\n" * (n + 3))
    record = prepare(tmp_path / "d", text=[tmp_path / f"{n:02d}.txt" for n in range(20)], tokenizer="bytes",
                     held_out=0.2, max_bytes=5000, seed=3)
    assert record["request"] == "8a82951c8d271152e7640d80bab6c1cd904fbffc00d3b5b243d9ac89f71ea424"
    found = hashlib.sha256()
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx"):
        found.update((tmp_path / "d" / name).read_bytes())
    assert found.hexdigest() == "1f094a64f5d8200fba54a028a9e0bf6f90bb6c57c8ffcc253e98daa798e8440e"


def test_the_folder_is_not_there_before_it_is_whole(corpus, tmp_path):
    seen = []

    def look(stage, share):
        seen.append((tmp_path / "d").exists())

    prepare(tmp_path / "d", text=[corpus], tokenizer="bytes", progress=look)
    assert seen
    assert not any(seen)
    assert (tmp_path / "d" / "data.json").is_file()


def test_tokens_are_stored_in_the_type_of_the_vocabulary(corpus, folder, tmp_path):
    assert Shard(folder / "train").dtype == np.dtype("<u2")
    wide = json.loads(tokenizer.load(folder).content)
    wide["model"]["vocab"] |= {f"unused{n}": n for n in range(600, 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(wide))
    record = prepare(tmp_path / "d", text=[corpus], tokenizer=tmp_path / "tokenizer.json")
    assert (record["vocab_size"], record["dtype"]) == (70_000, "int32")
    assert Shard(tmp_path / "d" / "train").dtype == np.dtype("<i4")
    assert texts(tmp_path / "d", "heldout")
