"""The core: what a request costs, what the prefix cache spares, and that ends of all kinds free what they held."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from fake_runner import FakeRunner

from hinny.checkpoint.ranks import RankFailure
from hinny.errors import RequestError
from hinny.infer.core import Core
from hinny.infer.limits import Limits
from hinny.infer.parts import Part
from hinny.infer.request import Delivery, Request
from hinny.infer.sampling import Sampling
from hinny.tokenizer import ByteTokenizer

LONG = tuple(i * 7 % 256 for i in range(40))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _core(recurrent: bool = True, *, slots: int = 12, pages: int = 60, sequences: int = 4, drafts: int = 0,
          snapshots: int | None = None, step_tokens: int = 64) -> Core:
    limits = Limits(sequences=sequences, context=200, step_tokens=step_tokens, page=8, drafts=drafts,
                    snapshots=snapshots)
    return Core(FakeRunner(slots, pages, recurrent=recurrent), ByteTokenizer(), limits, slots=slots, pages=pages,
                recurrent=recurrent, slot_bytes=100, page_bytes=10, worth=8)


def _answers(core: Core) -> dict[tuple[int, int], list[Delivery]]:
    found: dict[tuple[int, int], list[Delivery]] = {}
    while core.busy:
        for piece in core.step():
            found.setdefault((piece.request, piece.index), []).append(piece)
    return found


def _tokens(pieces: list[Delivery]) -> list[int]:
    return [choice.token for piece in pieces for choice in piece.choices]


def _run(core: Core, request: Request) -> tuple[list[int], int]:
    """→ tokens and how many of the prompt were cached."""
    number = core.add(request)
    pieces = _answers(core)[number, 0]
    return _tokens(pieces), pieces[-1].cached


def _greedy(prompt: tuple[int, ...], n: int, recurrent: bool = True) -> list[int]:
    """The model's likeliest tokens, one pass over the whole text for each."""
    tokens = list(prompt)
    for _ in range(n):
        runner = FakeRunner(1, 30, recurrent=recurrent)
        runner.clear_slot(0)
        tokens.append(int(runner.run([Part(0, range(30), 0, tokens)]).argmax()))
    return tokens[len(prompt):]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("drafts", [0, 3])
def test_greedy_answers_are_the_likeliest_tokens(recurrent: bool, drafts: int) -> None:
    core = _core(recurrent, drafts=drafts)
    assert _run(core, Request(LONG, 30, ignore_eod=True))[0] == _greedy(LONG, 30, recurrent)
    assert (core.stats().accepted > 0) == (drafts > 0)


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_same_prompt_again_is_read_but_for_its_last_token(recurrent: bool) -> None:
    core = _core(recurrent)
    first, second = (_run(core, Request(LONG, 10)) for _ in range(2))
    assert first == (second[0], 0)
    assert second[1] == len(LONG) - 1
    assert core.stats().hit_rate == pytest.approx((len(LONG) - 1) / (2 * len(LONG)))


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_next_turn_of_a_chat_begins_where_the_answer_ended(recurrent: bool) -> None:
    core = _core(recurrent)
    answer, _ = _run(core, Request(LONG, 10, ignore_eod=True))
    longer = (*LONG, *answer, 1, 2, 3)
    copies = core.runner.counts["slot copies"]  # type: ignore[attr-defined]
    found, cached = _run(core, Request(longer, 10, ignore_eod=True))
    assert cached == len(LONG) + 9, "all but the last token of the answer, which was not read"
    assert found == _greedy(longer, 10, recurrent)
    assert core.runner.counts["slot copies"] - copies == recurrent  # type: ignore[attr-defined]


def test_the_third_prompt_with_the_same_beginning_hits() -> None:
    core = _core()
    cached = [_run(core, Request((*LONG[:20], *[200 + n] * 15), 2))[1] for n in range(3)]
    assert cached == [0, 0, 20]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(("same", "step_tokens"), [(30, 64), (30, 16), (40, 64), (39, 24)])
def test_of_prompts_that_come_together_a_common_beginning_is_read_once(
        recurrent: bool, same: int, step_tokens: int) -> None:
    core = _core(recurrent, sequences=5, slots=20, step_tokens=step_tokens)
    prompts = [LONG[:same] + tuple(range(100 + n, 140 + n - same)) for n in range(5)]
    numbers = [core.add(Request(prompt, 8, ignore_eod=True)) for prompt in prompts]
    found = _answers(core)
    known = min(same, len(LONG) - 1)
    assert [found[number, 0][-1].cached for number in numbers] == [0, *[known] * 4]
    assert core.stats().read == len(LONG) + 4 * (len(LONG) - known)
    assert [_tokens(found[n, 0]) for n in numbers] == [_greedy(prompt, 8, recurrent) for prompt in prompts]


def test_who_waits_for_anothers_reading_lets_the_next_one_pass() -> None:
    core = _core(step_tokens=30)
    first, second = (core.add(Request((*LONG, n), 3, ignore_eod=True)) for n in range(2))
    other = core.add(Request((1, 2, 3), 3, ignore_eod=True))
    core.step()
    assert [piece.request for piece in core.step()] == [other]
    assert (core.stats().running, core.stats().waiting) == (2, 1)
    assert {piece.request for piece in core.step()} == {first, second, other}


def test_who_waits_for_a_reader_that_goes_reads_for_itself() -> None:
    core = _core(step_tokens=20)
    first, second = (core.add(Request((*LONG, n), 3, ignore_eod=True)) for n in range(2))
    core.step()
    core.cancel(first)
    found = _answers(core)
    assert _tokens(found[second, 0]) == _greedy((*LONG, 1), 3)
    assert found[second, 0][-1].cached == 20, "what the one that has gone had read"


def test_without_snapshots_nothing_is_kept() -> None:
    core = _core(snapshots=0)
    assert [_run(core, Request(LONG, 5))[1] for _ in range(2)] == [0, 0]
    assert (core.stats().pages_used, core.stats().bytes_used) == (0, 0)


def test_a_prompt_is_read_once_for_all_its_continuations() -> None:
    core = _core(snapshots=0)
    sampling = Sampling(temperature=1.0, seed=3)
    core.add(Request(LONG, 10, sampling, n=3, ignore_eod=True))
    found = _answers(core)
    assert core.stats().read == len(LONG)
    texts = [_tokens(found[0, index]) for index in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    one_by_one = _core(sequences=1, snapshots=0)
    one_by_one.add(Request(LONG, 10, sampling, n=3, ignore_eod=True))
    again = _answers(one_by_one)
    assert one_by_one.stats().read == 3 * len(LONG), "who finds no place reads the prompt when there is one"
    assert [_tokens(again[0, index]) for index in range(3)] == texts


@pytest.mark.parametrize("snapshots", [0, None])
def test_a_prompt_that_is_preempted_while_it_is_read_counts_once(snapshots: int | None) -> None:
    core = _core(pages=8, sequences=2, step_tokens=3, snapshots=snapshots)
    core.add(Request(LONG[:9], 40, ignore_eod=True))
    while core.stats().read < 9:
        core.step()
    again = core.add(Request(LONG[5:], 4, ignore_eod=True))
    while not core.stats().preemptions:
        assert core.busy
        core.step()
    assert core.stats().waiting == 1, "the second one, some tokens of which had been read"
    assert 9 < core.stats().read < 9 + 35
    found = _answers(core)
    assert _tokens(found[again, 0]) == _greedy(LONG[5:], 4)
    stats = core.stats()
    assert (stats.prompts, stats.prompt_tokens) == (2, 9 + 35)
    assert (stats.hits, stats.cached, found[again, 0][-1].cached) == (0, 0, 0), "nothing was there when it was begun"
    assert stats.read > 9 + 35, "what was read again is counted here"


def test_a_prompt_counts_once_for_all_its_continuations() -> None:
    core = _core(sequences=1)
    number = core.add(Request(LONG, 5, n=3, ignore_eod=True))
    found = _answers(core)
    stats = core.stats()
    assert stats.read > len(LONG), "there was no room for the second and the third when the prompt had been read"
    assert (stats.prompts, stats.prompt_tokens, stats.hits, stats.cached) == (1, len(LONG), 0, 0)
    assert [found[number, index][-1].cached for index in range(3)] == [0, 0, 0]


def test_a_cancelled_request_frees_its_memory_and_says_so() -> None:
    core = _core(snapshots=0)
    stays, goes = (core.add(Request(LONG, 20, n=n, ignore_eod=True)) for n in (1, 3))
    core.cancel(goes)
    core.step()
    core.step()
    late = core.add(Request(LONG, 5, n=3))
    core.step()
    core.cancel(late)
    core.cancel(late)
    assert core.stats().running == 1
    found = _answers(core)
    assert [found[late, i][-1].ended for i in range(3)] == ["cancelled"] * 3
    assert _tokens(found[stays, 0])[-1:] == _greedy(LONG, 20)[-1:]
    assert core.stats().slots_used == 0
    assert not core.busy


def test_a_pass_that_fails_ends_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    core = _core(sequences=2)
    numbers = [core.add(Request(LONG[n:], 10, n=1 + n, ignore_eod=True)) for n in range(3)]
    core.runner.failures.add(0)  # type: ignore[attr-defined]
    with caplog.at_level(logging.ERROR):
        found = _answers(core)
    assert "the machine is on fire" in caplog.text
    for number, index in [(numbers[0], 0), (numbers[1], 0), (numbers[1], 1)]:
        last = found[number, index][-1]
        assert (last.ended, last.message) == ("failed", "RuntimeError: the machine is on fire")
    assert _tokens(found[numbers[2], 0]) == _greedy(LONG[2:], 10)
    core.forget()
    assert (core.stats().pages_used, core.stats().slots_used) == (0, 0)


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_copy_that_fails_costs_no_request_more_than_reading(
        recurrent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    core = _core(recurrent, slots=20, sequences=6, drafts=3)

    def fail(source: int, target: int) -> None:
        raise torch.OutOfMemoryError("no room for a copy")

    first = _run(core, Request(LONG[:30], 5, ignore_eod=True))[0]
    for name in ("copy_slot", "copy_page"):
        monkeypatch.setattr(core.runner, name, fail)
    prompts = [LONG[:30], *((*LONG[:36], 100 + n) for n in range(3))]
    # of a snapshot to a sequence, of a sequence to a snapshot, to a spare state, to another continuation
    numbers = [core.add(Request(prompt, 12, n=1 + i % 2, ignore_eod=True)) for i, prompt in enumerate(prompts)]
    found = _answers(core)
    assert first == _greedy(LONG[:30], 5, recurrent)
    for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        for index in range(1 + i % 2):
            assert _tokens(found[number, index]) == _greedy(prompt, 12, recurrent)
            assert found[number, index][-1].ended == "length"
    assert core.stats().failed_copies > 3
    assert [record.levelname for record in caplog.records] == ["WARNING"], "told once"
    assert "no room for a copy" in caplog.text
    core.forget()
    assert (core.stats().pages_used, core.stats().slots_used) == (0, 0)


def test_a_copy_behind_which_nothing_can_be_run_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    core = _core()

    def fail(source: int, target: int) -> None:
        raise RankFailure("rank 1 is gone")

    monkeypatch.setattr(core.runner, "copy_slot", fail)
    core.add(Request(LONG, 3))
    with pytest.raises(RankFailure, match="rank 1"):
        _answers(core)


def test_logits_that_are_no_numbers_fail_their_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    core = _core(snapshots=0)
    run = core.runner.run
    monkeypatch.setattr(core.runner, "run", lambda parts: run(parts).index_fill(0, torch.tensor([1]), float("nan"))
                        if len(parts) > 1 else run(parts))
    sound, bad = (core.add(Request(LONG[n:20], 6, ignore_eod=True)) for n in range(2))
    found = _answers(core)
    assert _tokens(found[sound, 0]) == _greedy(LONG[:20], 6)
    assert found[bad, 0][-1].ended == "failed"
    assert core.stats().slots_used == 0


@pytest.mark.parametrize(("prompt", "max_tokens", "says"), [
    (LONG, 161, "201 together, but the engine takes 200"), (LONG, 60, "memory holds 80"), ((1, 999), 5, "token 999"),
    ((-1,), 5, "token -1")])
def test_what_can_never_be_served_is_refused(prompt: tuple[int, ...], max_tokens: int, says: str) -> None:
    core = _core(pages=10)
    with pytest.raises(RequestError, match=says):
        core.add(Request(prompt, max_tokens))
    assert not core.busy


def test_bytes_are_those_of_rows_in_use() -> None:
    core = _core()
    core.add(Request(LONG, 5))
    core.step()
    assert (core.stats().bytes, core.stats().bytes_used) == (12 * 100 + 60 * 10, 2 * 100 + 6 * 10)
