"""A tokenizer that raises, whatever and wherever, ends the request it raised for, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from fake_runner import FakeRunner

from hinny.errors import RequestError
from hinny.infer.core import Core
from hinny.infer.delivery import Writing
from hinny.infer.limits import Limits
from hinny.infer.mail import Answers
from hinny.infer.request import Choice, Request
from hinny.infer.text import encoded
from hinny.tokenizer import ByteTokenizer

GOOD, BAD = tuple(range(65, 85)), tuple(range(97, 117))


class Panic(BaseException):
    """As the `tokenizers` library has it, which is no Exception."""


class Broken(ByteTokenizer):
    """Cannot write one token, and cannot read what is spelt like it."""

    def __init__(self, token: int, fault: BaseException) -> None:
        super().__init__()
        self.token, self.fault = token, fault

    def encode_many(self, texts: object) -> list[list[int]]:
        raise self.fault

    def _decode(self, ids: list[int]) -> str:
        if self.token in ids:
            raise self.fault
        return super()._decode(ids)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _core(tokenizer: ByteTokenizer, drafts: int = 0) -> Core:
    limits = Limits(sequences=4, context=200, step_tokens=64, page=8, drafts=drafts)
    return Core(FakeRunner(12, 60), tokenizer, limits, slots=12, pages=60, recurrent=True, worth=8)


def _tokens(core: Core, request: Request) -> list[int]:
    number, found = core.add(request), list[int]()
    while core.busy:
        found += [choice.token for piece in core.step() if piece.request == number for choice in piece.choices]
    return found


def _check_all_is_free(core: Core) -> None:
    assert not core.busy
    core.forget()
    assert (core.stats().running, core.stats().waiting) == (0, 0)
    assert (core.stats().pages_used, core.stats().slots_used) == (0, 0)


@pytest.mark.parametrize("fault", [ValueError("no such piece"), Panic("no such piece")])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_token_that_cannot_be_written_fails_its_request_alone(
        fault: BaseException, drafts: int, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Request(GOOD, 30, ignore_eod=True), Request(BAD, 30, n=2, ignore_eod=True)
    true = _tokens(_core(ByteTokenizer()), good)
    wrong = next(token for token in _tokens(_core(ByteTokenizer()), bad)[2:] if token not in (*true, *GOOD, *BAD))
    core = _core(Broken(wrong, fault), drafts)
    numbers = core.add(good), core.add(bad)
    found, last = list[int](), {}
    with caplog.at_level(logging.ERROR):
        while core.busy:
            for piece in core.step():
                found += [choice.token for choice in piece.choices if piece.request == numbers[0]]
                last[piece.request, piece.index] = piece
    assert (found, last[numbers[0], 0].ended) == (true, "length")
    for index in range(2):
        piece = last[numbers[1], index]
        assert (piece.ended, piece.choices[-1].token) == ("failed", wrong)
        assert piece.message == f"the tokenizer cannot write token {wrong} ({type(fault).__name__}: no such piece)."
    assert "no such piece" in caplog.text
    _check_all_is_free(core)


def test_a_prompt_that_cannot_be_written_is_not_taken_on() -> None:
    core = _core(Broken(BAD[-1], ValueError("no such piece")))
    answers = Answers(core)
    with pytest.raises(ValueError, match="no such piece"):
        answers.add([Request(GOOD, 3), Request(BAD, 3, n=2)])
    core.step()
    _check_all_is_free(core)
    assert len(_tokens(core, Request(GOOD, 3, ignore_eod=True))) == 3


def test_who_interrupts_a_tokenizer_is_heard() -> None:
    one = Writing(0, Request((65,), 5), 0, Broken(70, KeyboardInterrupt()))
    one.take(Choice(66))
    with pytest.raises(KeyboardInterrupt):
        one.take(Choice(70))


@pytest.mark.parametrize("fault", [Exception("Missing [UNK] token"), Panic("Missing [UNK] token")])
def test_a_text_that_cannot_be_read_is_the_requests_fault(fault: BaseException) -> None:
    with pytest.raises(RequestError, match=r"cannot read this text \(\w+: Missing \[UNK\] token\)"):
        encoded(Broken(0, fault), ["text"])
