"""What of the pages is kept: English prose, once."""

from __future__ import annotations

import re
import zlib

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
COMMON = frozenset(
    """
    the of and to a in is that for it as with be by on this are or an not from which can at if will when you have
    has was but all one its their they he his we were i so no there then than been had may should would could must
    into these those such only other any each more some what who do does how also use used using see between where
    """.split()  # noqa: SIM905
)
"""Words that make a fifth to a half of every English text, and a few hundredths of a list of names."""

WINDOW = 16
_BASE, _PRIME = 1_000_003, (1 << 61) - 1
_LAST = pow(_BASE, WINDOW, _PRIME)


def is_prose(text: str, share: float) -> bool:
    """True if at least that share of the words are common English ones, and there are 30 words."""
    words = WORD.findall(text.lower())
    return len(words) >= 30 and sum(word in COMMON for word in words) >= share * len(words)


def without_tables(text: str) -> str:
    """The text without paragraphs of more than 120 characters of which less than half are letters."""
    return "\n\n".join(
        part
        for part in text.split("\n\n")
        if len(part) <= 120 or 2 * sum(map(str.isalpha, part)) >= len(part) - part.count(" ")
    )


def fingerprints(text: str, sample: int = 16) -> list[int]:
    """Hashes of windows of 16 words, those that divide by `sample`: the same windows in every document."""
    known: dict[str, int] = {}
    sums: list[int] = []
    found, rolling = [], 0
    for at, word in enumerate(WORD.findall(text.lower())):
        if word not in known:
            known[word] = zlib.crc32(word.encode()) + 1
        sums.append(known[word])
        rolling = rolling * _BASE + known[word]
        if at >= WINDOW:
            rolling -= sums[at - WINDOW] * _LAST
        rolling %= _PRIME
        if at >= WINDOW - 1 and rolling % sample == 0:
            found.append(rolling)
    return found


class Seen:
    """What the documents before held, by paragraphs and by windows of words."""

    def __init__(self) -> None:
        self._paragraphs: set[int] = set()
        self._windows: set[int] = set()

    def fresh(self, text: str, longest: float = 0.5) -> str:
        """The text without the paragraphs of 100 characters or more that came before, here or in another; "" where
        more than the share `longest` of its windows did."""
        windows = fingerprints(text)
        if len(windows) > 3 and sum(one in self._windows for one in windows) > longest * len(windows):
            return ""
        kept = []
        for part in text.split("\n\n"):
            if len(part) >= 100:
                one = " ".join(part.split()).encode()
                mark = zlib.crc32(one) << 32 | zlib.adler32(one)
                if mark in self._paragraphs:
                    continue
                self._paragraphs.add(mark)
            kept.append(part)
        self._windows.update(windows)
        return "\n\n".join(kept)
