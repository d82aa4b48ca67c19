"""An answer of text while it is written."""

from __future__ import annotations

from hinny.infer.reading.requests import Generate, Generated
from hinny.infer.text import Text, certain
from hinny.tokenizer import Tokenizer


class Writer:
    """One `Generate` while it is answered: takes tokens until it has ended."""

    def __init__(self, request: Generate, tokenizer: Tokenizer) -> None:
        self.request, self.eod = request, tokenizer.eod
        self.tokens: list[int] = []
        self.ended: str | None = None
        self._text = Text(tokenizer, request.prompt)
        self._cut: int | None = None
        self._searched, self._told = 0, ""

    def take(self, token: int) -> bool:
        """One more token; whether the answer has ended with it. An ended one takes no more."""
        if self.ended is None:
            self.tokens.append(token)
            self.ended = self._end(token)
        return self.ended is not None

    @property
    def answer(self) -> Generated:
        """What was written, once it has ended."""
        assert self.ended is not None
        return Generated(tuple(self.tokens), self._text.text[:self._cut], self.ended)

    def _end(self, token: int) -> str | None:
        if token == self.eod:
            return "eod"
        self._text.append(token)
        if self.request.stop and (cut := self._stop()) is not None:
            self._cut = cut
            return "stop"
        if len(self.tokens) == self.request.max_tokens:
            return "length"
        if self.request.settled is not None and (sure := certain(self._text.text, self.request.stop)) != self._told:
            self._told = sure
            if self.request.settled(sure):
                return "settled"
        return None

    def _stop(self) -> int | None:
        """Where the first stop string begins, if there is one."""
        text = self._text.text
        if hits := [at for word in self.request.stop if (at := text.find(word, self._searched)) >= 0]:
            return min(hits)
        # only as much is searched again as may become part of a stop string
        self._searched = max(0, len(text.rstrip("\ufffd")) - max(map(len, self.request.stop)))
        return None
