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
from pathlib import Path
from typing import Any

import english
import overlap
import prose
import pytest

FOLDER = Path(english.__file__).parent

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


def test_the_overlap_counts_windows_of_held_out_documents(tmp_path: Path) -> None:
    words = [
        f"w{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}{chr(97 + number // 676)}" for number in range(4000)
    ]
    held, other = " ".join(words[:3000]), " ".join(words[1500:])
    first = sorted((held, other), key=lambda text: hashlib.sha256(text.encode()).digest()[0])[0]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (held, other)))
    bound = hashlib.sha256(first.encode()).digest()[0] + 1
    documents, windows, known = overlap.overlap(path, bound)
    shared = prose.fingerprints(" ".join(words[1500:3000]))
    assert (documents, windows, known) == (1, len(prose.fingerprints(first)), len(shared))
    assert known > 50


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
