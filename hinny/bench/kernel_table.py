"""Rows of `hinny bench kernels` in a file and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hinny.errors import ConfigError
from hinny.run import write_atomically

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """The rows in a file; none where it does not exist yet. Raises ConfigError if it holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as fault:
        raise ConfigError(f"{file} cannot be read as result rows: {fault}.") from None
    if not isinstance(found, list) or not all(
            isinstance(r, dict) and all(isinstance(r.get(key), str) for key in ("what", "shape")) for r in found):
        raise ConfigError(f"{file} holds no result rows; name another file.")
    return found


def merge_rows(file: Path, rows: Sequence[Row], key: Callable[[Row], object] | None = None) -> None:
    """Writes rows into the file, each in the place of the one with its `key`, its name and shape without one, or behind
    all others.
    """
    key = _key if key is None else key
    merged = {key(r): r for r in read_rows(file)} | {key(r): r for r in rows}
    write_atomically(file, json.dumps(list(merged.values()), indent=1, allow_nan=False) + "\n")


def _key(row: Row) -> tuple[str, str]:
    # with or without a graph, and whichever way memory was fastest, it is the same figure
    return row["what"], _shape(row)


def _shape(row: Row) -> str:
    return " ".join(part for part in row["shape"].split() if not part.startswith(("clock=", "way=")))


def render_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown page: roofs, then each case with its bound, its peer and its error."""
    errors = {_key(r): r for r in rows if r["what"].endswith(".error")}
    roofs = [r for r in rows if r["what"].startswith("roof.")]
    timed = [r for r in rows if r not in roofs and not r["what"].endswith(".error")]
    lines = ["# Kernels, timed", "",
             "Written by `hinny bench kernels`. Median, lowest and highest sample; of ms less is better, of TB/s more.",
             "The bound is the larger of bytes over the speed of memory and operations over the speed of a matrix",
             "product, both the roofs of one run. The error is the largest ||a - b|| / ||b|| of any result, b being",
             "PyTorch's in float32.", ""]
    for made in dict.fromkeys((r["machine"], r["commit"], r["command"]) for r in rows):
        lines.append("- {}, commit {}: `{}`".format(*made))
    lines += ["", *(f"{r['what'].removeprefix('roof.').capitalize()}: {r['value']:.3g} {r['unit']} ({r['shape']})."
                    for r in roofs), "",
              "| what | shape | hinny | low … high | unit | of bound | peer | ratio | error | peer's error |",
              "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [_line(r, errors.get((f"{r['what']}.error", _shape(r)))) for r in timed]
    peers = dict.fromkeys(r["peer"] for r in timed if r["peer"])
    notes = [f"- {peer}{' (*)' if ' without ' in peer else ''}" for peer in peers]
    events = [f"- {r['what']} {_shape(r)}: timed with events, not in a graph." for r in timed
              if "clock=events" in r["shape"]]
    return "\n".join([*lines, "", "Peers:" if notes else "", *notes, *events, ""])


def _line(r: Row, error: Row | None) -> str:
    share = r["bound"] / r["value"] if r["unit"] == "ms" else r["value"] / r["bound"]
    cells = [r["what"], _shape(r), f"{r['value']:.4g}", f"{r['low']:.4g} … {r['high']:.4g}", r["unit"], f"{share:.0%}",
             "" if r["peer_value"] is None else f"{r['peer_value']:.4g}" + ("*" if " without " in r["peer"] else ""),
             "" if r["ratio"] is None else f"{r['ratio']:.2f}x",
             "" if error is None else f"{error['value']:.1e}",
             "" if error is None or error["peer_value"] is None else f"{error['peer_value']:.1e}"]
    return f"| {' | '.join(cells)} |"
