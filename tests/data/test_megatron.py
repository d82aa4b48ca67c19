"""Megatron's order, held to its algorithm written out once more with plain lists, token by token."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hinny.config import DataConfig
from hinny.data.megatron import blend_indices, indices, normalized, requested, sample_starts
from hinny.data.mix import Stream
from hinny.data.prepare import prepare
from hinny.data.shards import Shard, ShardWriter
from hinny.errors import DataError


def reference(lengths, ids, samples, seq, seed):
    """Document, sample and shuffle index and the number of epochs, as lists."""
    tokens = sum(lengths[i] for i in ids)
    epochs = 1
    while epochs * tokens < samples * seq + 1:
        epochs += 1
    separate = False
    if epochs > 1:
        before = ((epochs - 1) * tokens - 1) // seq
        separate = samples - before < int(0.80 * ((tokens - 1) // seq))
    draws = np.random.RandomState(seed)
    documents = [i for _ in range(epochs - 1 if separate else epochs) for i in ids]
    draws.shuffle(documents)
    if separate:
        tail = list(ids)
        draws.shuffle(tail)
        documents += tail
    total = (epochs * tokens - 1) // seq
    head, rest = list(range(before if separate else total)), list(range(before, total)) if separate else []
    draws.shuffle(head)
    if rest:
        draws.shuffle(rest)
    return documents, walk(lengths, documents, total, seq), head + rest, epochs


def walk(lengths, documents, total, seq):
    """The sample index by stepping through the documents, back one token after each sample."""
    rows, d, o = [[0, 0]], 0, 0
    while len(rows) <= total:
        need = seq + 1
        while True:
            have = lengths[documents[d]] - o
            need -= have
            if need <= 0:
                o += need + have - 1
                break
            if d == len(documents) - 1:
                o = lengths[documents[d]] - 1
                break
            d, o = d + 1, 0
        rows.append([d, o])
    return rows


def assert_equal(found, expected):
    documents, starts, shuffled, epochs = expected
    assert found.document_index.tolist() == documents
    assert found.sample_index.tolist() == starts
    assert found.shuffle_index.tolist() == shuffled
    assert found.epochs == epochs
    assert (found.document_index.dtype, found.sample_index.dtype, found.shuffle_index.dtype) == \
        (np.int32, np.int32, np.uint32)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(any), seq=st.integers(1, 40),
       samples=st.integers(1, 120), seed=st.integers(0, 2 ** 32 - 1), skipped=st.integers(0, 3))
@example(lengths=[0, 0, 5], seq=2, samples=7, seed=1, skipped=0)
@example(lengths=[1], seq=9, samples=4, seed=1, skipped=0)
@example(lengths=[100] * 10, seq=10, samples=99 + 79, seed=3, skipped=0)
@example(lengths=[100] * 10, seq=10, samples=99 + 78, seed=3, skipped=0)
def test_the_three_indices_are_megatrons(lengths, seq, samples, seed, skipped):
    """A split may begin behind the first sequences of its shard."""
    everything = [7] * skipped + lengths
    ids = range(skipped, len(everything))
    found = indices(np.array(everything, np.int32), ids, samples=samples, seq_len=seq, seed=seed)
    assert_equal(found, reference(everything, ids, samples, seq, seed))
    assert len(found.shuffle_index) >= samples


def test_a_last_epoch_used_by_less_than_80_percent_is_drawn_apart_and_only_then():
    """1000 tokens, seq 10: one epoch has 99 samples, so 79 of the second's are 80 % and 78 are less."""
    lengths = np.full(10, 100, np.int32)
    apart = indices(lengths, range(10), samples=99 + 78, seq_len=10, seed=3)
    whole = indices(lengths, range(10), samples=99 + 79, seq_len=10, seed=3)
    assert sorted(apart.document_index[:10]) == sorted(apart.document_index[10:]) == list(range(10))
    assert sorted(apart.shuffle_index[:99]) == list(range(99))
    assert sorted(whole.document_index[:10]) != list(range(10))
    assert sorted(whole.shuffle_index[:99]) != list(range(99))


def test_samples_of_a_hand_worked_layout_share_one_token():
    """Documents of 3, 0, 4 and 2 tokens in the order 2, 1, 0, 3; seq 3: samples begin at tokens 0, 3 and 6."""
    lengths = np.array([3, 0, 4, 2], np.int32)
    assert sample_starts(lengths, np.array([2, 1, 0, 3]), 2, 3).tolist() == [[0, 0], [0, 3], [2, 2]]
    # token 4 is the first behind the empty document
    assert sample_starts(lengths, np.array([2, 1, 0, 3]), 2, 4).tolist() == [[0, 0], [2, 0], [3, 1]]
    # Megatron's walk begins in an empty first document
    assert sample_starts(lengths, np.array([1, 0]), 1, 2).tolist() == [[0, 0], [1, 2]]


def test_the_draws_are_those_that_numpy_has_always_given():
    """Fisher-Yates from the end, MT19937: worked out from RandomState's integers and not from its shuffle."""
    found = indices(np.full(6, 4, np.int32), range(6), samples=7, seq_len=3, seed=1234)
    raw = np.random.RandomState(1234)

    def shuffled(n):
        out = list(range(n))
        for i in range(n - 1, 0, -1):
            mask = (1 << i.bit_length()) - 1
            while (j := int(raw.randint(0, 2 ** 32, dtype=np.uint32)) & mask) > i:
                pass
            out[i], out[j] = out[j], out[i]
        return out

    assert found.document_index.tolist() == shuffled(6)
    assert found.shuffle_index.tolist() == shuffled(7)


def test_tables_widen_when_32_bits_do_not_hold_them():
    """A document of 2³¹ tokens exists in `lengths` only as a number."""
    found = sample_starts(np.array([2 ** 31, 5]), np.array([0, 1]), 2, 2 ** 30)
    assert found.dtype == np.int64
    assert found.tolist() == [[0, 0], [0, 2 ** 30], [1, 0]]


def test_a_split_without_tokens_is_refused():
    with pytest.raises(DataError, match="no tokens in sequences 0 to 2"):
        indices(np.zeros(2, np.int32), range(2), samples=1, seq_len=1, seed=0)


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=6), size=st.integers(1, 400))
@example(weights=[70, 15, 15], size=400)
@example(weights=[0.1] * 3, size=50)
def test_the_blend_takes_the_source_that_lags_most_and_the_first_of_equals(weights, size):
    shares = normalized(weights)
    counts, expected = [0] * len(weights), []
    for i in range(size):
        best = 0
        for d in range(1, len(weights)):
            if shares[d] * max(i, 1.0) - counts[d] > shares[best] * max(i, 1.0) - counts[best]:
                best = d
        expected.append((best, counts[best]))
        counts[best] += 1
    sources, numbers = blend_indices(shares, size)
    assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected
    assert (sources.dtype, numbers.dtype) == (np.int16, np.int64)


@pytest.mark.parametrize("weights", [[70, 15, 15], [1, 1], [0.7, 0.3], [1, 2, 3, 5], [0.1234567, 0.5], [1e-4, 1, 1]])
def test_a_long_blend_is_that_of_single_steps(weights):
    """Long enough for stretches that repeat, and for sums whose rounding breaks the repetition."""
    shares = normalized(weights)
    counts, expected = [0] * len(weights), []
    for i in range(30_000):
        lag = [share * max(i, 1) - count for share, count in zip(shares, counts, strict=True)]
        expected.append(lag.index(max(lag)))
        counts[expected[-1]] += 1
    sources, numbers = blend_indices(shares, 30_000)
    assert sources.tolist() == expected
    for d, count in enumerate(counts):
        assert numbers[sources == d].tolist() == list(range(count))


def test_a_hand_worked_blend():
    """Halves: lags .5 .5, then -.5 .5, then 0 0, where the first comes next, then -.5 .5.

    Of .7 .15 .15 the second comes second: the first lags by .7 - 1.
    """
    sources, numbers = blend_indices([0.5, 0.5], 4)
    assert (sources.tolist(), numbers.tolist()) == ([0, 1, 0, 1], [0, 0, 1, 1])
    assert blend_indices([0.7, 0.15, 0.15], 7)[0].tolist() == [0, 1, 0, 2, 0, 0, 0]


def test_a_source_is_asked_for_half_a_percent_more_than_its_weight():
    """20 samples of 0.15: 3 · 1.005 = 3.015. 5 of 0.7: 3.5 · 1.005 is 4; Megatron Core rounds up twice: 4.02 is 5."""
    assert (requested(20, 0.15, "megatron"), requested(20, 0.15, "megatron-ssm")) == (4, 4)
    assert (requested(5, 0.7, "megatron"), requested(5, 0.7, "megatron-ssm")) == (5, 4)
    assert requested(1000, 0.7, "megatron") == math.ceil(700 * 1.005)


DOCUMENTS = [[10, 11, 12, 256], [256], [20, 21, 22, 23, 24, 256], [30, 31, 256, 32, 256]]


@pytest.fixture
def pair(tmp_path):
    """A folder of a pair of four sequences in two documents; 256 is eod."""
    with ShardWriter(tmp_path / "made", np.dtype("<u2")) as writer:
        for k, document in enumerate(DOCUMENTS):
            writer.add(document)
            if k % 2:
                writer.end_document()
    prepare(tmp_path / "folder", megatron=tmp_path / "made", tokenizer="bytes", split="1")
    return tmp_path / "folder"


def stream(path, steps=5, batch_size=2, seq_len=4, seed=7, **options):
    where = {"blend": path} if isinstance(path, dict) else {"path": str(path)}
    data = DataConfig(**{**where, "boundaries": "leak", "order": "megatron", **options})
    return Stream(data, seq_len=seq_len, batch_size=batch_size, seed=seed, vocab_size=600, steps=steps)


def rows_of(documents, samples, seq, seed):
    """The samples of a run as lists of T + 1 tokens, and the piece that each token belongs to."""
    order, starts, shuffled, _ = reference([len(d) for d in documents], range(len(documents)), samples, seq, seed)
    for number in shuffled:
        (d, o), (last, end) = starts[number], starts[number + 1]
        tokens, piece = [], []
        while d < last:
            tokens += documents[order[d]][o:]
            piece += [d] * (len(tokens) - len(piece))
            d, o = d + 1, 0
        tokens += documents[order[last]][o:end + 1]
        yield tokens, piece + [last] * (len(tokens) - len(piece))


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_a_run_reads_megatrons_samples_with_megatrons_loss_mask(pair, eod_mask_loss):
    s = stream(pair, eod_mask_loss=eod_mask_loss)
    batches = [s.batch(step) for step in range(5)]
    expected = [tokens for tokens, _ in rows_of(DOCUMENTS, 10, 4, 7)][:10]
    found = [[*row, last] for b in batches for row, last in zip(b.tokens.tolist(), b.targets[:, -1].tolist(),
                                                                 strict=True)]
    assert found == expected
    for batch in batches:
        assert batch.segments is None
        np.testing.assert_array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])
        if eod_mask_loss:
            # the label after an eod input has no loss; eod itself is learned
            np.testing.assert_array_equal(batch.mask, batch.tokens != 256)
        else:
            assert batch.mask.all()
    assert any(256 in b.tokens for b in batches)
    assert stream(pair, eod_mask_loss=True).fingerprint != stream(pair).fingerprint


def test_a_batch_depends_on_the_step_alone_and_the_order_on_the_length_of_the_run(pair):
    walked, fresh = stream(pair), stream(pair)
    batches = [walked.batch(step) for step in range(5)]
    for step in (4, 0, 2):
        np.testing.assert_array_equal(fresh.batch(step).tokens, batches[step].tokens)
    assert stream(pair, steps=6).fingerprint != walked.fingerprint
    assert stream(pair).fingerprint == walked.fingerprint
    assert walked.epochs[str(pair)] == pytest.approx(10 * 4 / 16, rel=0.1)


def test_with_reset_the_pieces_are_apart_and_in_the_same_order(pair):
    s = stream(pair, boundaries="reset")
    batches = [s.batch(step) for step in range(5)]
    rows = list(rows_of(DOCUMENTS, 10, 4, 7))[:10]
    for i, (tokens, piece) in enumerate(rows):
        batch, r = batches[i // 2], i % 2
        assert batch.tokens[r].tolist() == tokens[:-1]
        assert batch.mask[r].tolist() == [a == b for a, b in pairwise(piece)]
        same = np.array(piece[:-1])
        np.testing.assert_array_equal(np.diff(batch.segments[r]) == 0, np.diff(same) == 0)


@pytest.mark.parametrize("order", ["megatron", "megatron-ssm"])
def test_a_blend_reads_each_source_in_the_order_of_its_own_request(pair, tmp_path, order):
    other = tmp_path / "other"
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n).tolist() for n in (9, 4, 30, 1)]
    with ShardWriter(tmp_path / "second", np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)
    prepare(other, megatron=tmp_path / "second", tokenizer="bytes", split="1")
    s = stream({str(pair): 7.0, str(other): 3.0}, order=order, steps=6, batch_size=5)
    shares = [0.7, 0.3]
    asked = [math.ceil(30 * w * 1.005) if order == "megatron-ssm" else math.ceil(math.ceil(30 * w) * 1.005)
             for w in shares]
    rows = [[tokens for tokens, _ in rows_of(source, n, 4, 7)]
            for source, n in zip((DOCUMENTS, documents), asked, strict=True)]
    counts = [0, 0]
    for i in range(30):
        lag = [shares[d] * max(i, 1) - counts[d] for d in (0, 1)]
        d = 0 if lag[0] >= lag[1] else 1
        batch = s.batch(i // 5)
        assert [*batch.tokens[i % 5], batch.targets[i % 5, -1]] == rows[d][counts[d]]
        assert str((pair, other)[d]) in batch.names[i % 5]
        counts[d] += 1


def test_a_folder_of_our_own_is_megatrons_train_data_path(folder):
    """Its train shard is read whole, as with --train-data-path."""
    train = Shard(folder / "train")
    documents = [train[i].tolist() for i in range(len(train))]
    s = stream(folder, steps=3, seq_len=16)
    expected = [tokens for tokens, _ in rows_of(documents, 6, 16, 7)][:6]
    assert [[*b.tokens[r], b.targets[r, -1]] for b in map(s.batch, range(3)) for r in range(2)] == expected


def test_a_step_behind_the_run_is_refused(pair):
    with pytest.raises(DataError, match="longer than its indices"):
        stream(pair).batch(50)
