"""Pages of HTML, DocBook and Mallard, and plain text, to text.

Here, in manuals.py and in books.py each function takes a file's bytes and returns text: paragraphs on one line,
an empty line between them, code as it stands. They know what the packages of packages.toml hold; they are no
general converters.
"""

from __future__ import annotations

import html
import re

TOKEN = re.compile(
    r"<!--.*?-->|<\?.*?>|<!\[CDATA\[(?P<raw>.*?)\]\]>|<!(?:[^<>\[]|\[.*?\])*>"
    r"|<(?P<end>/?)(?P<tag>[a-zA-Z][^\s/>]*)(?P<attributes>(?:\"[^\"]*\"|'[^']*'|[^'\"<>])*+)>",
    re.DOTALL,
)
NAMES = re.compile(r"\b(?:class|id|role)\s*=\s*[\"']?([^\"'>]*)", re.IGNORECASE)
LINK = re.compile(r"<(?:a|link)\b[^>]*?\bhref\s*=\s*[\"']?([^\"'#> ]+)", re.IGNORECASE)

INLINE = set(
    """
    a abbr acronym acronym application app b bdi big citetitle cite classname cmd code command constant dfn em
    emphasis entry envar errorname file filename firstterm font foreignphrase function gui guibutton guiicon
    guilabel guimenu guimenuitem guiseq guisubmenu i input ins interfacename kbd key keycap keycombo keyseq link
    literal mark markup menuchoice option optional output package parameter phrase productname prompt q quote
    replaceable rp rt ruby s samp small span strike strong structfield sub sup symbol sys systemitem term tt type u
    ulink uri userinput var varname wordasword xref w hi reference foreign transchange divinename seg catchword
    scripref
    """.split()  # noqa: SIM905
)
VOID = set(
    """
    area base br col embed hr img input link meta param source track wbr
    """.split()  # noqa: SIM905
)
LOOSE = set(
    """
    p li dt dd tr td th thead tbody tfoot option colgroup
    """.split()  # noqa: SIM905
)
"""Elements that old pages leave open; they are never waited for."""
LEFT_OUT = set(
    """
    head script style nav footer form button select svg noscript template iframe annotation info bookinfo
    articleinfo media mediaobject imageobject comment indexterm title-abbrev
    """.split()  # noqa: SIM905
)
SIDES = set(
    """
    navheader navfooter sphinxsidebar related headerlink header footer nav-panel navbar sidebar toc
    table-of-contents toctree-wrapper lot index indextable navigation breadcrumbs breadcrumb rst-versions wy-nav-side
    linkheader tocset navsettop navsetbottom versionbox contents-menu menu-bar nav-chapters nav-wrapper
    quickview-toc buttonBar shortcontents list-of-tables list-of-figures list-of-examples list-of-procedures toctree
    rst-footer-buttons genindextable viewcode-link mw-editsection admonition-toc
    """.split()  # noqa: SIM905
)
"""Classes, ids and roles of what stands beside the text."""
MAIN = {"main", "body", "document", "documentwrapper", "page-content", "content"}
LITERAL = set(
    """
    pre screen programlisting literallayout listing synopsis verse
    """.split()  # noqa: SIM905
)


class Writer:
    """Blocks of text in the order of a page."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.line: list[str] = []
        self.bullet = False

    def flush(self) -> None:
        """End the block at hand."""
        text = " ".join("".join(self.line).split())
        self.line = []
        if text.strip("| ¶"):
            self.blocks.append("- " + text if self.bullet else text)
            self.bullet = False

    def literal(self) -> None:
        """End a block whose lines stay."""
        text = "".join(self.line).expandtabs().strip("\n")
        self.line = []
        if text.strip():
            self.blocks.append("\n".join(line.rstrip() for line in text.split("\n")))

    def text(self, first: int = 0, last: int | None = None) -> str:
        """Blocks first to last; the points of a list on lines of their own without space between."""
        out: list[str] = []
        for block in self.blocks[first:last]:
            if out:
                out.append("\n" if block.startswith("- ") and out[-1].startswith("- ") else "\n\n")
            out.append(block)
        return "".join(out)


def decode(data: bytes) -> str:
    """UTF-8, or Latin-1 where it is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def page_links(data: bytes) -> list[str]:
    """Where a page leads, in its order."""
    return [html.unescape(link) for link in LINK.findall(decode(data))]


def from_html(data: bytes) -> str:
    """HTML, XHTML, DocBook and Mallard: the main part of the page where it names one, without menus and footers."""
    source = decode(data).replace("\r", "")
    out, at = Writer(), 0
    open_tags: list[tuple[str, bool, bool, bool]] = []  # name, left out, literal, main
    skipping = literal = 0
    main: list[int] = []
    for token in TOKEN.finditer(source):
        if not skipping and token.start() > at:
            out.line.append(html.unescape(source[at : token.start()]))
        at = token.end()
        if token["raw"] is not None and not skipping:
            out.line.append(token["raw"])
        if token["tag"] is None:
            continue
        tag, attributes = token["tag"].lower(), token["attributes"]
        if not skipping and tag not in INLINE:
            _edge(out, tag, bool(token["end"]), literal)
        if token["end"]:
            if not any(name == tag for name, *_ in open_tags):
                continue
            while True:
                name, left_out, is_literal, is_main = open_tags.pop()
                skipping -= left_out
                if is_literal:
                    literal -= 1
                    if not skipping:
                        out.literal()
                if is_main and len(main) == 1:
                    out.flush()
                    main.append(len(out.blocks))
                if name == tag:
                    break
        elif tag not in VOID and tag not in LOOSE and not attributes.endswith("/"):
            names = set(" ".join(NAMES.findall(attributes)).split())
            left_out = tag in LEFT_OUT or bool(names & SIDES) or {"contents", "topic"} <= names
            is_main = not main and not skipping and (tag == "main" or bool(names & MAIN))
            if is_main:
                main.append(len(out.blocks))
            is_literal = tag in LITERAL
            literal += is_literal
            skipping += left_out
            open_tags.append((tag, left_out, is_literal, is_main))
    if not skipping:
        out.line.append(html.unescape(source[at:]))
    out.flush()
    inner = out.text(*main) if len(main) == 2 else ""
    return inner if len(inner) > 200 else out.text()


def _edge(out: Writer, tag: str, end: bool, literal: int) -> None:
    """What a tag does to the text around it."""
    if tag == "br":
        out.line.append("\n" if literal else " ")
    elif tag in ("td", "th") and not literal:
        if not end and "".join(out.line).strip():
            out.line.append(" | ")
    elif not literal and tag not in ("img", "wbr"):
        out.flush()
        if tag in ("li", "item", "listitem") and not end:
            out.bullet = True


def from_text(data: bytes) -> str:
    """Text as it stands, without overstriking and ends of pages."""
    text = re.sub(r".\x08", "", decode(data)).replace("\r", "").replace("\f", "\n").expandtabs()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")
