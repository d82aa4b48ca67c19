"""Tasks of tokens: a solver of what stands before an answer scores 1, a constant its chance; same samples always."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
from oracle_synthetic import next_token

from hinny.data.phonebook import spelling
from hinny.data.synthetic import symbols
from hinny.errors import ConfigError, RequestError
from hinny.evals.marked import right_places
from hinny.evals.synthetic import TASKS
from hinny.evals.synthetic.tokens import TokenTask, alphabet
from hinny.evals.task import Marked, Setting, Task
from hinny.infer.reading.requests import Scored
from hinny.tokenizer import ByteTokenizer, Tokenizer, train_bpe

TOKENS = [task for task in TASKS if isinstance(task, TokenTask)]
BOOKS = [task for task in TOKENS if task.name.startswith("phonebook")]
NAMES = {task.name: task for task in TOKENS}
GUESSED = {"parity": 0.5, "parity-running": 0.5}
"""Tasks of which a constant gets a share of the whole answers right."""


class Few(ByteTokenizer):
    """A vocabulary of few words; it is asked for their number only."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.vocab_size, self.eod = words, words - 1
        self.fingerprint = f"few {words}"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([spelling() * 3, "the cat sat on the mat and went to the shop of cards " * 40], 420)


def _draw(task: Task, tokenizer: Tokenizer, n: int = 12, extra: int = 37, **changes: int) -> list[Marked]:
    setting = Setting(tokenizer, n, **changes)
    length = changes.get("length") or task.least(setting) + extra
    found = list(task.samples(dataclasses.replace(setting, length=length)))
    assert all(isinstance(sample, Marked) for sample in found)
    return found


def _scored(sample: Marked, likeliest: list[int]) -> list[Scored]:
    return [Scored(np.zeros(len(likeliest)), np.array(likeliest), False)]


def _solve(task: str, sample: Marked, tokenizer: Tokenizer) -> list[Scored]:
    """What the solver says at the marked places; elsewhere, nothing."""
    return _scored(sample, [next_token(task, sample.tokens[:i], tokenizer) if sample.answers[i] else tokenizer.eod
                            for i in range(1, len(sample.tokens))])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [0, 37])
def test_what_stands_before_an_answer_determines_it(name: str, extra: int) -> None:
    task, tokenizer = NAMES[name], ByteTokenizer()
    # books of bytes are long
    for sample in _draw(task, tokenizer, 3 if task in BOOKS else 12, extra):
        scores = task.score(sample, _solve(name, sample, tokenizer))
        assert scores == dict.fromkeys(task.metrics, 1.0), sample.id


@pytest.mark.parametrize("name", NAMES)
def test_the_solver_answers_at_every_place(name: str) -> None:
    """As whoever stands in for a model must: nothing marked is known to it."""
    task, tokenizer = NAMES[name], ByteTokenizer()
    sample = _draw(task, tokenizer, 1, 0)[0]
    said = [next_token(name, sample.tokens[:i], tokenizer) for i in range(1, len(sample.tokens))]
    assert task.score(sample, _scored(sample, said)) == dict.fromkeys(task.metrics, 1.0)


@pytest.mark.parametrize("name", [task.name for task in TOKENS if task not in BOOKS])
@pytest.mark.parametrize("words", [27, 700])
def test_any_vocabulary_will_do(name: str, words: int) -> None:
    task, tokenizer = NAMES[name], Few(words)
    if words == 27 and name in ("mqar-16", "mqar-64"):
        assert "8" in task.missing(Setting(tokenizer, 1))[0]
        return
    assert task.missing(Setting(tokenizer, 1)) == []
    for sample in _draw(task, tokenizer, 8):
        assert max(sample.tokens) < words
        assert tokenizer.eod not in sample.tokens
        assert task.score(sample, _solve(name, sample, tokenizer))["exact"] == 1.0


def test_a_vocabulary_that_is_too_small_is_told_before_anything_runs() -> None:
    for task in TOKENS:
        missing = task.missing(Setting(Few(20), 1))
        assert task in BOOKS or "20 tokens" in missing[0]


@pytest.mark.parametrize("task", BOOKS, ids=lambda task: task.name)
def test_learnt_tokens_spell_the_same_books(task: Task, bpe: Tokenizer) -> None:
    for sample in _draw(task, bpe, 4):
        assert task.score(sample, _solve(task.name, sample, bpe)) == {"exact": 1.0, "digits": 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_scores_chance(name: str) -> None:
    task, tokenizer = NAMES[name], ByteTokenizer()
    samples = _draw(task, tokenizer, 16 if task in BOOKS else 200)
    # the commonest answer is the best that a constant can say
    said = Counter(t for s in samples for t, a in zip(s.tokens, s.answers, strict=True) if a).most_common(1)[0][0]
    scores = [task.score(s, _scored(s, [said] * (len(s.tokens) - 1))) for s in samples]
    means = {metric: np.mean([score[metric] for score in scores]) for metric in task.metrics}
    chance = samples[0].facts["chance"]
    share = means.get("tokens", means.get("digits"))
    if name == "variables":
        # the chance is that of a value that occurs; a constant may be one that does not
        chance = 4 / 32 * chance
    n = 16 if task in BOOKS else 50
    assert share <= chance + 4 * np.sqrt(chance * (1 - chance) / n) + 0.01
    if task.metrics[0] == "exact" and sum(samples[0].answers) > 1:
        assert means["exact"] == 0.0
    eod = [task.score(s, _scored(s, [tokenizer.eod] * (len(s.tokens) - 1))) for s in samples]
    assert {value for score in eod for value in score.values()} == {0.0}


@pytest.mark.parametrize("task", TOKENS, ids=lambda task: task.name)
def test_a_sample_depends_on_its_number_alone(task: Task) -> None:
    tokenizer = ByteTokenizer()
    many = _draw(task, tokenizer, 11)
    assert _draw(task, tokenizer, 11) == many
    assert _draw(task, tokenizer, 3) == many[:3]
    assert len({sample.id for sample in many}) == 11
    assert len({sample.tokens for sample in many}) > 5
    assert _draw(task, tokenizer, 3, seed=5) != many[:3]


@pytest.mark.parametrize("task", TOKENS, ids=lambda task: task.name)
def test_lengths_are_kept(task: Task) -> None:
    tokenizer = ByteTokenizer()
    least = task.least(Setting(tokenizer, 1))
    for length in (least, least + 1, least + 50, 1500):
        for sample in _draw(task, tokenizer, 2, length=length):
            rest = {"copying": 1, "permutations-3-running": 3, "permutations-5-running": 5, "parity-running": 1}
            # the last entry of a book that does not fit, and the room left for the longest question
            rest |= {book.name: 120 for book in BOOKS}
            assert length - rest.get(task.name, 0) <= len(sample.tokens) <= length
            assert len(sample.answers) == len(sample.tokens)
            assert not sample.answers[0]
    for length in (least - 1, None):
        with pytest.raises(ConfigError, match=f"{task.name}.*{length}.*{least}"):
            list(task.samples(Setting(tokenizer, 1, length=length)))


@pytest.mark.parametrize(("name", "queries"), [("induction", 4), ("ngram-suffix", 4), ("variables", 8),
                                               ("phonebook-tokens", 8)])
def test_samples_of_a_context_share_all_but_the_question(name: str, queries: int) -> None:
    groups = defaultdict(list)
    for sample in _draw(NAMES[name], ByteTokenizer(), 2 * queries, extra=300):
        groups[sample.facts["context"]].append(sample)
    assert [len(group) for group in groups.values()] == [queries, queries]
    for group in groups.values():
        shortest = min(len(sample.tokens) for sample in group)
        # a name and a number of the book, or a few tokens
        question = 80 if name.startswith("phonebook") else 5
        heads = {sample.tokens[:shortest - question] for sample in group}
        assert len(heads) == 1
        assert len({sample.tokens for sample in group}) == queries


def test_the_frequent_words_are_never_tied() -> None:
    task = NAMES["frequent-words"]
    for tokenizer in (Few(27), ByteTokenizer()):
        for length in (*range(80, 400), 1000, 4096, 131072):
            counts = task.draw(Setting(tokenizer, 1), length, 0).facts["counts"]
            assert counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize("length", [49, 60, 100, 137, 138, 200, 270, 1000, 131072])
def test_the_common_words_stand_out(length: int) -> None:
    for tokenizer in (Few(27), ByteTokenizer()):
        sample = NAMES["common-words"].draw(Setting(tokenizer, 1), length, 0)
        assert sample.facts["often"] > 2 * sample.facts["seldom"]
        assert len(sample.tokens) == length


def test_long_samples_are_made_in_a_moment_and_right() -> None:
    """131,072 tokens of the smallest alphabet, where an n-gram of 3 occurs 256 times by chance."""
    tokenizer = Few(27)
    for name in ("ngram-suffix", "ngram-prefix", "induction", "permutations-5", "variables"):
        sample = NAMES[name].draw(Setting(tokenizer, 1, length=131072), 131072, 0)
        assert NAMES[name].score(sample, _solve(name, sample, tokenizer))["exact"] == 1.0


def test_hops_and_depths_are_spread() -> None:
    hops = Counter(s.facts["hops"] for s in _draw(NAMES["variables"], ByteTokenizer(), 160))
    assert set(hops) == {0, 1, 2, 3}
    assert min(hops.values()) > 20
    depths = [s.facts["depth"] for s in _draw(NAMES["ngram-prefix"], ByteTokenizer(), 200, extra=300)]
    assert np.histogram(depths, 4, (0, 1))[0].min() > 25


def test_the_state_is_that_of_a_group() -> None:
    """Every arrangement of 5 objects is reached; half the strings of bits are odd."""
    samples = _draw(NAMES["permutations-5"], ByteTokenizer(), 1500, length=64)
    assert len({sample.tokens[-5:] for sample in samples}) == 120
    odd = [sample.tokens[-1] == alphabet(ByteTokenizer(), 8).values[1]
           for sample in _draw(NAMES["parity"], ByteTokenizer(), 400)]
    assert 150 < sum(odd) < 250


def test_only_marked_places_count() -> None:
    sample = Marked("x", (5, 6, 7, 8), (False, True, False, True))
    assert right_places(sample, _scored(sample, [6, 0, 9])[0]).tolist() == [True, False]
    with pytest.raises(RequestError, match="2 places are answered of a sample of 4"):
        right_places(sample, _scored(sample, [6, 0])[0])


def test_recall_is_asked_in_words_of_training() -> None:
    """What a model practised on in training has the same keys and values, as long as there are enough of them."""
    tokenizer = ByteTokenizer()
    assert alphabet(tokenizer, 16) is symbols(tokenizer)
    wide = alphabet(tokenizer, 64)
    every = [*wide.keys.tolist(), *wide.values.tolist(), *wide.letters.tolist(), *wide.separator]
    assert len(set(every)) == len(every) == 3 * 64 + 2


def test_who_does_not_count_gets_chance_of_the_common_words() -> None:
    """Common words come early by chance: naming the words as they come must not be a way round counting."""
    tokenizer, right = ByteTokenizer(), []
    for sample in _draw(NAMES["common-words"], tokenizer, 200, length=1024):
        listed, asked = list(dict.fromkeys(sample.tokens[:-5])), sample.tokens[-4:]
        # after each true answer, the next word that is new
        right += [listed[(listed.index(before) + 1 if before else 0) % len(listed)] == answer
                  for before, answer in zip((None, *asked[:-1]), asked, strict=True)]
    assert np.mean(right) < 0.08


@pytest.mark.parametrize(("name", "chance"), [("permutations-3", 11 / 18), ("permutations-5", 137 / 300),
                                              ("permutations-5-running", 137 / 300), ("parity", 1 / 2)])
def test_the_chance_of_a_row_is_that_of_who_writes_no_object_twice(name: str, chance: float) -> None:
    sample = _draw(NAMES[name], ByteTokenizer(), 1)[0]
    assert sample.facts["chance"] == pytest.approx(chance)


@pytest.mark.parametrize("pairs", [4, 16])
def test_the_chance_of_recall_is_that_of_a_value_of_the_table(pairs: int) -> None:
    task, rng = NAMES[f"mqar-{pairs}"], np.random.default_rng(0)
    samples = _draw(task, ByteTokenizer(), 300)
    scores = [task.score(s, _scored(s, rng.choice(s.tokens[1:2 * pairs:2], len(s.tokens) - 1).tolist()))["tokens"]
              for s in samples]
    assert np.mean(scores) == pytest.approx(np.mean([s.facts["chance"] for s in samples]), abs=0.03)
