"""Readers in place of a model: one that knows the answers, one that says the same to everything, and their counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from oracle_phonebook import phonebook_answer
from oracle_synthetic import next_token, synthetic_answer
from oracles import ruler_answer

from hinny.infer.reading.requests import Generate, Generated, Progress, Score, Scored, Usage
from hinny.tokenizer import Tokenizer

TextAnswer = Callable[[str], str]
TokenAnswer = Callable[[Sequence[int]], int]


class TextReader:
    """Writes `text` of a prompt, says `token` of the tokens before a place, prefers the choice that `text` names."""

    def __init__(self, tokenizer: Tokenizer, text: TextAnswer, token: TokenAnswer) -> None:
        self.tokenizer, self.usage, self.text, self.token = tokenizer, Usage(), text, token
        self.calls: list[int] = []
        self.asked: list[Score | Generate] = []

    def _take(self, requests: Sequence[Score] | Sequence[Generate]) -> None:
        self.calls.append(len(requests))
        self.asked += requests

    def score(self, requests: Sequence[Score], progress: Progress | None = None) -> list[Scored]:
        self._take(requests)
        return [self._scored(request) for request in requests]

    def _scored(self, request: Score) -> Scored:
        self.usage.asked += len(request.context) + len(request.continuation)
        self.usage.prefilled += len(request.continuation)
        n = len(request.continuation)
        if len(request.context) == 1:
            whole = [*request.context, *request.continuation]
            likeliest = np.array([self.token(whole[:i]) for i in range(1, n + 1)])
            return Scored(np.full(n, -1.0), likeliest, bool((likeliest == request.continuation).all()))
        right = self.text(self.tokenizer.decode(request.context))
        said = self.tokenizer.decode(request.continuation)
        return Scored(np.full(n, -0.1 if said.strip() == right.strip() else -9.0), np.array(request.continuation), True)

    def generate(self, requests: Sequence[Generate], progress: Progress | None = None) -> list[Generated]:
        self._take(requests)
        return [self._generated(request) for request in requests]

    def _generated(self, request: Generate) -> Generated:
        text, ended = self.text(self.tokenizer.decode(request.prompt)), "eod"
        self.usage.asked += len(request.prompt)
        self.usage.prefilled += len(request.prompt)
        for stop in request.stop:
            if stop in text:
                text, ended = text.split(stop, 1)[0], "stop"
        for end in range(len(text)):
            # as soon as it is allowed to
            if ended == "eod" and request.settled is not None and request.settled(text[:end]):
                text, ended = text[:end], "settled"
        ids = tuple(self.tokenizer.encode(text))
        assert len(ids) <= request.max_tokens or ended == "settled"
        return Generated(ids, text, ended)


def oracle(task: str, tokenizer: Tokenizer) -> TextReader:
    """A reader that knows the answers of one task by the task's description."""
    if task.startswith("ruler-"):
        text: TextAnswer = ruler_answer
    elif task in ("phonebook-standard", "phonebook-reversed", "phonebook-jelassi"):
        text = phonebook_answer
    else:
        text = synthetic_answer
    return TextReader(tokenizer, text, lambda prefix: next_token(task, prefix, tokenizer))


def constant(tokenizer: Tokenizer) -> TextReader:
    """A reader that says the same to everything."""
    return TextReader(tokenizer, lambda prompt: "nothing", lambda prefix: tokenizer.eod)
