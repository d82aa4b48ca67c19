"""Books as data: SWORD's modules, novels in a package of R, the stories of a game."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from pages import decode, from_html, from_text


def _streams(data: bytes) -> Iterator[bytes]:
    """The zlib streams in a file, whatever stands between them."""
    at = data.find(b"x\x9c")
    while at >= 0:
        stream = zlib.decompressobj()
        try:
            yield stream.decompress(data[at:])
            at = len(data) - len(stream.unused_data)
        except zlib.error:
            at += 1
        at = data.find(b"x\x9c", at)


def from_sword(data: bytes) -> str:
    """A compressed SWORD module (zText, zCom): its blocks, chapters or books, with form feeds between them."""
    return "\f".join(
        from_html(re.sub(rb"<lb[^>]*>|<br ?/?>", b"</p><p>", block.replace(b"\0", b"\n"))) for block in _streams(data)
    )


def from_rdb(data: bytes) -> str:
    """The strings of an R package's data, in their order: one line of a book each, form feeds between books."""
    books = []
    for block in _streams(data):
        out = []
        for match in re.finditer(rb"\x00(?:\x04\x00|\x00[\x40\x80])\x09", block):
            length = int.from_bytes(block[match.end() : match.end() + 4], "big")
            out.append(block[match.end() + 4 : match.end() + 4 + length] if length < 1 << 20 else b"")
        books.append(from_text(b"\n".join(out)))
    return "\f".join(books)


STORY = re.compile(r'\b(speaker|message|story|description)\s*=\s*(?:_\s*)?("(?:[^"]|"")*"|[^\n"]*)')


def from_wml(data: bytes) -> str:
    """A scenario of Wesnoth: what is told and who says it."""
    out, speaker = [], ""
    for key, value in STORY.findall(decode(data)):
        text = " ".join(re.sub(r"<[^>]*>|\s*#.*", "", value.strip('"').replace('""', '"')).split())
        if key == "speaker":
            speaker = "" if text in ("narrator", "unit", "second_unit") else text
        elif key == "message" and text:
            out.append(f"{speaker}: {text}" if speaker else text)
            speaker = ""
        elif key in ("story", "description") and len(text) > 60:
            out.append(text)
    return "\n\n".join(out)
