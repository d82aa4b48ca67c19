"""A blend keeps its weights exactly, walks each source through before it repeats, and is a function of the step."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny import tokenizer
from hinny.config import DataConfig, SyntheticConfig, validate
from hinny.data.mix import Stream
from hinny.data.prepare import prepare
from hinny.data.windows import Blend
from hinny.errors import ConfigError, DataError

WEIGHTS = (0.7, 0.15, 0.15)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Folders in bytes; the k-th has letters of its own only."""
    root = tmp_path_factory.mktemp("blend")
    rng = np.random.default_rng(0)
    for k, (name, letters) in enumerate({"web": "abcde", "other": "fghij", "code": "klmno"}.items()):
        (root / f"{name}-text").mkdir()
        for n in range(12):
            text = "".join(rng.choice(list(letters), 200 + 40 * k))
            (root / f"{name}-text" / f"{n}.txt").write_text(text)
        prepare(root / name, text=[root / f"{name}-text"], tokenizer="bytes", held_out=0.1)
    return [str(root / name) for name in ("web", "other", "code")]


def stream(folders, weights=WEIGHTS, seed=5, batch_size=4, seq_len=16, steps=1000, synthetic=None, boundaries="leak"):
    data = DataConfig(blend=dict(zip(folders, weights, strict=True)), boundaries=boundaries, synthetic=synthetic)
    return Stream(data, seq_len=seq_len, batch_size=batch_size, seed=seed, vocab_size=257, steps=steps)


def source_of(tokens):
    """Which folder a row of bytes is from, by its letters."""
    letter = next(t for t in tokens.tolist() if t < 256)
    return (letter - ord("a")) // 5


def test_every_prefix_of_the_stream_has_its_share_of_each_source(three):
    s = stream(three, batch_size=20)
    sources = np.array([source_of(row) for step in range(20) for row in s.batch(step).tokens])
    for k, weight in enumerate(WEIGHTS):
        counts = np.cumsum(sources == k)
        assert np.abs(counts - weight * np.arange(1, 401)).max() <= 2
        # the first is exact at every period of the weights
        assert counts[19] == 20 * weight or k


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.sampled_from([0.05, 0.1, 0.3, 1.0, 2.5, 7.0]), min_size=2, max_size=5))
def test_places_count_each_source_from_zero_without_a_gap(weights):
    blend = Blend([None] * len(weights), weights)
    counts = [0] * len(weights)
    for j in range(200):
        k, place = blend.place(j)
        assert place == counts[k]
        counts[k] += 1
        for d, weight in enumerate(weights):
            share = Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights)
            assert abs(counts[d] - share * (j + 1)) < len(weights)


def test_a_source_is_used_up_before_it_is_repeated_and_its_epochs_are_named(three):
    s = stream(three, batch_size=1, steps=400)
    seen = {folder: [] for folder in three}
    for step in range(400):
        _, _, _, _, window, _, _, epoch, _, folder = s.batch(step).names[0].split()
        seen[folder].append((int(epoch), int(window)))
    for folder, found in seen.items():
        alone = Stream(DataConfig(path=folder, boundaries="leak"), seq_len=16, batch_size=1, seed=5, vocab_size=257,
                       steps=1)
        n = alone.order.n_windows
        assert [epoch for epoch, _ in found] == [i // n for i in range(len(found))]
        for epoch in range(-(-len(found) // n)):
            windows = Counter(window for e, window in found if e == epoch)
            assert set(windows.values()) == {1}
        assert s.epochs[folder] == pytest.approx(len(found) / n)
    assert max(epoch for found in seen.values() for epoch, _ in found) >= 1


def test_a_batch_depends_on_seed_and_step_only(three):
    synthetic = SyntheticConfig(share=0.25, tasks={"copy": 1.0}, phonebook_digits=4)
    walked, fresh = stream(three, synthetic=synthetic), stream(three, synthetic=synthetic)
    batches = [walked.batch(step) for step in range(100)]
    for step in (99, 0, 57, 58):
        again = fresh.batch(step)
        np.testing.assert_array_equal(again.tokens, batches[step].tokens)
        assert again.names == batches[step].names
    assert sum("synthetic" in name for b in batches for name in b.names) == 100
    assert not np.array_equal(stream(three, seed=6, synthetic=synthetic).batch(0).tokens, batches[0].tokens)


def test_sources_of_one_size_have_orders_of_their_own(tmp_path):
    (tmp_path / "t").mkdir()
    for k in range(2):
        for n in range(12):
            (tmp_path / "t" / f"{n}.txt").write_text(chr(ord("a") + 5 * k) * 200 + f"{n:03d}")
        prepare(tmp_path / f"d{k}", text=[tmp_path / "t"], tokenizer="bytes", held_out=0.1)
    s = stream([str(tmp_path / f"d{k}") for k in range(2)], weights=(1.0, 1.0), batch_size=1)
    first, second = ([s.batch(j).names[0].split()[4] for j in range(k, 60, 2)] for k in range(2))
    assert first != second


def test_the_fingerprint_covers_every_folder_and_weight_and_not_where_they_lie(three, tmp_path):
    base = stream(three).fingerprint
    moved = []
    for k, folder in enumerate(three):
        (tmp_path / str(k)).symlink_to(folder)
        moved.append(str(tmp_path / str(k)))
    assert stream(moved).fingerprint == base
    others = [stream(three, weights=(0.6, 0.25, 0.15)), stream(three[:2], weights=(0.7, 0.15)),
              stream([three[1], three[0], three[2]]), stream(three, seed=6)]
    assert len({base, *(s.fingerprint for s in others)}) == 5


def test_another_tokenizer_is_refused_with_both_fingerprints(three, folder):
    ours, theirs = (tokenizer.load(path).fingerprint[:12] for path in (folder, three[0]))
    with pytest.raises(DataError, match=rf"the tokenizer of .* \({ours}\) is not that of {three[0]} \({theirs}\)"):
        Stream(DataConfig(blend={three[0]: 1.0, str(folder): 1.0}, boundaries="leak"), seq_len=16, batch_size=1, seed=0,
               vocab_size=600, steps=1)


def test_the_same_data_twice_are_refused(three, tmp_path):
    (tmp_path / "again").symlink_to(three[0])
    with pytest.raises(DataError, match="hold the same data"):
        stream([three[0], str(tmp_path / "again")], weights=(1.0, 1.0))


@pytest.mark.parametrize(("options", "message"), [
    ({"path": "a", "blend": {"b": 1.0, "c": 1.0}}, r"path \('a'\) and blend \(2 folders\)"),
    ({"blend": {"b": 1.0}}, "blend has 1 folders, it needs two or more"),
    ({"blend": {}}, "blend has 0 folders"),
    ({"blend": {"b": 1.0, "c": 0.0}}, "blend.c"),
    ({"order": "shuffled"}, "windows.*megatron"),
    ({"order": "megatron", "synthetic": {"share": 0.5, "tasks": {"copy": 1.0}}}, "no synthetic sequences"),
    ({"eod_mask_loss": True, "boundaries": "reset"}, 'no effect with boundaries = "reset"'),
])
def test_a_data_section_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, {"boundaries": "leak"} | options, "mine.toml")
