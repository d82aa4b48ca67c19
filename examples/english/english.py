"""One JSON-lines file of English prose and documentation, made of Debian packages whose checksums packages.toml holds.

    python examples/english/english.py DEBS OUT.jsonl     # what DEBS lacks comes by `apt-get download`

The same packages give the same bytes on every machine (compared on Python 3.11 and 3.13).
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import io
import json
import posixpath
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from books import from_rdb, from_sword, from_wml
from manuals import from_info, from_man, from_pod
from pages import from_html, from_text, page_links
from prose import Seen, is_prose, without_tables

PACKAGES = Path(__file__).parent / "packages.toml"
FORMATS: dict[str, Callable[[bytes], str]] = {
    "html": from_html,
    "man": from_man,
    "pod": from_pod,
    "info": from_info,
    "text": from_text,
    "sword": from_sword,
    "rdb": from_rdb,
    "wml": from_wml,
}


class Refused(Exception):
    """The user's packages are not those of the list."""


def deb_file(package: dict[str, Any]) -> str:
    """The name that `apt-get download` gives the package."""
    return f"{package['name']}_{package['version'].replace(':', '%3a')}_all.deb"


def fetch(packages: list[dict[str, Any]], debs: Path) -> None:
    """Download the packages that the folder lacks, from the mirror that this machine's apt uses.

    Raises:
        Refused: apt cannot be run, or has not that version.
    """
    debs.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if (debs / deb_file(package)).exists():
            continue
        word = f"{package['name']}={package['version']}"
        try:
            done = subprocess.run(["apt-get", "download", "-q", word], cwd=debs, capture_output=True, text=True)
        except FileNotFoundError:
            raise Refused(
                f"{deb_file(package)} is not in {debs} and there is no apt-get here: put the file there"
            ) from None
        if done.returncode or not (debs / deb_file(package)).exists():
            raise Refused(
                f"apt-get download {word}: {done.stderr.strip() or 'no file came'}\n"
                f"Put {deb_file(package)} into {debs}."
            )


def open_deb(package: dict[str, Any], debs: Path) -> bytes:
    """The package's data.tar, decompressed.

    Raises:
        Refused: the file is missing, is another one, or is not a Debian package.
    """
    path = debs / deb_file(package)
    if not path.exists():
        raise Refused(f"{path}: not there. Run without --offline, or put it there")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != package["sha256"]:
        raise Refused(
            f"{path}: sha256 is {found}, packages.toml has {package['sha256']}. Remove it, or fetch that version"
        )
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode().strip(" /"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise Refused(f"{path}: not a Debian package: no data.tar in it")


def files(package: dict[str, Any], debs: Path, skip: list[str]) -> dict[str, bytes]:
    """The package's files that are to be read, by path; .gz and .dz are unpacked."""
    found: dict[str, bytes] = {}
    patterns = [re.compile(fnmatch.translate(one)) for one in package["read"]]
    unwanted = [re.compile(fnmatch.translate(one)) for one in skip + package.get("skip", [])]
    with tarfile.open(fileobj=io.BytesIO(open_deb(package, debs))) as archive:
        for member in archive:
            path = member.name.removeprefix("./")
            if (
                not member.isfile()
                or not any(one.match(path) for one in patterns)
                or any(one.match(path) for one in unwanted)
            ):
                continue
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            if path.endswith((".gz", ".dz")):
                path, data = path[:-3], gzip.decompress(data)
            found[path] = data
    return found


def natural(path: str) -> list[Any]:
    """A key by which page10 comes after page9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def reading_order(pages: dict[str, bytes]) -> list[str]:
    """Paths as a reader turns the pages: from the index along its links, then what nothing leads to, by name."""
    rest = sorted(
        pages,
        key=lambda path: (path.count("/"), not re.search(r"/(index|contents|toc|book)[^/]*$", path), natural(path)),
    )
    order: list[str] = []
    claimed: set[str] = set()
    for first in rest:
        if first in claimed:
            continue
        claimed.add(first)
        stack = [first]
        while stack:
            path = stack.pop()
            order.append(path)
            links = [
                posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(link)))
                for link in page_links(pages[path])
            ]
            new = [link for link in dict.fromkeys(links) if link in pages and link not in claimed]
            claimed.update(new)
            stack.extend(reversed(new))
    return order


def documents(
    package: dict[str, Any], found: dict[str, bytes], longest: int, share: float
) -> Iterator[tuple[str, str]]:
    """Names and texts of the package's documents: files, folders or the whole, cut at `longest` characters."""
    convert = FORMATS[package["format"]]
    kind = package["document"]
    in_order = reading_order(found) if package["format"] == "html" and kind != "file" else sorted(found, key=natural)
    groups: dict[str, list[str]] = {}
    for path in in_order:
        for number, page in enumerate(convert(found[path]).split("\f")):
            page = without_tables(page)
            if is_prose(page, share):
                file = f"{path} {number + 1}" if number else path
                group = {"whole": package["name"], "folder": posixpath.dirname(path), "file": file}[kind]
                groups.setdefault(group, []).append(page)
    for group, pages in groups.items():
        parts: list[str] = [""]
        for piece in (piece for page in pages for piece in _pieces(page, longest)):
            if len(parts[-1]) + len(piece) > longest:
                parts.append("")
            parts[-1] += ("\n\n\n" if parts[-1] else "") + piece
        for number, part in enumerate(parts):
            yield f"{group} part {number + 1}" if len(parts) > 1 else group, part


def _pieces(text: str, longest: int) -> Iterator[str]:
    """The text, or where it is too long its parts, each ending with a paragraph."""
    while len(text) > longest:
        cut = text.rfind("\n\n", longest // 2, longest)
        cut = cut if cut > 0 else longest
        yield text[:cut]
        text = text[cut:].lstrip("\n")
    if text:
        yield text


def build(recipe: dict[str, Any], debs: Path, out: Path) -> dict[str, Any]:
    """Write the documents of all packages to `out`.

    Args:
        recipe: packages.toml as read.
        debs: the folder of .deb files.
        out: the JSON-lines file; each line has text, source and name.
    Returns:
        documents, bytes (of text) and sha256 of the file, and `sources`: documents and bytes of text by package.
    Raises:
        Refused: a package is missing or another one.
    """
    rules = recipe["rules"]
    seen, sources, digest = Seen(), {}, hashlib.sha256()
    for package in recipe["package"]:
        open_deb(package, debs)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with open(part, "wb") as file:
        for package in recipe["package"]:
            count = size = 0
            for name, text in documents(package, files(package, debs, rules["skip"]), rules["longest"], rules["share"]):
                text = seen.fresh(text).strip("\n")
                if len(text) < rules["shortest"]:
                    continue
                line = (
                    json.dumps({"text": text, "source": package["name"], "name": name}, ensure_ascii=False).encode()
                    + b"\n"
                )
                file.write(line)
                digest.update(line)
                count, size = count + 1, size + len(text.encode())
            sources[package["name"]] = {"documents": count, "bytes": size}
            print(f"{package['name']:32} {count:6} documents {size / 1e6:8.2f} MB", flush=True)
    part.replace(out)
    return {
        "documents": sum(one["documents"] for one in sources.values()),
        "bytes": sum(one["bytes"] for one in sources.values()),
        "sha256": digest.hexdigest(),
        "sources": sources,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("debs", type=Path, help="folder of .deb files")
    parser.add_argument("out", type=Path, help="the JSON-lines file to write")
    parser.add_argument("--offline", action="store_true", help="don't download what is missing")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="another list of packages")
    given = parser.parse_args()
    recipe = tomllib.loads(given.packages.read_text())
    try:
        if not given.offline:
            fetch(recipe["package"], given.debs)
        made = build(recipe, given.debs, given.out)
    except Refused as error:
        sys.exit(f"english: {error}")
    print(f"{made['documents']} documents, {made['bytes']} bytes of text, sha256 {made['sha256']}")
    expected = recipe.get("expected", {}).get("sha256")
    if expected and made["sha256"] != expected:
        sys.exit(
            f"english: sha256 of {given.out} is {made['sha256']}, "
            f"packages.toml expects {expected}: another list, or another program"
        )


if __name__ == "__main__":
    main()
