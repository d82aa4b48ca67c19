"""The text of tokens as they are written one by one, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from hinny.tokenizer import Tokenizer

FRONT = 16
"""Tokens decoded in front of new ones: some tokenizers drop a leading space, and a character may be several tokens."""


class Text:
    """The text behind a prompt, a token longer at a time; asking for it each time decodes a few tokens, not all."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._known = self._fixed = ""
        self._front = [t for t in prompt[-4 * FRONT:] if t != tokenizer.eod][-FRONT:]
        self._before = len(tokenizer.decode(self._front))
        self._new: list[int] = []
        self._read = 0

    def append(self, token: int) -> None:
        """One more token, not eod."""
        self._new.append(token)

    @property
    def text(self) -> str:
        """Of all tokens so far; an unfinished character is "\ufffd"."""
        if self._read < len(self._new):
            self._known = self._fixed + self.tokenizer.decode([*self._front, *self._new])[self._before:]
            self._read = len(self._new)
            if self._read >= 2 * FRONT and not self._known.endswith("\ufffd"):
                self._fixed, self._front, self._new, self._read = self._known, self._new[-FRONT:], [], 0
                self._before = len(self.tokenizer.decode(self._front))
        return self._known


def certain(text: str, stop: tuple[str, ...]) -> str:
    """`text` without an unfinished character, and without an end that may be the start of a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
    return text[:len(text) - held]
