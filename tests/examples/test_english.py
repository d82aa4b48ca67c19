"""examples/english: hand-made packages to documents."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tomllib
import zlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent.parent / "examples" / "english"
sys.path.insert(0, str(FOLDER))

import books  # noqa: E402
import english  # noqa: E402
import manuals  # noqa: E402
import pages  # noqa: E402
import prose  # noqa: E402

TALE = (
    "It was not that the keeper of the light had never seen a ship before, but that all of them had gone by on the "
    "other side of the bank, and none of those who were on board had ever had the time to look up at what "
    "he did for them."
)
OTHER = (
    "When you have set the size of the page, it is of use to look at each of its sides, for there may be some that "
    "were not made to be seen, and these will then stand where the text should have been, which is not what "
    "the reader wants."
)
THIRD = (
    "All the rest of this is about a house in which there were no stairs, so that those who lived below had never been "
    "above, and the ones above thought of the street as of a far country they had only heard about from the birds."
)


def deb(folder: Path, name: str, content: dict[str, bytes]) -> dict[str, Any]:
    """A package of these files, and its entry in the list."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for path, data in content.items():
            member = tarfile.TarInfo("./" + path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    file = b"!<arch>\n"
    for part, data in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar.getvalue())):
        file += f"{part:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    (folder / f"{name}_1%3a2.0_all.deb").write_bytes(file)
    return {
        "name": name,
        "version": "1:2.0",
        "sha256": hashlib.sha256(file).hexdigest(),
        "licence": "MIT",
        "format": "html",
        "document": "file",
        "read": ["*.html"],
    }


def recipe(*packages: dict[str, Any]) -> dict[str, Any]:
    return {
        "rules": {"shortest": 50, "longest": 5000, "share": 0.2, "skip": ["*/genindex*"]},
        "package": list(packages),
    }


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def paper(*paragraphs: str) -> bytes:
    return (
        "<html><head><title>x</title></head><body>" + "".join(f"<p>{one}</p>" for one in paragraphs) + "</body></html>"
    ).encode()


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    package = deb(
        tmp_path, "tales", {"usr/b.html": paper(OTHER), "usr/a.html": paper(TALE), "usr/genindex.html": paper(THIRD)}
    )
    first = english.build(recipe(package), tmp_path, tmp_path / "1.jsonl")
    again = english.build(recipe(package), tmp_path, tmp_path / "2.jsonl")
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert first["sha256"] == again["sha256"] == hashlib.sha256((tmp_path / "1.jsonl").read_bytes()).hexdigest()
    assert lines(tmp_path / "1.jsonl") == [
        {"text": TALE, "source": "tales", "name": "usr/a.html"},
        {"text": OTHER, "source": "tales", "name": "usr/b.html"},
    ]
    assert first["documents"] == 2
    assert first["bytes"] == len(TALE + OTHER)


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    package = deb(tmp_path, "tales", {"usr/a.html": paper(TALE)})
    with open(tmp_path / english.deb_file(package), "ab") as file:
        file.write(b"\n")
    with pytest.raises(
        english.Refused, match=r"tales_1%3a2\.0_all\.deb: sha256 is .* packages\.toml has " + package["sha256"]
    ):
        english.build(recipe(package), tmp_path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_package_is_refused_by_name(tmp_path: Path) -> None:
    package = deb(tmp_path, "tales", {})
    (tmp_path / english.deb_file(package)).unlink()
    with pytest.raises(english.Refused, match=r"tales_1%3a2\.0_all\.deb"):
        english.build(recipe(package), tmp_path, tmp_path / "out.jsonl")


def test_the_command_says_what_was_expected(tmp_path: Path) -> None:
    package = deb(tmp_path, "tales", {"usr/a.html": paper(TALE)})
    toml = tmp_path / "list.toml"
    toml.write_text(
        "[rules]\nshortest = 50\nlongest = 5000\nshare = 0.2\nskip = []\n"
        '[expected]\nsha256 = "00"\n[[package]]\n'
        + "\n".join(f"{key} = {json.dumps(value)}" for key, value in package.items())
    )
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / "english.py"),
            str(tmp_path),
            str(tmp_path / "o.jsonl"),
            "--offline",
            "--packages",
            str(toml),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "1 documents" in done.stdout
    assert "expects 00" in done.stderr


def test_what_came_before_is_left_out(tmp_path: Path) -> None:
    package = deb(
        tmp_path,
        "tales",
        {
            "usr/a.html": paper(TALE, OTHER),
            "usr/b.html": paper(
                TALE.replace("ship", "boat"), OTHER
            ),  # more than half of its windows of words are known
            "usr/c.html": paper(THIRD, THIRD + " " + THIRD[::-1], OTHER),  # one paragraph is known, to the letter
        },
    )
    english.build(recipe(package), tmp_path, tmp_path / "out.jsonl")
    found = lines(tmp_path / "out.jsonl")
    assert [one["name"] for one in found] == ["usr/a.html", "usr/c.html"]
    assert found[1]["text"] == THIRD + "\n\n" + THIRD + " " + THIRD[::-1]


def test_windows_of_words_are_found_wherever_they_stand() -> None:
    alone = set(prose.fingerprints(TALE, sample=1))
    assert len(alone) == len(TALE.split()) - 15
    assert alone < set(prose.fingerprints("A word ahead. " + TALE.upper() + " And after.", sample=1))
    assert not alone & set(prose.fingerprints(OTHER, sample=1))


def test_lists_other_languages_and_numbers_are_no_prose() -> None:
    german = "Der Wärter des Lichts hatte nie zuvor ein Schiff gesehen, denn sie alle fuhren auf der anderen Seite. "
    names = " ".join(f"get_{letter}_value set_{letter}_value GLenum{letter}" for letter in "abcdefghijklmnop")
    assert prose.is_prose(TALE, 0.22)
    assert not prose.is_prose(german * 3, 0.22)
    assert not prose.is_prose(names, 0.22)
    assert prose.without_tables(TALE + "\n\n" + "1.25 | 3.75 | 0.5\n" * 20 + "\n" + OTHER) == TALE + "\n\n" + OTHER


def test_a_book_is_read_in_the_order_of_its_index(tmp_path: Path) -> None:
    book = {
        "usr/index.html": paper(TALE, '<a href="z.html">One</a> <a href="a.html#s">Two</a>'),
        "usr/a.html": paper(OTHER),
        "usr/z.html": paper(THIRD, '<a href="deep.html">more</a>'),
        "usr/deep.html": paper(" ".join(reversed(THIRD.split()))),
    }
    package = deb(tmp_path, "tales", book) | {"document": "whole"}
    english.build(recipe(package), tmp_path, tmp_path / "out.jsonl")
    (only,) = lines(tmp_path / "out.jsonl")
    assert only["name"] == "tales"
    starts = [only["text"].index(one) for one in (TALE, THIRD, " ".join(reversed(THIRD.split())), OTHER)]
    assert starts == sorted(starts)


def test_a_long_book_goes_on_in_another_document(tmp_path: Path) -> None:
    package = deb(tmp_path, "tales", {"usr/a.html": paper(TALE, OTHER, THIRD)})
    english.build(recipe(package) | {"rules": recipe()["rules"] | {"longest": 500}}, tmp_path, tmp_path / "out.jsonl")
    assert [(one["name"], one["text"]) for one in lines(tmp_path / "out.jsonl")] == [
        ("usr/a.html part 1", TALE + "\n\n" + OTHER),
        ("usr/a.html part 2", THIRD),
    ]


def test_html_to_text() -> None:
    page = (
        b"""<!DOCTYPE html><html><head><title>no</title><style>p > b {}</style></head><body>
      <div class="sphinxsidebar"><ul><li>no</li></ul></div>
      <div class="body" role="main"><h1>The light<a class="headerlink" href="#x">&para;</a></h1>
      <!-- no --><p>A <em>ship</em>&nbsp;came
        by, <code>1 &lt; 2</code>.<p>Old pages leave these open.<br>Line.
      <ul><li>one</li><li><p>two</p></li></ul>
      <pre>if x:\n    y  <b>=</b> 1\n</pre><script>if (a < b) { no }</script>
      <table><tr><th>a</th><td>b</td></tr></table>"""
        + b"<p>"
        + b"Enough to be the main part. " * 9
        + b"""</p></div>
      <div class="footer">no</div></body></html>"""
    )
    text = pages.from_html(page)
    assert text.startswith(
        "The light\n\nA ship came by, 1 < 2.\n\nOld pages leave these open. Line.\n\n- one\n- two\n\n"
        "if x:\n    y  = 1\n\na | b\n\nEnough"
    )
    assert "no" not in text.split()


def test_docbook_and_mallard_to_text() -> None:
    page = (
        b'<page xmlns="x"><info><desc>no</desc></info><title>Files</title>'
        b"<p>Press <gui>Open</gui> in the <app>viewer</app>.</p>"
        b"<list><item><p>one</p></item></list><para>See <![CDATA[a<b]]>.</para></page>"
    )
    assert pages.from_html(page) == "Files\n\nPress Open in the viewer.\n\n- one\n\nSee a<b."


def test_man_pages_to_text() -> None:
    man = rb""".\" no
.TH LIGHT 7 "2020" "no"
.SH NAME
light \- a \fIlamp\fP for
.BR ships (1)
.TP
.B \-\-on
Lit \(em always.
.nf
a
  b
.fi
"""
    assert manuals.from_man(man) == "LIGHT(7)\n\nNAME\n\nlight - a lamp for ships(1)\n\n--on Lit — always.\n\na\n  b"
    mdoc = b""".Dd May 1
.Dt LAMP 4
.Sh NAME
.Nm lamp
.Nd a light
.Sh DESCRIPTION
The
.Nm
driver, see
.Xr ship 1 ,
takes
.Fl v
and says
.Dq lit .
"""
    assert manuals.from_man(mdoc) == (
        "LAMP(4)\n\nNAME\n\nlamp - a light\n\nDESCRIPTION\n\nThe lamp driver, see ship(1), takes -v and says “lit”."
    )


def test_pod_info_and_text() -> None:
    assert manuals.from_pod(
        b"=head1 The B<light>\n\nSee L<the page|perlop> and C<< a > b >>.X<no>\n\n"
        b"=over\n\n=item one\n\n=back\n\n    code\n\n=cut"
    ) == ("The light\n\nSee the page and a > b.\n\n- one\n\n    code")
    info = (
        b"head\n\x1f\nFile: a.info,  Node: Top\n\nHello there.\n\n* Menu:\n\n* One::  no\n\n"
        b"\x1f\nFile: a.info,  Node: One\n\n1 One\n*****\n\nText.\n"
    )
    assert manuals.from_info(info) == "Hello there.\n\n1 One\n*****\n\nText."
    assert pages.from_text("b\x08bold \xe9\n\n\n\nend\f\n".encode("latin-1")) == "bold é\n\nend"


def test_books_of_the_other_formats() -> None:
    block = zlib.compress(b"<p>In the <w>be</w><w>ginning</w><lb/>there was</p>")
    assert books.from_sword(block + b"gap" + zlib.compress(b"Light.")) == "In the beginning\n\nthere was\fLight."
    strings = b"".join(b"\0\x04\0\x09" + len(one).to_bytes(4, "big") + one for one in (b"EMMA", b"", b"CHAPTER I"))
    assert books.from_rdb(len(strings).to_bytes(4, "big") + zlib.compress(strings)) == "EMMA\n\nCHAPTER I"
    assert books.from_wml(b'[message]\nspeaker=Nym\nmessage= _ "Look, ""there""!"\n[/message]') == 'Nym: Look, "there"!'


def test_the_list_is_whole() -> None:
    packages = tomllib.loads((FOLDER / "packages.toml").read_text())
    names = [one["name"] for one in packages["package"]]
    assert len(set(names)) == len(names)
    for one in packages["package"]:
        assert one["format"] in english.FORMATS, one["name"]
        assert one["document"] in ("file", "folder", "whole"), one["name"]
        assert len(bytes.fromhex(one["sha256"])) == 32, one["name"]
        assert one["licence"].strip("? "), one["name"]
    assert len(bytes.fromhex(packages["expected"]["sha256"])) == 32


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    package = deb(tmp_path, "tales", {"usr/a.html.gz": gzip.compress(paper(TALE))}) | {"read": ["*.html.gz"]}
    assert list(english.files(package, tmp_path, [])) == ["usr/a.html"]
