"""The next tokens: the distribution is that of transformers' processors, a draw is its row's own, greedy is argmax."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hinny.infer.request import Choice
from hinny.infer.sampler import Chooser, LogitsError, choose
from hinny.infer.sampling import Sampling

WORDS = 40
OPTIONS = [dict(), dict(temperature=0.6), dict(temperature=3.0), dict(top_k=1), dict(top_k=7), dict(top_k=400),
           dict(top_p=0.3), dict(top_p=0.9), dict(min_p=0.2), dict(top_k=12, top_p=0.7),
           dict(temperature=2.0, top_k=20, top_p=0.95, min_p=0.1), dict(repetition_penalty=1.4),
           dict(repetition_penalty=0.7, top_p=0.8), dict(presence_penalty=0.8, frequency_penalty=0.3),
           dict(repetition_penalty=1.3, presence_penalty=-1.0, frequency_penalty=0.5, top_k=10, min_p=0.05)]


def fixed(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def chooser(prompt: list[int] = (), written: list[int] = (), index: int = 0, **options: object) -> Chooser:
    made = Chooser(Sampling(**options), prompt, index)
    for token in written:
        made.written(token)
    return made


def chances(logits: Tensor, prompt: list[int], written: list[int], temperature: float = 1.0, top_k: int | None = None,
            top_p: float | None = None, min_p: float | None = None, presence_penalty: float = 0.0,
            frequency_penalty: float = 0.0, repetition_penalty: float = 1.0) -> Tensor:
    """Float64 (v): what transformers makes of logits (v), with OpenAI's formula for the two penalties it lacks."""
    ids, scores = torch.tensor([[*prompt, *written]]), logits.double()[None]
    if repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, scores)
    for token in set(written):
        scores[0, token] -= presence_penalty + frequency_penalty * written.count(token)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    for warper, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)):
        if value is not None:
            scores = warper(value)(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_draw_inverts_the_distribution_of_transformers(options: dict) -> None:
    prompt, written = [3, 5, 5, 9, 30], [1, 5, 1, 1, 22]
    own = {"temperature": 1.0} | options
    choosers = [chooser(prompt, written, index=i, seed=8, **own) for i in range(64)]
    for case in range(5):
        logits = fixed(case, WORDS)
        sums = chances(logits, prompt, written, **own).cumsum(0)
        wanted = [int(torch.searchsorted(sums, each.draw * sums[-1], right=True)) for each in choosers]
        found = choose(logits.expand(64, -1), choosers, [None] * 64)
        assert [choice.token for choice in found] == wanted


def test_many_draws_have_the_shares_of_the_distribution() -> None:
    logits = fixed(3, WORDS)
    n, counts = 20_000, torch.zeros(WORDS, dtype=torch.float64)
    rows = [chooser(seed=1, temperature=0.8, top_p=0.9, index=i) for i in range(n)]
    for start in range(0, n, 1000):
        part = rows[start:start + 1000]
        for choice in choose(logits.expand(1000, -1), part, [None] * 1000):
            counts[choice.token] += 1
    expected = chances(logits, [], [], 0.8, top_p=0.9) * n
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # chi-square: its mean is the degrees of freedom, its deviation sqrt(2 of them); the seed is fixed
    chi, freedom = ((counts - expected)[kept] ** 2 / expected[kept]).sum(), int(kept.sum()) - 1
    assert freedom > 5
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


def mixed(n: int) -> list[Chooser]:
    draw = random.Random(4)
    rows = []
    for i in range(n):
        options = {"temperature": 0.9, "seed": i} | OPTIONS[i % len(OPTIONS)] if i % 4 else {}
        if i % 8 == 4:
            options = dict(repetition_penalty=1.5)
        text = [draw.randrange(WORDS) for _ in range(12)]
        rows.append(chooser(text, text[:6], **options))
    return rows


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    rows = mixed(32)
    for case in range(100):
        logits = fixed(case, 32, WORDS)
        together = choose(logits, rows, [i % 3 or None for i in range(32)])
        alone = [choose(logits[i:i + 1], [row], [i % 3 or None])[0] for i, row in enumerate(rows)]
        assert [c.token for c in together] == [c.token for c in alone]
        for row, choice in zip(rows, together, strict=True):
            row.written(choice.token)


def test_rows_in_several_lots_draw_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, logits = mixed(32), fixed(1, 32, WORDS)
    whole = choose(logits, rows, [2] * 32)
    monkeypatch.setattr("hinny.infer.sampler.AT_ONCE", 3 * WORDS)
    assert choose(logits, rows, [2] * 32) == whole


def test_greedy_takes_the_lowest_of_the_likeliest_whatever_the_others_do() -> None:
    logits = fixed(2, 4, WORDS).round()
    logits[:, [7, 19]] = 9.0
    rows = [chooser(), chooser(temperature=1.0, seed=1), chooser(), chooser(repetition_penalty=2.0)]
    assert [c.token for c in choose(logits[:1], rows[:1], [None])] == [7]
    assert [c.token for c in choose(logits, rows, [None] * 4)][::2] == [7, 7]
    # penalties without a temperature stay greedy
    assert choose(logits[3:], [chooser([7], repetition_penalty=2.0)], [None])[0].token == 19
    assert choose(logits[3:], [chooser([], [7], frequency_penalty=0.1)], [None])[0].token == 19
    assert choose(logits[3:], [chooser([7], [], presence_penalty=2.0)], [None])[0].token == 7


def test_logits_and_choosers_stay_as_they_were() -> None:
    rows, logits = mixed(16), fixed(5, 16, WORDS)
    before, draws = logits.clone(), [row.draw for row in rows]
    first = choose(logits, rows, [None] * 16)
    assert torch.equal(logits, before)
    assert draws == [row.draw for row in rows]
    assert choose(logits, rows, [None] * 16) == first


def test_a_seed_gives_each_continuation_and_token_numbers_of_its_own() -> None:
    def numbers(seed: int | None, index: int) -> list[float]:
        one = chooser(index=index, temperature=1.0, seed=seed)
        return [(one.draw, one.written(0))[0] for _ in range(50)]

    assert numbers(5, 0) == numbers(5, 0)
    streams = [numbers(5, 0), numbers(5, 1), numbers(6, 0), numbers(None, 0), numbers(None, 0)]
    assert len({number for stream in streams for number in stream}) == 250
    assert all(0 <= number < 1 for stream in streams for number in stream)


def test_logprobs_are_those_of_the_raw_logits_and_ties_go_by_id() -> None:
    logits = fixed(7, 3, WORDS)
    logits[1] = torch.tensor([0.0, -0.0] * (WORDS // 2))
    logits[2, 5:] = float("-inf")
    rows = [chooser([1], [2], temperature=3.0, seed=1, repetition_penalty=1.5), chooser(), chooser()]
    found = choose(logits, rows, [20, 3, 0])
    for row, choice in zip(logits, found, strict=True):
        assert choice.logprob == pytest.approx(float(row.double().log_softmax(0)[choice.token]), abs=1e-12)
    order = sorted(range(WORDS), key=lambda t: (-float(logits[0, t]), t))[:20]
    assert [t for t, _ in found[0].top] == order
    assert [p for _, p in found[0].top] == pytest.approx(logits[0].double().log_softmax(0)[order].tolist(), abs=1e-12)
    assert [t for t, _ in found[1].top] == [0, 1, 2]
    assert (found[2].top, found[2].logprob is None) == ((), False)
    assert choose(logits, rows, [None] * 3) == [Choice(c.token) for c in found]
    # more of them than there are tokens
    assert len(choose(logits[:1, :5], [chooser()], [20])[0].top) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, top_k=3, top_p=0.5)])
def test_logits_that_are_not_finite_are_refused_by_row(bad: float, options: dict) -> None:
    logits = fixed(8, 4, WORDS)
    logits[1, 5], logits[3] = bad, float("-inf")
    rows = [chooser(**options) for _ in range(4)]
    with pytest.raises(LogitsError, match="row 1, 3") as fault:
        choose(logits, rows, [None, 2, None, None])
    assert fault.value.rows == (1, 3)
    # the others are as they were
    assert len(choose(logits[::2], rows[::2], [None, None])) == 2


def test_tokens_without_a_chance_are_not_drawn() -> None:
    logits = torch.full((1, WORDS), float("-inf"))
    logits[0, 9], logits[0, 30] = 0.0, -1e4
    for i in range(200):
        assert choose(logits, [chooser(index=i, temperature=1.0, seed=1)], [None])[0].token == 9
    hot = [chooser(index=i, temperature=100.0, seed=1) for i in range(50)]
    logits[0, 30] = -1.0
    assert {c.token for c in choose(logits.expand(50, -1), hot, [None] * 50)} == {9, 30}


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.5 - 2 ** -53, 1), (0.5, 2), (1 - 2 ** -53, 2)])
def test_a_draw_on_a_border_takes_a_token_with_a_chance(monkeypatch: pytest.MonkeyPatch, draw: float,
                                                        token: int) -> None:
    monkeypatch.setattr(Chooser, "draw", draw)
    never = float("-inf")
    assert choose(torch.tensor([[never, 1.0, 1.0, never]]), [chooser(temperature=1.0)], [None])[0].token == token


def test_the_largest_draw_takes_the_last_token_with_a_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chooser, "draw", 1 - 2 ** -53)
    logits = fixed(10, 2000, WORDS)
    logits[:, -3:] = float("-inf")
    found = choose(logits, [chooser(temperature=0.3 + i / 500) for i in range(2000)], [None] * 2000)
    assert {choice.token for choice in found} <= set(range(WORDS - 3))


def test_a_prompt_may_hold_tokens_that_have_no_logit() -> None:
    assert choose(fixed(9, 1, WORDS), [chooser([WORDS, 99], repetition_penalty=9.0)], [None])[0].token == int(
        fixed(9, 1, WORDS).argmax())


def test_no_rows_need_no_device() -> None:
    assert choose(torch.empty(0, WORDS), [], []) == []
