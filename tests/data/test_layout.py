"""Which documents are neighbours, and how often each is shown, is as asked and a function of the step.

Each document of the folders here is one letter repeated, so that an epoch's layout can be read from its windows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hinny.config import DataConfig, SyntheticConfig, validate
from hinny.data.mix import Stream
from hinny.data.prepare import prepare
from hinny.data.shards import ShardWriter
from hinny.errors import ConfigError, DataError

SEQ_LEN = 16
EOD = 256
LENGTHS = [5, 31, 2, 60, 17, 40, 3, 33, 9, 80, 4, 21, 40, 6, 39, 1, 12, 50, 7, 28]
SOURCES = [2, 0, 2, 1, 1, 0, 3, 2, 0, 1, 3, 3, 0, 2, 1, 0, 4, 4, 2, 0]


def folder(path: Path, lengths: list[int], sources: list[int] | None = None, first: int = 0) -> str:
    """A data folder whose train documents are these: letter first + d, lengths[d] tokens with the end of the document.
    """
    (path.parent / f"{path.name}.jsonl").write_text("".join(
        json.dumps({"t": f"text {first} {n} " * 9, "s": f"source {n}"}) + "\n" for n in range(20)))
    prepare(path, jsonl=[path.parent / f"{path.name}.jsonl"], field="t", tokenizer="bytes", held_out=0.2,
            source_field=None if sources is None else "s")
    with ShardWriter(path / "train", np.dtype("<u2")) as writer:
        for d, n in enumerate(lengths):
            writer.add_document([first + d] * (n - 1) + [EOD])
    record = json.loads((path / "data.json").read_text())
    record["train"] = {"tokens": sum(lengths), "documents": len(lengths)}
    (path / "data.json").write_text(json.dumps(record))
    if sources is not None:
        np.save(path / "train.sources.npy", np.array(sources, "<u4"))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return folder(tmp_path_factory.mktemp("layout") / "d", LENGTHS, SOURCES)


def stream(path: str | dict[str, float], seed: int = 5, batch_size: int = 1, **options: Any) -> Stream:
    where = {"path": path} if isinstance(path, str) else {"blend": path}
    config = DataConfig.model_validate({"boundaries": "leak", **where, **options})
    return Stream(config, seq_len=SEQ_LEN, batch_size=batch_size, seed=seed, vocab_size=257, steps=1000)


def epoch(s: Stream, number: int) -> list[int]:
    """The tokens of an epoch as they were laid out, put together from its windows."""
    n = s.order.n_windows
    found: dict[int, list[int]] = {}
    for i in range(n):
        batch = s.batch(number * n + i)
        words = batch.names[0].split()
        assert int(words[7]) == number
        found[int(words[4])] = [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
    assert sorted(found) == list(range(n))
    for k in range(1, n):
        assert found[k - 1][-1] == found[k][0]
    return found[0][:1] + [token for k in range(n) for token in found[k][1:]]


def letters(tokens: list[int], lengths: list[int]) -> list[int]:
    """The documents that make up the tokens, the last one perhaps cut; a one-token document is its end alone."""
    found = []
    place = 0
    only = lengths.index(1) if 1 in lengths else None
    while place < len(tokens):
        letter = only if tokens[place] == EOD else tokens[place]
        body = [letter] * (lengths[letter] - 1) + [EOD]
        assert tokens[place:place + len(body)] == body[:len(tokens) - place]
        found.append(letter)
        place += len(body)
    return found


def whole(order: list[int], s: Stream) -> list[int]:
    """A layout without what is behind its last window."""
    tokens = [token for d in order for token in [d] * (LENGTHS[d] - 1) + [EOD]]
    assert (len(tokens) - 1) // SEQ_LEN == s.order.n_windows
    return tokens[:s.order.n_windows * SEQ_LEN + 1]


def test_the_plain_order_and_its_fingerprint_are_what_they_were(data) -> None:
    s = stream(data)
    tokens = [token for d, n in enumerate(LENGTHS) for token in [d] * (n - 1) + [EOD]]
    n = (len(tokens) - 1) // SEQ_LEN
    for i in (0, 3, n - 1, n, 2 * n + 5):
        order = np.random.default_rng([5, i // n]).permutation(n)
        start = int(order[i % n]) * SEQ_LEN
        assert s.batch(i).tokens[0].tolist() == tokens[start:start + SEQ_LEN]
    print_of_folder = json.loads((Path(data) / "data.json").read_text())["fingerprint"]
    settings = {"boundaries": "leak", "seq_len": SEQ_LEN, "batch_size": 1, "seed": 5, "data": print_of_folder,
                "synthetic": None}
    assert s.fingerprint == hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    # an order that is asked for by its name is the same
    assert stream(data, join="order").fingerprint == s.fingerprint


@pytest.mark.parametrize("weight", [2.0, 1.2, 2.5, 3.3, 7.0])
def test_long_documents_are_shown_as_often_as_asked_in_every_epoch(data, weight) -> None:
    s = stream(data, long={"min_tokens": 33, "weight": weight})
    long = [d for d, n in enumerate(LENGTHS) if n >= 33]
    exact = Fraction(str(weight))
    expected = dict.fromkeys(range(len(LENGTHS)), 1)
    expected |= {d: floor((k + 1) * exact) - floor(k * exact) for k, d in enumerate(long)}
    assert sum(expected[d] for d in long) == floor(len(long) * exact)
    for number in (0, 1):
        tokens = epoch(s, number)
        # what the last window cuts off is short
        found = Counter(tokens)
        lacking = {d: expected[d] * (LENGTHS[d] - 1) - found[d] for d in expected}
        assert min(lacking.values()) == 0
        assert sum(lacking.values()) < SEQ_LEN
    assert s.epochs[data] == 1000 / s.order.n_windows


def test_documents_of_a_source_are_adjacent_and_in_their_own_order(data) -> None:
    orders = []
    for seed in (5, 6, 7):
        s = stream(data, seed=seed, join="source")
        tokens = epoch(s, 0)
        assert epoch(s, 1) == tokens
        found = letters(tokens, LENGTHS)
        # what the last window cuts off is short
        missing = [d for d in range(len(LENGTHS)) if d not in found]
        sources = [SOURCES[d] for d in [*found, *missing]]
        runs = [source for i, source in enumerate(sources) if i == 0 or sources[i - 1] != source]
        assert sorted(runs) == [0, 1, 2, 3, 4]
        for source in runs:
            own = [d for d in found if SOURCES[d] == source]
            assert own == sorted(own)
        assert tokens == whole([d for source in runs for d in range(len(LENGTHS)) if SOURCES[d] == source], s)
        orders.append(runs)
    assert len({tuple(order) for order in orders}) > 1


def test_a_random_order_is_another_one_each_epoch_and_has_every_document_once(data) -> None:
    s = stream(data, join="random")
    orders = []
    for number in range(3):
        tokens = epoch(s, number)
        found = letters(tokens, LENGTHS)
        assert len(set(found)) == len(found)
        missing = [d for d in range(len(LENGTHS)) if d not in found]
        assert sum(LENGTHS[d] for d in missing) < SEQ_LEN
        orders.append(found)
        follow = sum(b == a + 1 for a, b in pairwise(found))
        # of a random order about one
        assert follow < 6
    assert len({tuple(order) for order in orders}) == 3
    assert epoch(stream(data, join="random", seed=6), 0) != epoch(s, 0)


def test_copies_are_apart_and_the_rest_is_shared_out_between_them(data) -> None:
    long = [d for d, n in enumerate(LENGTHS) if n >= 33]
    rest = [d for d in range(len(LENGTHS)) if d not in long]
    # 13 documents that come once, 7 that come three times, each third of the epoch in the shard's order
    thirds = [rest[:5], rest[5:9], rest[9:]]
    s = stream(data, long={"min_tokens": 33, "weight": 3.0})
    assert epoch(s, 0) == whole([d for third in thirds for d in sorted(third + long)], s)


@pytest.mark.parametrize("join", ["source", "random"])
def test_a_round_has_no_two_copies_and_its_own_order(data, join) -> None:
    s = stream(data, join=join, long={"min_tokens": 33, "weight": 3.0})
    long = [d for d, n in enumerate(LENGTHS) if n >= 33]
    orders = []
    for number in range(2):
        found = letters(epoch(s, number), LENGTHS)
        rounds, seen = [[]], set()
        for d in found:
            if d in long and d in seen:
                rounds.append([])
                seen = set()
            seen |= {d} & set(long)
            rounds[-1].append(d)
        assert all(set(long) <= set(one) for one in rounds[:2])
        assert not any(a == b for a, b in pairwise(found))
        if join == "source":
            for one in rounds:
                sources = [SOURCES[d] for i, d in enumerate(one) if i == 0 or SOURCES[one[i - 1]] != SOURCES[d]]
                # a round's last documents, behind its long ones, are taken for the next one's first by this test
                assert len(sources) <= len(set(sources)) + 1
        orders += [[d for d in one if d in long] for one in rounds[:2]]
    assert len({tuple(order) for order in orders}) == (1 if join == "source" else 4)


@pytest.mark.parametrize("join", ["order", "random"])
@pytest.mark.parametrize(("n", "long", "weight"), [(40, (7, 39), 8.0), (40, (38, 39), 2.5), (12, (0,), 6.0)])
def test_few_long_documents_do_not_stand_beside_themselves(tmp_path, join, n, long, weight) -> None:
    lengths = [40 if d in long else 10 for d in range(n)]
    s = stream(folder(tmp_path / "few", lengths), join=join, long={"min_tokens": 40, "weight": weight})
    found = letters(epoch(s, 1), lengths)
    rounds = ceil(weight)
    for d in long:
        places = [i for i, other in enumerate(found) if other == d]
        assert len(places) >= floor(weight) - 1
        if join == "order":
            assert min(b - a for a, b in pairwise(places)) >= (n - len(long)) // rounds
        else:
            assert min(b - a for a, b in pairwise(places)) > 1


@pytest.mark.parametrize("options", [
    {"join": "source"}, {"join": "random"}, {"long": {"min_tokens": 30, "weight": 1.5}},
    {"join": "random", "long": {"min_tokens": 30, "weight": 2.5}}])
def test_a_batch_depends_on_seed_and_step_only(data, options) -> None:
    walked, fresh = stream(data, batch_size=3, **options), stream(data, batch_size=3, **options)
    batches = [walked.batch(step) for step in range(60)]
    for step in (59, 0, 33, 34, 12):
        again = fresh.batch(step)
        np.testing.assert_array_equal(again.tokens, batches[step].tokens)
        np.testing.assert_array_equal(again.targets, batches[step].targets)
        assert again.names == batches[step].names


@pytest.mark.parametrize("options", [{"join": "source"}, {"join": "random", "long": {"min_tokens": 2, "weight": 2.0}}])
def test_documents_of_a_window_are_kept_apart(data, options) -> None:
    s = stream(data, boundaries="reset", **options)
    for step in range(40):
        batch = s.batch(step)
        assert batch.segments is not None
        row, parts = batch.tokens[0], batch.segments[0]
        # a document ends with its end-of-document token, and there alone
        np.testing.assert_array_equal(np.diff(parts), row[:-1] == EOD)
        assert parts[0] == 0


def test_synthetic_sequences_stay_as_they_are(data) -> None:
    synthetic = SyntheticConfig(share=0.5, tasks={"copy": 1.0}, phonebook_digits=4)
    plain, random = (stream(data, join=join, synthetic=synthetic) for join in ("order", "random"))
    kinds = []
    for step in range(20):
        one, other = plain.batch(step), random.batch(step)
        kinds.append("synthetic" in one.names[0])
        assert ("synthetic" in other.names[0]) == kinds[-1]
        if kinds[-1]:
            np.testing.assert_array_equal(one.tokens, other.tokens)
    assert sum(kinds) == 10


def test_each_layout_has_a_fingerprint_of_its_own(data) -> None:
    options: list[dict[str, Any]] = [
        {}, {"join": "source"}, {"join": "random"}, {"long": {"min_tokens": 30, "weight": 2.0}},
        {"long": {"min_tokens": 31, "weight": 2.0}}, {"long": {"min_tokens": 30, "weight": 2.1}}]
    assert len({stream(data, **one).fingerprint for one in options}) == len(options)


def test_in_a_blend_every_folder_is_laid_out_by_itself(data, tmp_path) -> None:
    short = folder(tmp_path / "short", [10] * 40, first=100)
    s = stream({data: 1.0, short: 1.0}, long={"min_tokens": 33, "weight": 2.0})
    alone = stream(short)
    # the folder without long documents is what it was; the other one is longer by their second copies
    n = (sum(LENGTHS) + sum(n for n in LENGTHS if n >= 33) - 1) // SEQ_LEN
    assert s.epochs[data] == 500 / n
    assert s.epochs[short] == 500 / alone.order.n_windows
    copies = dict.fromkeys(range(len(LENGTHS)), 0)
    for i in range(n):
        batch = s.batch(2 * i + 1)
        assert data in batch.names[0]
        for token in batch.targets[0].tolist():
            if token != EOD:
                copies[token] += 1
    # tokens of a document in an epoch, its end not counted; what is behind the last window is missing
    wanted = {d: (length - 1) * (2 if length >= 33 else 1) for d, length in enumerate(LENGTHS)}
    lacking = sum(wanted[d] - copies[d] for d in copies)
    assert all(wanted[d] >= copies[d] for d in copies)
    assert lacking <= SEQ_LEN


def test_folders_of_a_blend_that_are_alike_have_orders_of_their_own(data, tmp_path) -> None:
    other = folder(tmp_path / "other", LENGTHS, SOURCES, first=100)
    for join in ("random", "source"):
        s = stream({data: 1.0, other: 1.0}, join=join)
        batches = [s.batch(i) for i in range(60)]
        windows: dict[str, dict[int, list[int]]] = {data: {}, other: {}}
        for batch in batches:
            words = batch.names[0].split()
            if int(words[7]) == 0:
                path = next(each for each in windows if each in batch.names[0])
                windows[path][int(words[4])] = [t if t == EOD else t % 100 for t in batch.tokens[0].tolist()]
        both = sorted(set(windows[data]) & set(windows[other]))
        assert len(both) > 5
        assert [windows[data][k] for k in both] != [windows[other][k] for k in both]


def test_where_no_document_is_long_the_figures_are_told(data, tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.long\.min_tokens is 81, and no train document is that long: .*/d has "
                                        "20, the longest of 80 tokens"):
        stream(data, long={"min_tokens": 81, "weight": 2.0})
    short = folder(tmp_path / "short", [10] * 40, first=100)
    with pytest.raises(DataError, match=r"has 20, the longest of 80 tokens; .*/short has 40, the longest of 10 tokens"):
        stream({data: 1.0, short: 1.0}, long={"min_tokens": 81, "weight": 2.0})
    with pytest.raises(DataError, match=r"data\.long\.weight is 1\.1: no folder has more than 7 documents of 33 to"):
        stream(data, long={"min_tokens": 33, "weight": 1.1})


def test_sources_that_were_not_kept_are_asked_for(data, tmp_path) -> None:
    plain = folder(tmp_path / "plain", LENGTHS[:-1])
    for where in (plain, {data: 1.0, plain: 1.0}):
        with pytest.raises(DataError, match=r'/plain: data\.join = "source" needs .* prepare it with --source-field'):
            stream(where, join="source")


@pytest.mark.parametrize(("options", "message"), [
    ({"order": "megatron", "join": "random"}, 'join = "random" has no place in order = "megatron"'),
    ({"order": "megatron-ssm", "join": "source"}, 'join = "source" has no place in order = "megatron-ssm"'),
    ({"order": "megatron", "long": {"min_tokens": 9, "weight": 2.0}}, 'long has no place in order = "megatron"'),
    ({"long": {"min_tokens": 9, "weight": 1.0}}, "long.weight is 1.0: input should be greater than 1"),
    ({"long": {"min_tokens": 0, "weight": 2.0}}, "long.min_tokens is 0"),
    ({"long": {"weight": 2.0}}, "long.min_tokens is missing"),
    ({"join": "near"}, "join is 'near': .*'order', 'source' or 'random'"),
])
def test_settings_that_cannot_act_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, {"boundaries": "leak", "path": "d", **options}, "mine.toml")
