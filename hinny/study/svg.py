"""A drawing of `draw` as part of a page, and as a file of its own."""

from __future__ import annotations

import re

from hinny.study.draw import FAINT, GREY, INK, PALETTE


def inline(svg: str, prefix: str, alt: str) -> str:
    """The drawing as an element of a page: no prolog, own ids, the page's font and colours."""
    body = svg[svg.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    for colour, variable in _variables().items():
        body = body.replace(colour, variable)
    return body.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


def standalone(svg: str) -> str:
    """The drawing as a file of its own: its text turns light on a dark page."""
    style = (f"<style>svg{{color:{INK};font-family:system-ui,sans-serif}}"
             "@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}</style>")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    return re.sub(r"(<svg [^>]*>)", rf"\1{style}", svg, count=1)


def _variables() -> dict[str, str]:
    return {INK: "currentColor", FAINT: "var(--faint)", GREY: "var(--grey)"} | {
        colour: f"var(--s{i})" for i, colour in enumerate(PALETTE)}
