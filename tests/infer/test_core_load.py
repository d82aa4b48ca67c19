"""Many requests at once in far too little memory: each is answered as if it were alone, and nothing is left over."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from fake_runner import FakeRunner
from small import PATTERNS, small_model

from hinny.infer.core import Core
from hinny.infer.limits import Limits
from hinny.infer.request import Delivery, Request
from hinny.infer.runner import ModelRunner
from hinny.infer.sampling import Sampling
from hinny.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
CONTEXT = 120


@dataclass(frozen=True)
class Kind:
    """A family of models, and how it is served."""

    recurrent: bool
    pages: int
    slots: int = 9
    drafts: int = 0
    snapshots: int | None = None

    def core(self, alone: bool = False) -> Core:
        sequences, slots = 5, self.slots
        pages = 40 if alone and self.pages else self.pages
        if alone:
            sequences, slots = 4, 4
        drafts, snapshots = (0, 0) if alone else (self.drafts, self.snapshots)
        limits = Limits(sequences=sequences, context=CONTEXT, step_tokens=40, page=8, drafts=drafts,
                        snapshots=snapshots)
        runner = FakeRunner(slots, pages, recurrent=self.recurrent)
        return Core(runner, TOKENIZER, limits, slots=slots, pages=pages, recurrent=self.recurrent, worth=6)


KINDS = [Kind(True, 24), Kind(True, 24, drafts=4), Kind(True, 0, slots=12, drafts=3),
         Kind(True, 22, slots=5, snapshots=3), Kind(False, 20), Kind(False, 22, drafts=4),
         Kind(True, 30, snapshots=0, drafts=2)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small tensors take ten times as long with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _requests(seed: int, n: int) -> list[Request]:
    """Prompts that begin alike, of all lengths, with all that a request may ask for."""
    rng = random.Random(seed)
    beginnings = [tuple(rng.choices(range(256), k=rng.randint(1, 60))) for _ in range(6)]
    found: list[Request] = []
    for _ in range(n):
        if found and rng.random() < 0.15:
            prompt = rng.choice(found).prompt
        else:
            begun = rng.choice(beginnings)
            prompt = begun[:rng.randint(1, len(begun))] + tuple(rng.choices(range(256), k=rng.randint(0, 25)))
        hot = rng.random() < 0.4
        sampling = Sampling(temperature=1.0, seed=rng.randrange(99), top_k=40) if hot else Sampling()
        if rng.random() < 0.1:
            sampling = Sampling(repetition_penalty=1.3)
        stop = tuple(chr(rng.randrange(32, 120)) for _ in range(rng.choice([0, 0, 3])))
        found.append(Request(prompt, rng.randint(1, 30), sampling, stop, n=rng.choice([1, 1, 1, 2, 4]),
                             ignore_eod=rng.random() < 0.2))
    return found


def _texts(pieces: list[Delivery], n: int) -> list[tuple[str, tuple[int, ...], str | None]]:
    found = []
    for index in range(n):
        own = [piece for piece in pieces if piece.index == index]
        assert [piece.ended is None for piece in own] == [True] * (len(own) - 1) + [False], "one end, at the end"
        found.append(("".join(piece.text for piece in own), tuple(c.token for piece in own for c in piece.choices),
                      own[-1].ended))
    return found


def _alone(kind: Kind, request: Request) -> list[tuple[str, tuple[int, ...], str | None]]:
    core, pieces = kind.core(alone=True), []
    core.add(request)
    while core.busy:
        pieces += core.step()
    return _texts(pieces, request.n)


def _crowd(core: Core, requests: list[Request], cancelled: set[int] | None,
           rng: random.Random) -> tuple[dict[int, Request], dict[int, list[Delivery]]]:
    """Requests that come one by one or together, of which some are cancelled → by number they and their pieces."""
    numbers: dict[int, Request] = {}
    pieces: dict[int, list[Delivery]] = {}
    todo = list(requests)
    for _ in range(100_000):
        for _ in range(rng.choice([0, 0, 1, 4])):
            if todo:
                number = core.add(todo[0])
                numbers[number], pieces[number] = todo.pop(0), []
        if numbers and cancelled is not None and rng.random() < 0.05:
            victim = rng.choice(sorted(numbers))
            core.cancel(victim)
            cancelled.add(victim)
        for piece in core.step():
            pieces[piece.request].append(piece)
        if not todo and not core.busy:
            break
    assert not core.busy
    return numbers, pieces


def _check_all_is_free(core: Core, kind: Kind) -> None:
    stats = core.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert (stats.pages_used, stats.slots_used) == (stats.pages_cached, stats.slots_cached)
    core.forget()
    assert (core.stats().pages_used, core.stats().slots_used) == (0, 0)
    assert core.memory.pages.free == kind.pages
    assert core.memory.slots.free == kind.slots


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_crowd_is_answered_as_each_alone(kind: Kind) -> None:
    core, cancelled = kind.core(), set[int]()
    numbers, pieces = _crowd(core, _requests(KINDS.index(kind), 145), cancelled, random.Random(7))
    ended = 0
    for number, request in numbers.items():
        for found, true in zip(_texts(pieces[number], request.n), _alone(kind, request), strict=True):
            if number in cancelled and found[2] == "cancelled":
                assert true[1][:len(found[1])] == found[1]
                assert true[0].startswith(found[0])
            else:
                assert found == true
                ended += 1
    assert ended > 140
    stats = core.stats()
    assert (stats.cached > 0) == (kind.snapshots != 0)
    assert (stats.accepted > 0) == (kind.drafts > 0)
    assert stats.preemptions > 0 or not kind.pages
    _check_all_is_free(core, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_passes_and_clearings_that_fail_end_their_requests_and_nothing_else(
        kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    core, rng = kind.core(), random.Random(11)
    core.runner.failures |= set(rng.sample(range(400), 6))  # type: ignore[attr-defined]
    core.runner.copy_failures |= set(rng.sample(range(300), 8))  # type: ignore[attr-defined]
    with caplog.at_level(logging.CRITICAL):
        numbers, pieces = _crowd(core, _requests(KINDS.index(kind), 100), None, rng)
    reasons = {piece.message.split(":")[0] for own in pieces.values() for piece in own}
    # what reads a prompt anew needs a slot, cleared; every other copy can be done without
    assert reasons == {"", "RuntimeError", *(["OutOfMemoryError"] if kind.recurrent else [])}
    whole = 0
    for number, request in numbers.items():
        for found, true in zip(_texts(pieces[number], request.n), _alone(kind, request), strict=True):
            assert found == true or found[2] == "failed"
            assert true[1][:len(found[1])] == found[1]
            whole += found == true
    assert whole > 60
    assert core.stats().failed_copies > 0
    _check_all_is_free(core, kind)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_real_model_answers_a_crowd_as_its_full_forward_does(pattern: str) -> None:
    model = small_model(pattern).double().eval().requires_grad_(False)
    recurrent, pages = "M" in pattern or "1" in pattern, 30 if "*" in pattern else 0
    words = len(model.output_weight)
    requests = [Request(tuple(t % words for t in r.prompt), min(r.max_tokens, 12), n=r.n, ignore_eod=True)
                for r in _requests(3, 24)]
    limits = Limits(sequences=4, context=CONTEXT, step_tokens=30, page=8, drafts=2)
    runner = ModelRunner(model, slots=9, pages=pages, page=8)
    core = Core(runner, TOKENIZER, limits, slots=9, pages=pages, recurrent=recurrent, worth=6)
    pieces: dict[int, list[Delivery]] = {core.add(request): [] for request in requests}
    while core.busy:
        for piece in core.step():
            pieces[piece.request].append(piece)
    for request, (_, found) in zip(requests, pieces.items(), strict=True):
        for _, tokens, ended in _texts(found, request.n):
            logits = model(torch.tensor([[*request.prompt, *tokens]]))[0, len(request.prompt) - 1:-1]
            assert torch.equal(logits.argmax(-1), torch.tensor(tokens))
            assert ended == "length"
    assert core.stats().cached > 0
    core.forget()
    assert (core.stats().pages_used, core.stats().slots_used) == (0, 0)
