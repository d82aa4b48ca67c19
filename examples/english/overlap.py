"""How much of held-out documents stands in the others.

    python examples/english/overlap.py ENGLISH.jsonl

A document is held out if the first byte of its text's sha256 is below `--of-256`. Of its windows of 16 words (every
sixteenth, chosen by hash) those are counted that other documents have too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from prose import fingerprints


def overlap(path: Path, of_256: int) -> tuple[int, int, int]:
    """Held-out documents, windows of 16 words in them that were looked at, and how many of these the others have."""
    held: list[list[int]] = []
    rest: set[int] = set()
    with open(path, "rb") as file:
        for line in file:
            text = json.loads(line)["text"]
            windows = fingerprints(text)
            if hashlib.sha256(text.encode()).digest()[0] < of_256:
                held.append(windows)
            else:
                rest.update(windows)
    return len(held), sum(map(len, held)), sum(one in rest for windows in held for one in windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--of-256", type=int, default=5, help="share of documents to hold out, of 256")
    given = parser.parse_args()
    documents, windows, known = overlap(given.file, given.of_256)
    print(
        f"{documents} documents held out, {windows} windows: {100 * known / max(1, windows):.2f} % stand in the others"
    )


if __name__ == "__main__":
    main()
