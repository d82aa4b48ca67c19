"""docs/results/generation.md, made from rows of `hinny bench generate`: the paper's "up to 8x faster" as a table and a
curve, beside the prediction; shares of the floor, prompts, whole answers, peers, and what made each figure.

    python -m hinny.bench.generation_report docs/results/generation-*.json --out docs/results/generation.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hinny.bench.generation_fit import errors_of
from hinny.bench.generation_rows import DECODE, Point, hardware_in, point_of, read_shape
from hinny.bench.kernel_table import Row, read_rows
from hinny.errors import ConfigError, HinnyError
from hinny.run import write_atomically
from hinny.study.draw import Panel, Series, draw, short, standalone
from hinny.study.draw import Point as Dot

HYBRID, TRANSFORMER = "8b-hybrid", "8b-transformer"

PICTURE = "generation-speedup.svg"

HEAD = """\
# Generation, timed

Written by `python -m hinny.bench.generation_report` from rows of `hinny bench generate`. Weights are random, and so is
what fills the keys and states up to a context: speed does not depend on their values, and no quality is claimed. A step
is one pass of the engine's runner over all sequences and the choice of their likeliest tokens, which are read back to
the host; tokens/s are those of all sequences, medians over the steps, with the slowest and the fastest.
"""

CLAIM = """\
## Up to 8x faster

The paper (arXiv 2406.07887) predicts that the hybrid generates up to 8 times faster than the Transformer at long
contexts, and did not measure it. Measured here, both on the same engine; the prediction is `hinny show`'s arithmetic.
"""


@dataclass(frozen=True)
class Pair:
    """A hybrid's and a Transformer's decode row at the same batch, context and machine."""

    hybrid: Row
    other: Row
    at: Point
    """Of the Transformer."""

    @property
    def label(self) -> str:
        """Which Transformer."""
        assert self.at.model.attention is not None
        a = self.at.model.attention
        return "MHA" if a.n_kv_heads == a.n_heads else f"GQA-{a.n_kv_heads}"

    @property
    def ratio(self) -> float:
        """Times that the hybrid is faster."""
        return self.hybrid["value"] / self.other["value"]

    @property
    def predicted(self) -> float | None:
        """The same by the prediction."""
        ours, theirs = (_predicted(point_of(one)) for one in (self.hybrid, self.other))
        return None if ours is None or theirs is None else ours / theirs


def render(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """The page, and its pictures by name: what there are rows of, and nothing else."""
    found = pairs(rows)
    pictures = {PICTURE: _curve(found)} if _curves(found) else {}
    shown = "".join(f"![Times that the hybrid is faster, by context]({name})\n" for name in pictures)
    parts = [HEAD, CLAIM if found else "", _claim_table(found), shown, _decode_table(rows), _prediction_note(rows),
             _prefill_table(rows), _answer_table(rows), _skipped(rows), _made(rows)]
    return "\n".join(part for part in parts if part), pictures


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Each Transformer's decode row of the 8B models that has a hybrid's beside it, by label, batch and context."""
    decoded = [one for one in rows if one["what"] == DECODE]
    hybrids = {(one["shape"], one["machine"]): one for one in decoded if one["variant"] == HYBRID}
    found = [Pair(hybrids[one["shape"], one["machine"]], one, point_of(one)) for one in decoded
             if one["variant"].split()[0] == TRANSFORMER and (one["shape"], one["machine"]) in hybrids]
    return sorted(found, key=lambda p: (p.at.tensor, p.label, p.at.batch, p.at.context))


def _predicted(point: Point) -> float | None:
    return point.predicted(point.calibration)


def _claim_table(found: Sequence[Pair]) -> str:
    lines = [[pair.label, _gpus(pair.hybrid), f"{pair.at.batch}", short(pair.at.context),
              f"{pair.hybrid['value']:,.0f}", f"{pair.other['value']:,.0f}", f"**{pair.ratio:.2f}x**",
              _of(pair.predicted, "{:.2f}x")] for pair in found]
    return _table(["Transformer", "GPUs", "batch", "context", "hybrid tok/s", "Transformer tok/s", "measured",
                   "predicted"], lines, "llrrrrrr")


def _curves(found: Sequence[Pair]) -> dict[tuple[str, int], list[Pair]]:
    """Lines with two points at least: by Transformer and batch."""
    lines: dict[tuple[str, int], list[Pair]] = {}
    for pair in found:
        if pair.at.tensor == 1:
            lines.setdefault((pair.label, pair.at.batch), []).append(pair)
    return {name: line for name, line in lines.items() if len(line) > 1}


def _curve(found: Sequence[Pair]) -> str:
    series = []
    for colour, ((label, batch), line) in enumerate(sorted(_curves(found).items())):
        dots = [Dot(pair.at.context, pair.ratio, pair.hybrid["low"] / pair.other["high"],
                    pair.hybrid["high"] / pair.other["low"]) for pair in line]
        series.append(Series(f"batch {batch}, {label}", dots, colour))
        said = [Dot(pair.at.context, pair.predicted, pair.predicted, pair.predicted) for pair in line
                if pair.predicted is not None]
        if said:
            series.append(Series("predicted", said, colour, dashed=True))
    return standalone(draw(Panel("", "context, tokens", "times faster than the Transformer", series, log_x=True,
                                 format_y=lambda value: f"{value:g}x")))


def _decode_table(rows: Sequence[Row]) -> str:
    made = {(one["what"], one["variant"], one["shape"], one["machine"]): one for one in rows}
    lines = []
    for one in (one for one in rows if one["what"] == DECODE):
        point, memory = point_of(one), made.get(("decode.peak_memory", one["variant"], one["shape"], one["machine"]))
        said = _predicted(point)
        lines.append([one["variant"], _gpus(one), point.precision, point.state, f"{point.batch}", short(point.context),
                      f"{one['value']:,.0f}", f"{one['low']:,.0f} … {one['high']:,.0f}",
                      f"**{one['value'] / one['bound']:.0%}**", _of(said, "{:,.0f}"),
                      "" if said is None else f"{said / one['value'] - 1:+.1%}",
                      "" if memory is None else f"{memory['value']:.1f}", _peer(one)])
    if not lines:
        return ""
    return ("## Decoding\n\nThe floor of a step is its bytes, weights, keys and states by `hinny show`, over the rate "
            "at which memory\nwas found to move in the same process; a GPU's data sheet is higher.\n\n" + _table(
                ["model", "on", "weights", "states", "batch", "context", "tok/s", "low … high", "of floor", "predicted",
                 "off by", "memory, GB", "peer"], lines, "llllrrrrrrrrl"))


def _prediction_note(rows: Sequence[Row]) -> str:
    lines = []
    for name, errors, calibration in errors_of(rows):
        basis = "by its data sheet" if calibration is None else (
            f"by {calibration.share:.1%} of the data sheet's bandwidth and {calibration.layer * 1e6:.1f} µs a layer"
            + ("" if calibration.sum is None else f", {calibration.sum * 1e6:.1f} µs a layer's sum over GPUs"))
        lines.append(f"- {name}, {basis}: {len(errors)} points, off by {statistics.median(errors):.1%} in the median "
                     f"and {max(errors):.1%} at most.")
    return "## The prediction\n\n" + "\n".join([*lines, ""]) if lines else ""


def _prefill_table(rows: Sequence[Row]) -> str:
    shares = {(one["variant"], one["shape"], one["machine"]): one for one in rows if one["what"] == "prefill.mfu"}
    lines = []
    for one in (one for one in rows if one["what"] == "prefill"):
        sizes, share = read_shape(one), shares.get((one["variant"], one["shape"], one["machine"]))
        lines.append([one["variant"], _gpus(one), sizes["precision"], short(int(sizes["length"])), sizes["piece"],
                      f"{one['value']:,.0f}", "" if share is None else f"**{share['value']:.1%}**"])
    return "## Prompts\n\nOne prompt, read in pieces.\n\n" + _table(
        ["model", "on", "weights", "length", "piece", "tok/s", "MFU"], lines, "lllrrrr") if lines else ""


def _answer_table(rows: Sequence[Row]) -> str:
    lines = []
    for one in (one for one in rows if one["what"] == "answer"):
        sizes = read_shape(one)
        lines.append([one["variant"], _gpus(one), sizes["precision"], sizes["batch"], short(int(sizes["prompt"])),
                      sizes["written"], f"{one['value']:,.0f}"])
    return ("## Whole answers\n\nRequests through the engine, prompts and scheduling included: written tokens a second."
            "\n\n" + _table(["model", "on", "weights", "requests", "prompt", "written", "tok/s"], lines, "lllrrrr")
            ) if lines else ""


def _skipped(rows: Sequence[Row]) -> str:
    """Points without a figure; one that was measured later has one."""
    measured = {(one["variant"], one["shape"], one["machine"]) for one in rows if not one["what"].endswith(".skipped")}
    lines = [f"- {one['variant']} on {_gpus(one)}, {one['shape']}"
             + (f": {one['value']:.0f} GB are needed." if one["value"] else ".") for one in rows
             if one["what"].endswith(".skipped") and (one["variant"], one["shape"], one["machine"]) not in measured]
    return "## Not measured, for want of memory\n\n" + "\n".join([*lines, ""]) if lines else ""


def _made(rows: Iterable[Row]) -> str:
    lines = ["- {}, commit {}: `{}`".format(*made) for made in
             dict.fromkeys((one["machine"], one["commit"], one["command"]) for one in rows)]
    return "## Made by\n\n" + "\n".join([*lines, ""])


def _gpus(one: Row) -> str:
    """The accelerator and how many; of a CPU, its threads."""
    sizes, hardware = read_shape(one), hardware_in(one["machine"])
    if "gpus" not in sizes:
        return f"CPU, threads {sizes['threads']}"
    return f"{sizes['gpus']} {'GPU' if hardware is None else hardware.name}"


def _peer(one: Row) -> str:
    return f"{one['peer']}: {one['peer_value']:,.0f}, **{one['ratio']:.2f}x**" if one["peer"] else ""


def _of(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], sides: str) -> str:
    """A Markdown table; sides: l or r of each column. Nothing without lines."""
    if not lines:
        return ""
    assert len(heads) == len(sides), (heads, sides)
    rule: Callable[[str], str] = {"l": "---", "r": "---:"}.__getitem__
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, [rule(side) for side in sides], *lines)) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and its pictures beside it."""
    parser = argparse.ArgumentParser(prog="python -m hinny.bench.generation_report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="rows of hinny bench generate --save")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown page")
    given = parser.parse_args(arguments)
    try:
        rows = [one for file in given.files for one in read_rows(file)]
        if not rows:
            raise ConfigError(f"{', '.join(map(str, given.files))}: no rows.")
        page, pictures = render(rows)
        write_atomically(given.out, page)
        for name, svg in pictures.items():
            write_atomically(given.out.parent / name, svg)
    except HinnyError as fault:
        sys.exit(f"hinny: {fault}")


if __name__ == "__main__":
    main()
