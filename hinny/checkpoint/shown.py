"""What a conversion found and did, as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hinny.checkpoint.matching import summary


def render(record: Mapping[str, Any]) -> str:
    """The record of `convert`, and the items of a verification, as lines; the mapping where nothing was written."""
    return "\n".join([*_conversion(record), *_checks(record.get("checks", []))])


def _conversion(record: Mapping[str, Any]) -> Iterator[str]:
    if "mapping" not in record:
        return
    done = record.get("done", False)
    if not done:
        yield from _mapping(record["mapping"])
    inwards = "source" in record
    yield (f"{record['source'] if inwards else record['run']}: {record['format']}, "
           f"{record['parameters']:,} parameters, {record['bytes'] / 1e9:,.2f} GB")
    for key, value in record.get("facts", {}).items():
        yield f"  {key}: {value}"
    if ignored := record.get("ignored", {}):
        yield f"  no weights of the model: {summary(ignored)}"
    for heading, names in record.get("problems", {}).items():
        yield f"  {heading}: {summary(names)}"
    if likely := record.get("looks_like"):
        yield f"  It looks like {' or '.join(likely)}."
    for note in record.get("notes", []):
        yield f"  {note}"
    if not done:
        yield "nothing was written" + ("" if record.get("problems") else "; every name, shape and type is right")
        return
    if inwards and record["tokenizer"] is None:
        yield f"  no tokenizer: put a tokenizer.json or tokenizer.model into {record['run']} to use it with text"
    rate = record["seconds"] / max(record["bytes"] / 1e9, 1e-9)
    yield f"{record['run'] if inwards else record['folder']}: written in {record['seconds']:,.1f} s, {rate:,.1f} s/GB"


def _mapping(mapping: list[dict[str, Any]]) -> Iterator[str]:
    width = max((len(line["theirs"]) for line in mapping), default=0)
    for line in mapping:
        kind = f"{line['dtype']} {' x '.join(map(str, line['shape']))}"
        yield f"{line['theirs']:<{width}}  {kind:<28}  {' '.join(line['ours'])}"


def _checks(items: list[dict[str, Any]]) -> Iterator[str]:
    for item in items:
        if item["passed"]:
            yield f"pass  {item['what']}: {item['found']!r}"
        else:
            yield f"FAIL  {item['what']}: {item['found']!r}, expected {item['expected']!r}"
    if items:
        yield f"{sum(item['passed'] for item in items)} of {len(items)} items passed"
