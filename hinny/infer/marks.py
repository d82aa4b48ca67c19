"""Where two texts of tokens part, found from digests of their beginnings: each is made once, however often it is asked.

A mark stands for all tokens of a text up to the end of a block. Two texts with the same mark are taken to begin alike:
it is 16 bytes of BLAKE2b, for which nobody can make two texts, and states of one must never serve the other.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b

BLOCK = 64
"""Tokens between two marks."""


class Marks:
    """The marks of a text that only grows."""

    def __init__(self) -> None:
        self._sum, self._found = blake2b(digest_size=16), list[bytes]()

    def of(self, tokens: Sequence[int]) -> Sequence[bytes]:
        """Those of the text, which is now `tokens`: of their first block, their first two blocks, and so on."""
        for start in range(len(self._found) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            self._sum.update(array("q", tokens[start:start + BLOCK]).tobytes())
            self._found.append(self._sum.digest())
        return self._found


def alike(edge: Sequence[int], edge_marks: Sequence[bytes], tokens: Sequence[int], marks: Sequence[bytes],
          at: int = 0) -> int:
    """How many tokens of `edge` the `tokens` from `at` on begin with; of these a block at most is compared.

    edge: stands behind `at` tokens that are the first of `tokens` too; edge_marks: those of its path that lie behind
    these; marks: of `tokens`, all of them.
    """
    end = at + min(len(edge), len(tokens) - at)
    first, last = at // BLOCK, end // BLOCK
    block = bisect_left(range(first, last), True, key=lambda n: edge_marks[n - first] != marks[n]) + first
    start = max(at, block * BLOCK)
    here, there = edge[start - at:min(end, start + BLOCK) - at], tokens[start:min(end, start + BLOCK)]
    return start - at + next((n for n, (a, b) in enumerate(zip(here, there, strict=True)) if a != b), len(here))
