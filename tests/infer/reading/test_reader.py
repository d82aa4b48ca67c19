"""Answers to many requests are those to each alone, whatever is shared, batched, cut or ordered."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import Live
from plain_reader import WORDS, Letters, plainly
from small import PATTERNS, small_model

from hinny.errors import ConfigError, RequestError
from hinny.infer.reading import answers, batch, walk
from hinny.infer.reading import reader as readers
from hinny.infer.reading.reader import ModelReader
from hinny.infer.reading.requests import Generate, Generated, Score, Scored, Usage
from hinny.infer.reading.sizes import free_bytes, row_size
from hinny.infer.reading.trie import Request
from hinny.model import Model
from hinny.state import State

VOCAB = WORDS + 3
"""Words of the model: three that no text has."""
MODELS = {pattern: small_model(pattern, vocab_size=VOCAB).requires_grad_(False) for pattern in PATTERNS}

few = st.lists(st.integers(1, 2), min_size=1, max_size=9).map(tuple)
scores = st.builds(Score, few, few)
prompts = st.builds(Generate, few, st.integers(1, 6), st.sampled_from([(), ("a",), ("bc", "d")]))
limits = st.fixed_dictionaries(dict(budget=st.sampled_from([1, 20_000, 10**9]), tokens=st.sampled_from([1, 7, 1000]),
                                    piece=st.sampled_from([1, 3, 1000])))


def reader(model: Model, **limits: int) -> ModelReader:
    return ModelReader(model, Letters(), **{"budget": 10**9, **limits})


def assert_equal(found: Sequence[Scored | Generated], expected: Sequence[Scored | Generated],
                 near: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Generated):
            assert mine == theirs
            continue
        assert isinstance(mine, Scored)
        assert mine.log_probabilities.dtype == np.float64
        np.testing.assert_allclose(mine.log_probabilities, theirs.log_probabilities, rtol=0, atol=near)
        assert mine.likeliest.tolist() == theirs.likeliest.tolist()
        assert mine.greedy == theirs.greedy


@pytest.mark.parametrize("pattern", PATTERNS)
@given(st.lists(scores | prompts, min_size=1, max_size=8), limits)
@settings(max_examples=12, deadline=None)
def test_an_answer_depends_on_its_request_alone(pattern: str, requests: list[Request], limits: dict[str, int]) -> None:
    """Two words make many shared prefixes, prompts within prompts, and continuations within contexts."""
    found = reader(MODELS[pattern], **limits).answer(requests)
    assert_equal(found, plainly(MODELS[pattern], requests))


def of_many_lengths(n: int, longest: int, seed: int = 0) -> list[Request]:
    """Scores, prompts and prompts with choices, of 1 to `longest` tokens, after some of ten beginnings."""
    draw = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, WORDS) for _ in range(draw.randint(1, most)))

    heads, requests = [tokens(longest) for _ in range(10)], []
    for _ in range(n):
        context = draw.choice(heads) + tokens(longest)
        requests += [Score(context, tokens(6)) for _ in range(draw.randrange(3))]
        requests += [Generate(context, draw.randint(1, 8), ("ab",)) for _ in range(draw.randrange(2))]
    return requests


@pytest.mark.parametrize("pattern", PATTERNS)
def test_order_and_batches_do_not_matter(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # long nodes are read alone: here those from 32 tokens on
    for module in (batch, walk):
        monkeypatch.setattr(module, "ALONE", 32)
    monkeypatch.setattr(batch, "MASK", 2000)
    requests = of_many_lengths(16, 45)
    expected = plainly(MODELS[pattern], requests)
    assert_equal(reader(MODELS[pattern]).answer(requests), expected)
    order = list(range(len(requests)))
    random.Random(1).shuffle(order)
    small = reader(MODELS[pattern], budget=60_000, tokens=64, piece=24)
    assert_equal(small.answer([requests[i] for i in order]), [expected[i] for i in order])


def test_masks_of_rows_at_different_positions_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention makes a mask of queries times keys for such rows: few go together, and none with long pieces."""
    for module in (batch, walk):
        monkeypatch.setattr(module, "ALONE", 32)
    monkeypatch.setattr(batch, "MASK", 2000)
    model, unequal = MODELS["M-M*-"], []
    hidden = model.hidden

    def watched(tokens: torch.Tensor, *state: State) -> torch.Tensor:
        places = state[0].positions if state and state[0] is not None else torch.zeros(len(tokens))
        if len(places.unique()) > 1:
            unequal.append((*tokens.shape, int(places.max()) + tokens.shape[1]))
        return hidden(tokens, *state)

    monkeypatch.setattr(model, "hidden", watched)
    requests = [r for r in of_many_lengths(60, 70) if isinstance(r, Score)]
    requests += [Score(r.context, words(50, 5)) for r in requests]
    reader(model).score(requests)
    assert len(unequal) > 10
    for rows, length, keys in unequal:
        assert length < 32
        assert rows * length * keys <= 2000


@pytest.mark.parametrize("pattern", ["M-M*-", "1*M-"])
def test_in_float32_the_log_probabilities_are_near(pattern: str) -> None:
    model = small_model(pattern, vocab_size=VOCAB).float().requires_grad_(False)
    requests = [r for r in of_many_lengths(10, 40, seed=3) if isinstance(r, Score)]
    for found, expected in zip(reader(model, tokens=100).score(requests), plainly(model, requests), strict=True):
        np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, rtol=0, atol=1e-3)


def words(n: int, seed: int) -> tuple[int, ...]:
    """n words; of 36 seeds in a row, each has another first one."""
    draw = random.Random(seed)
    return (1 + seed % 36, *(draw.randrange(1, WORDS) for _ in range(n - 1)))


def forwards(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[int]:
    """Token positions of each forward pass of `model` from now on."""
    seen, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: seen.append(tokens.numel()) or hidden(tokens, *rest))
    return seen


def test_choices_of_a_long_context_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 documents of 300 tokens, each with 4 choices of 2 to 5 tokens that begin differently."""
    seen = forwards(monkeypatch, model := MODELS["M-M*-"])
    requests = [Score(words(300, d), (1 + c, *words(1 + c, d + c))) for d in range(4) for c in range(4)]
    assert_equal((mine := reader(model)).score(requests), plainly(model, requests))
    usage, plain = mine.usage, len(requests)
    assert usage.asked == 16 * 300 + 4 * (2 + 3 + 4 + 5)
    assert usage.prefilled == 4 * 300 + 4 * (1 + 2 + 3 + 4)
    # the choices of all documents are one batch, padded to 4 tokens: for each document 3 + 2 + 1 + 0 too many
    assert usage.padded == 4 * 6
    assert sum(seen[:-plain]) == usage.prefilled + usage.padded
    # 300 is 256 + 32 + 8 + 4
    assert len(seen[:-plain]) == 5


def test_a_letter_behind_a_question_reads_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 heads of examples, 6 questions each, 4 choices of one token: the contexts alone are read."""
    seen = forwards(monkeypatch, model := MODELS["1*M-"])
    questions = [(*words(80, h), 1 + q, *words(20, 100 * h + q)) for h in range(5) for q in range(6)]
    requests = [Score(question, (letter,)) for question in questions for letter in range(1, 5)]
    assert_equal((mine := reader(model)).score(requests), plainly(model, requests))
    assert mine.usage.asked == 5 * 6 * 4 * (80 + 21 + 1)
    assert mine.usage.prefilled == 5 * 80 + 5 * 6 * 21
    assert mine.usage.padded == 0
    # 80 is 64 + 16, then the questions
    assert seen[:3] == [5 * 64, 5 * 16, 30 * 21]


def test_a_text_and_a_score_behind_one_prompt_read_it_once() -> None:
    model, prompt = MODELS["M-M*-"], words(90, 0)
    requests: list[Request] = [Generate(prompt, 5), Score(prompt, words(4, 1)), Generate(prompt, 3),
                               Generate(prompt, 1), Score(prompt, (7,))]
    assert_equal((mine := reader(model)).answer(requests), plainly(model, requests))
    assert mine.usage.prefilled == 90 + 3
    # the longer text holds the shorter one
    assert mine.usage.decoded == len(plainly(model, requests[:1])[0].tokens)


def test_a_text_of_one_token_keeps_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = forwards(monkeypatch, model := MODELS["M"])
    requests = [Generate(words(70, i), 1) for i in (0, 1, 2, 2)]
    found = (mine := reader(model)).generate(requests)
    assert seen == [3 * 70]
    assert mine.usage == Usage(asked=4 * 70, prefilled=3 * 70, decoded=3)
    assert_equal(found, plainly(model, requests))


def test_prompts_join_while_others_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a few rows: groups are stopped when half have ended, and go on with new ones."""
    model, rests, write = MODELS["1*M-"], [], walk.write
    monkeypatch.setattr(walk, "write", lambda *given: rests.append(rest := write(*given)) or rest)
    requests = [Generate(words(5 + i, i), 1 + 3 * (i % 5)) for i in range(20)]
    expected = plainly(model, requests)
    mine, seen = reader(model, budget=8 * reader_row(model, 40)), forwards(monkeypatch, model)
    assert_equal(mine.generate(requests), expected)
    assert mine.usage.decoded == sum(len(answer.tokens) for answer in expected)
    assert mine.usage.prefilled == sum(len(request.prompt) for request in requests)
    # the first token of each is told by its prompt
    assert sum(seen) == mine.usage.prefilled + mine.usage.padded + mine.usage.decoded - len(requests)
    assert mine.usage.padded > 0
    assert sum(rest is not None for rest in rests) >= 2
    assert rests[-1] is None


def reader_row(model: Model, tokens: int) -> int:
    state = model.init_state(1)
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.int64), state)
    return state.bytes()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_size_of_a_row_is_that_of_its_state(pattern: str) -> None:
    assert row_size(MODELS[pattern]).at(40) == reader_row(MODELS[pattern], 40)


@pytest.mark.parametrize("rows", [12, 40, 1000])
def test_states_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """32 contexts with 4 choices, and as many prompts: their states are not held all at once."""
    model, made, held = MODELS["M-M*-"], [], []
    hidden, init = model.hidden, State.__init__

    def watched(tokens: torch.Tensor, *state: State) -> torch.Tensor:
        result = hidden(tokens, *state)
        held.append(sum(found.bytes() for reference in made if (found := reference())))
        return result

    monkeypatch.setattr(State, "__init__", lambda self, *args: made.append(weakref.ref(self)) or init(self, *args))
    monkeypatch.setattr(model, "hidden", watched)
    requests: list[Request] = [Score(words(30, d), words(9, 9 * d + c)) for d in range(32) for c in range(4)]
    requests += [Generate(words(30, d), 10) for d in range(32)]
    budget = rows * reader_row(model, 40)
    held.clear()
    reader(model, budget=budget).answer(requests)
    assert max(held) <= budget
    # and it is made use of
    assert max(held) > min(budget, 64 * reader_row(model, 30)) / 3


def test_a_long_score_never_holds_vocabulary_times_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("M", vocab_size=5000).requires_grad_(False)
    monkeypatch.setattr(answers, "LOGITS", 64 * 5000)
    text = words(3000, 0)
    with Live() as live:
        found, = reader(model, piece=256).score([Score(text[:1], text[1:])])
    # in float64; a copy, and what a softmax needs
    assert live.peak < 4 * 64 * 5000 * 8 < 3000 * 5000 * 8 / 10
    whole = model(torch.tensor([text]))[0].log_softmax(-1)
    expected = whole[torch.arange(2999), torch.tensor(text[1:])]
    np.testing.assert_allclose(found.log_probabilities, expected.numpy(), rtol=0, atol=1e-9)


def test_a_padded_vocabulary_has_its_share_and_is_never_likeliest() -> None:
    model = small_model("M", vocab_size=VOCAB).requires_grad_(False)
    model.output_weight[WORDS:] = 30 * model.output_weight[:1]
    requests: list[Request] = [Score(words(9, i), words(5, 50 + i)) for i in range(5)]
    requests += [Generate(words(9, i), 6) for i in range(5)]
    expected = plainly(model, requests)
    logits = model(torch.tensor([words(9, 0)]))[0]
    assert (logits.argmax(-1) >= WORDS).any()
    assert_equal(reader(model).answer(requests), expected)


def test_progress_counts_the_answers() -> None:
    requests = of_many_lengths(12, 20)
    told: list[tuple[int, int]] = []
    reader(MODELS["M-M*-"], tokens=50, budget=40_000).answer(requests, lambda done, of: told.append((done, of)))
    assert told == sorted(told)
    assert told[-1] == (len(requests), len(requests))
    assert len({done for done, _ in told}) > 3


def test_no_requests_have_no_answers() -> None:
    assert reader(MODELS["M"]).score([]) == []


@pytest.mark.parametrize("wrong", [WORDS, -1, 2**40])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_token_that_is_no_word_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, wrong: int,
                                                                     place: int) -> None:
    seen = forwards(monkeypatch, MODELS["M"])
    requests: list[Request] = [Score((1,), (2,)), Score((1, wrong), (2,)), Score((1,), (wrong,)), Generate((wrong,), 1)]
    with pytest.raises(RequestError, match=rf"request 1: token {wrong} .* 0 to {WORDS - 1}"):
        reader(MODELS["M"]).answer([requests[0], requests[1 + place]])
    assert not seen


@pytest.mark.parametrize("name", ["budget", "tokens", "piece"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be 1 or more"):
        reader(MODELS["M"], **{name: 0})


def test_without_a_budget_the_free_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(readers, "free_bytes", lambda device: asked.append(device) or free_bytes(device))
    ModelReader(MODELS["M"], Letters()).score([Score((1,), (2,))])
    assert asked == [torch.device("cpu")]
    assert 2**20 < free_bytes(asked[0]) < 2**50
