"""The stream is a pure function of (seed, step), shows every token once an epoch, and keeps documents apart."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from hinny.config import DataConfig, SyntheticConfig
from hinny.data.mix import Stream, heldout_batches
from hinny.data.prepare import prepare
from hinny.data.shards import Shard, ShardWriter
from hinny.errors import ConfigError, DataError

SYNTHETIC = {"phonebook": 2.0, "copy": 1.0, "mqar": 1.0}


def config(folder, share=None, boundaries="reset", tasks=SYNTHETIC):
    synthetic = None if share is None else SyntheticConfig(share=share, tasks=tasks, phonebook_digits=4)
    return DataConfig(path=str(folder), boundaries=boundaries, synthetic=synthetic)


def stream(folder, seq_len=64, batch_size=4, seed=5, vocab_size=600, **options):
    return Stream(config(folder, **options), seq_len=seq_len, batch_size=batch_size, seed=seed, vocab_size=vocab_size,
                  steps=1000)


def same(one, other):
    for name in ("tokens", "targets", "mask", "segments"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    return one.names == other.names


def kinds(s, samples):
    rows = [name for step in range(samples // 4) for name in s.batch(step).names]
    return ["synthetic" in name for name in rows]


def test_a_batch_has_the_agreed_shapes_and_types(folder):
    batch = stream(folder, share=0.5).batch(3)
    for name, kind in (("tokens", np.int64), ("targets", np.int64), ("mask", bool), ("segments", np.int32)):
        assert getattr(batch, name).shape == (4, 64)
        assert getattr(batch, name).dtype == kind
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert not np.shares_memory(batch.tokens, batch.targets)


def test_a_batch_depends_on_seed_and_step_only(folder):
    walked, fresh = stream(folder, share=0.3), stream(folder, share=0.3)
    batches = [walked.batch(step) for step in range(200)]
    for step in (199, 0, 57, 58):
        assert same(fresh.batch(step), batches[step])
    other = stream(folder, share=0.3, seed=6)
    assert not np.array_equal(other.batch(0).tokens, batches[0].tokens)


def test_an_epoch_predicts_every_token_once_in_an_order_of_its_own(folder):
    s = stream(folder, boundaries="leak", batch_size=1)
    train = Shard(folder / "train")
    expected = Counter(tuple(train.tokens(k * 64 + 1, k * 64 + 65).tolist()) for k in range(s.order.n_windows))
    assert s.order.n_windows == (train.n_tokens - 1) // 64
    orders = []
    for epoch in range(2):
        batches = [s.batch(epoch * s.order.n_windows + i) for i in range(s.order.n_windows)]
        assert Counter(tuple(b.targets[0].tolist()) for b in batches) == expected
        orders.append([b.names[0].split()[4] for b in batches])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != sorted(orders[0], key=int)


def test_the_synthetic_share_is_exact_and_even(folder):
    for share, period, count in ((0.25, 4, 1), (0.3, 10, 3), (0.07, 100, 7)):
        found = kinds(stream(folder, share=share), 400)
        sums = np.cumsum([0, *found])
        assert (sums[period:] - sums[:-period] == count).all()
    assert not any(kinds(stream(folder), 40))
    assert all(kinds(stream(folder, share=1.0), 40))


def test_a_recipe_without_multiple_choice_has_the_stream_it_had_before_that_task(corpus, tmp_path):
    prepare(tmp_path / "d", text=[corpus], tokenizer="bytes", held_out=0.1)
    s, found = stream(tmp_path / "d", share=0.5, seq_len=256, vocab_size=257), hashlib.sha256()
    for step in range(50):
        batch = s.batch(step)
        for array in (batch.tokens, batch.targets, batch.mask, batch.segments):
            found.update(array.tobytes())
        found.update(batch.describe().encode())
    # taken on the commit before
    assert s.fingerprint == "33ea2a16f60753ca1b244c2f69b92f118c654fa41f892befb7f9355deca26b97"
    assert found.hexdigest() == "5e479f48622ab1597c1eaa65e66db810cd7186c3c53c427a82cb97cd3e4ce781"


def test_multiple_choice_is_mixed_in_by_its_weight(folder):
    s = stream(folder, share=1.0, seq_len=512, tasks={"choice": 3.0, "copy": 1.0})
    names = Counter(name.split()[-1] for step in range(100) for name in s.batch(step).names)
    assert set(names) == {"choice", "copy"}
    assert 0.68 < names["choice"] / 400 < 0.82


def test_synthetic_samples_do_not_use_up_text(folder):
    plain, mixed = stream(folder, batch_size=1), stream(folder, batch_size=1, share=0.25)
    rows = [mixed.batch(i) for i in range(40)]
    text = [b for b in rows if "synthetic" not in b.names[0]]
    assert len(text) == 30
    for i, batch in enumerate(text):
        np.testing.assert_array_equal(batch.tokens, plain.batch(i).tokens)


@pytest.fixture
def three_documents(corpus, tmp_path):
    """A folder whose train split is documents of 3, 1 and 8 tokens; id 256 is eod."""
    prepare(tmp_path / "d", text=[corpus], tokenizer="bytes")
    documents = [[1, 2, 256], [256], [3, 4, 5, 6, 7, 8, 9, 256]]
    with ShardWriter(tmp_path / "d" / "train", np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)
    record = tmp_path / "d" / "data.json"
    content = json.loads(record.read_text())
    content["train"] = {"tokens": 12, "documents": 3, "bytes": 9}
    record.write_text(json.dumps(content))
    return tmp_path / "d"


def windows(folder, **options):
    s = stream(folder, seq_len=5, batch_size=2, vocab_size=257, **options)
    batch = s.batch(0)
    return batch, [int(name.split()[4]) for name in batch.names]


def test_documents_in_a_window_are_numbered_and_the_first_token_of_one_is_not_predicted(three_documents):
    batch, order = windows(three_documents)
    first, second = order.index(0), order.index(1)
    assert batch.tokens[first].tolist() == [1, 2, 256, 256, 3]
    assert batch.targets[first].tolist() == [2, 256, 256, 3, 4]
    assert batch.segments[first].tolist() == [0, 0, 0, 1, 2]
    # eod is predicted; what follows it in another document is not
    assert batch.mask[first].tolist() == [True, True, False, False, True]
    assert batch.tokens[second].tolist() == [4, 5, 6, 7, 8]
    assert batch.segments[second].tolist() == [0] * 5
    assert batch.mask[second].all()


def test_leaking_boundaries_have_no_segments_and_predict_everything(three_documents):
    batch, _ = windows(three_documents, boundaries="leak")
    assert batch.segments is None
    assert batch.mask.all()


@pytest.mark.parametrize("boundaries", ["reset", "leak"])
@pytest.mark.parametrize("task", SYNTHETIC)
def test_in_synthetic_samples_only_answers_count(folder, task, boundaries):
    batch = stream(folder, seq_len=200, share=1.0, tasks={task: 1.0}, boundaries=boundaries).batch(0)
    assert all(f"synthetic {task}" in name for name in batch.names)
    for r in range(4):
        counted = batch.mask[r].mean()
        assert 0 < counted < 0.6
        if task != "phonebook":
            # what must be recalled stands earlier in the same row
            for t in np.flatnonzero(batch.mask[r]):
                assert batch.targets[r, t] in batch.tokens[r, :t]
    if boundaries == "reset":
        assert batch.segments.max() > 0
        assert (np.diff(batch.segments, axis=1) >= 0).all()


def test_tasks_are_drawn_by_their_weights_whatever_their_order_in_the_recipe(folder):
    weights = {"phonebook": 1.0, "copy": 6.0, "mqar": 3.0}
    s = stream(folder, share=1.0, tasks=weights, batch_size=50)
    drawn = Counter(name.split()[-1] for step in range(10) for name in s.batch(step).names)
    for task, weight in weights.items():
        assert drawn[task] / 500 == pytest.approx(weight / 10, abs=0.07)
    turned = stream(folder, share=1.0, tasks=dict(reversed(weights.items())), batch_size=50)
    assert same(turned.batch(1), s.batch(1))


def test_a_batch_tells_what_it_is_made_of(folder):
    text = stream(folder, share=0.25).batch(2).describe()
    assert "sample 8: train window " in text
    assert "of epoch 0" in text
    assert "sample 11: synthetic " in text


def test_the_fingerprint_follows_what_changes_the_stream_and_not_where_the_folder_lies(folder, tmp_path):
    (tmp_path / "elsewhere").symlink_to(folder)
    base = stream(folder, share=0.25).fingerprint
    assert stream(tmp_path / "elsewhere", share=0.25).fingerprint == base
    others = [stream(folder, share=0.5), stream(folder, share=0.25, seed=6), stream(folder, share=0.25, seq_len=32),
              stream(folder, share=0.25, batch_size=2), stream(folder, share=0.25, boundaries="leak")]
    assert len({base, *(s.fingerprint for s in others)}) == 6


def test_a_data_set_too_small_for_one_sequence_is_refused_with_figures(folder):
    n = Shard(folder / "train").n_tokens
    assert stream(folder, seq_len=n - 1).order.n_windows == 1
    with pytest.raises(DataError, match=rf"train split has {n} tokens, but one sequence of seq_len {n} needs {n + 1}"):
        stream(folder, seq_len=n)


def test_a_stream_needs_a_folder_and_a_large_enough_vocabulary(folder):
    with pytest.raises(ConfigError, match=r"data.path is not set"):
        Stream(DataConfig(boundaries="reset"), seq_len=4, batch_size=1, seed=0, vocab_size=600, steps=1)
    with pytest.raises(DataError, match=r"has 600 tokens, but model.vocab_size is 512"):
        stream(folder, vocab_size=512)


@pytest.mark.parametrize("boundaries", ["reset", "leak"])
def test_held_out_batches_predict_every_token_once_in_order(folder, boundaries):
    shard = Shard(folder / "heldout")
    batches = list(heldout_batches(config(folder, boundaries=boundaries), seq_len=50, batch_size=3))
    targets = np.concatenate([b.targets[b.mask] for b in batches])
    everything = shard.tokens(0, shard.n_tokens)
    starts = {0} | (set(shard.document_ends.tolist()) if boundaries == "reset" else set())
    expected = [t for i, t in enumerate(everything.tolist()) if i not in starts]
    assert targets.tolist() == expected
    assert all((b.segments is None) == (boundaries == "leak") for b in batches)
    assert {b.tokens.shape[1] for b in batches} == {50}
    # padding is a document of its own
    if boundaries == "reset":
        last = batches[-1]
        assert not last.mask[-1, -1]
        assert last.segments[-1, -1] > last.segments[-1, 0]


def test_only_the_first_held_out_windows_are_read_if_so_asked(folder):
    every = list(heldout_batches(config(folder), seq_len=50, batch_size=4))
    some = list(heldout_batches(config(folder), seq_len=50, batch_size=4, windows=6, vocab_size=600))
    assert [len(b.tokens) for b in some] == [4, 2]
    assert same(some[0], every[0])
    np.testing.assert_array_equal(some[1].tokens, every[1].tokens[:2])
    with pytest.raises(DataError, match=r"model.vocab_size is 10"):
        next(heldout_batches(config(folder), seq_len=50, batch_size=4, vocab_size=10))
