"""The text of tokens as they are written one by one, and where it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hinny.errors import RequestError
from hinny.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FRONT = 16
"""Tokens decoded in front of new ones: some tokenizers drop a leading space, and a character may be several tokens."""

MARK = "\ufffd"
"""What is decoded for bytes that are no character, perhaps not yet."""

MOST = 16 * FRONT
"""Tokens of which nothing but marks is waited for: a tokenizer may write marks for a whole run of bytes until it is
complete. Past them the marks stay, so that nonsense is not decoded again and again."""


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text that somebody sent. RequestError, and a word in the log, if the tokenizer fails on them."""
    try:
        return tokenizer.encode_many(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    # a panic of the `tokenizers` library is no Exception
    except BaseException as fault:
        logger.warning("the tokenizer cannot read a text", exc_info=fault)
        raise RequestError(f"the model's tokenizer cannot read this text ({type(fault).__name__}: {fault}). Leave out "
                           "what it does not know, or send token ids.") from None


class Text:
    """The text behind a prompt, a token longer at a time; asking for it each time decodes a few tokens, not all."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._fixed = self._rest = ""
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
        self._look()
        return self._fixed + self._rest

    @property
    def fixed(self) -> int:
        """Characters in front that no later token changes."""
        self._look()
        return len(self._fixed)

    def behind(self, start: int) -> str:
        """The text without its first `start` characters; its cost is that of what is left."""
        self._look()
        fixed = len(self._fixed)
        return self._fixed[start:] + self._rest if start < fixed else self._rest[start - fixed:]

    def _look(self) -> None:
        """Decode what came since the last look, with a few tokens in front."""
        if self._read == len(self._new):
            return
        self._rest = self.tokenizer.decode([*self._front, *self._new])[self._before:]
        self._read = len(self._new)
        if self._read >= MOST or (self._read >= 2 * FRONT and not self._rest.endswith(MARK)):
            self._front, self._new, self._read = self._new[-FRONT:], [], 0
            front = self.tokenizer.decode(self._front)
            # of many marks in a row only the last can become a character, of which some tokenizers write three
            open_ = min(_marks(self._rest), _marks(front), 3)
            end = len(self._rest) - open_
            self._fixed, self._rest = self._fixed + self._rest[:end], self._rest[end:]
            self._before = len(front) - open_


def _marks(text: str) -> int:
    """At the end of `text`."""
    return len(text) - len(text.rstrip(MARK))


def certain(text: str, stop: tuple[str, ...], least: int = 0) -> str:
    """`text` without an unfinished character, and without an end that may be the start of a stop string.

    least: characters in front that are finished, even if they are "\ufffd".
    """
    text = text[:max(least, len(text.rstrip(MARK)))]
    return text[:len(text) - max((_begun(text, word) for word in stop), default=0)]


def _begun(text: str, word: str) -> int:
    """Characters at the end of `text` with which `word` begins: the most of them, but not all of `word`."""
    at = text.find(word[0], max(0, len(text) - len(word) + 1))
    while at >= 0 and not word.startswith(text[at:]):
        at = text.find(word[0], at + 1)
    return len(text) - at if at >= 0 else 0
