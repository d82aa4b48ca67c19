"""Guesses of the next tokens from the text so far: what was quoted once is likely to go on as it did."""

from __future__ import annotations

from collections.abc import Sequence

GRAMS = (4, 3, 2)
"""Tokens at the end of a text that are looked for further up, the longest first. One token alone is a poor guess."""


class Lookup:
    """The tokens of one sequence, and where each run of a few tokens was last followed by another one."""

    def __init__(self, tokens: Sequence[int], eod: int | None = None) -> None:
        """`eod`: nothing is guessed behind it, for nothing is written behind it; None where something is."""
        self.eod = eod
        self.tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token; the time does not grow with the text."""
        end = len(self.tokens)
        for n in GRAMS:
            if n <= end:
                self._last[tuple(self.tokens[-n:])] = end
        self.tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the latest earlier place of the last 4, 3 or 2 tokens; [] without one.

        Where that place is so late that the text ends before `most` tokens, the guess goes round: a text that repeats
        itself goes on repeating.
        """
        for n in GRAMS:
            start = self._last.get(tuple(self.tokens[-n:])) if n <= len(self.tokens) else None
            if start is not None:
                period = len(self.tokens) - start
                guess = [self.tokens[start + i % period] for i in range(most)]
                return guess[:guess.index(self.eod) + 1] if self.eod in guess else guess
        return []
