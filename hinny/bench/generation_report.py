"""docs/results/generation.md, made from rows of `hinny bench generate`: the paper's "up to 8x faster" as a table and a
curve, beside the prediction; shares of the floor, prompts, whole answers, peers, and what made each figure.

    python -m hinny.bench.generation_report docs/results/generation-*.json --out docs/results/generation.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hinny.bench.generation_claim import contests, curve, section, table
from hinny.bench.generation_fit import errors_of
from hinny.bench.generation_goals import goals
from hinny.bench.generation_rows import DECODE, hardware_in, point_of, read_shape
from hinny.bench.kernel_table import Row, read_rows
from hinny.errors import ConfigError, HinnyError
from hinny.run import write_atomically
from hinny.study.draw import short

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
contexts, and did not measure it. Measured here, both on the same engine with random weights; the prediction is
`hinny show`'s arithmetic. MHA: 32 key heads, as the paper's Transformer; GQA-8: the same with 8.
"""


def render(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """The page, and its pictures by name. What was asked for and has no rows is said to be not measured."""
    found = contests(rows)
    pictures = {contest.picture: curve(contest) for contest in found if contest.curves}
    parts = [HEAD, goals(rows), CLAIM, *(map(section, found) if found else ["Not measured.\n"]), _decode_table(rows),
             _prediction_note(rows), _prefill_table(rows), _answer_table(rows), _skipped(rows), _made(rows)]
    return "\n".join(part for part in parts if part), pictures


def _decode_table(rows: Sequence[Row]) -> str:
    made = {(one["what"], one["variant"], one["shape"], one["machine"]): one for one in rows}
    lines = []
    for one in sorted((one for one in rows if one["what"] == DECODE), key=_order):
        point, memory = point_of(one), made.get(("decode.peak_memory", one["variant"], one["shape"], one["machine"]))
        said = point.predicted()
        lines.append([one["variant"], _gpus(one), point.precision, point.state, f"{point.batch}", short(point.context),
                      f"{one['value']:,.0f}", f"{one['low']:,.0f} … {one['high']:,.0f}",
                      f"**{one['value'] / one['bound']:.0%}**", _of(said, "{:,.0f}"),
                      "" if said is None else f"{said / one['value'] - 1:+.1%}",
                      "" if memory is None else f"{memory['value']:.1f}", _peer(one)])
    if not lines:
        return ""
    return ("## Decoding\n\nThe floor of a step is its bytes, weights, keys and states by `hinny show`, over the rate "
            "at which memory\nwas found to move in the same process; a GPU's data sheet is higher.\n\n" + table(
                ["model", "on", "weights", "states", "batch", "context", "tok/s", "low … high", "of floor", "predicted",
                 "off by", "memory, GB", "peer"], lines, "llllrrrrrrrrl"))


def _prediction_note(rows: Sequence[Row]) -> str:
    lines = []
    short_weights = [error for errors in errors_of(rows, narrow=True) for error, _ in errors.points]
    for one in errors_of(rows):
        c, (worst, at) = one.calibration, one.worst
        basis = "by its data sheet" if c is None else (
            f"by {c.share:.1%} of the data sheet's bandwidth and {c.layer * 1e6:.1f} µs a layer"
            + ("" if c.sum is None else f", {c.sum * 1e6:.1f} µs a layer's sum over GPUs"))
        point, errors = point_of(at), [abs(error) for error, _ in one.points]
        lines.append(f"- {one.hardware}, {basis}: {len(errors)} points, off by {statistics.median(errors):.1%} in the "
                     f"median. The worst is off by {worst:+.1%}: {at['variant']} on {_gpus(at)}, weights "
                     f"{point.precision}, states {point.state}, batch {point.batch}, context {short(point.context)}.")
    if short_weights:
        lines.append(f"- Weights in 8 or 4 bits have other kernels, for which no constants were fitted: by those above "
                     f"their {len(short_weights)} points are off by {min(short_weights):+.0%} to "
                     f"{max(short_weights):+.0%}.")
    return ("## The prediction\n\nPredicted over measured tokens/s, of every decode point of a GPU; a CPU has no data "
            "sheet here.\n\n" + "\n".join([*lines, ""])) if lines else ""


def _prefill_table(rows: Sequence[Row]) -> str:
    shares = {(one["variant"], one["shape"], one["machine"]): one for one in rows if one["what"] == "prefill.mfu"}
    lines = []
    for one in (one for one in rows if one["what"] == "prefill"):
        sizes, share = read_shape(one), shares.get((one["variant"], one["shape"], one["machine"]))
        lines.append([one["variant"], _gpus(one), sizes["precision"], short(int(sizes["length"])), sizes["piece"],
                      f"{one['value']:,.0f}", "" if share is None else f"**{share['value']:.1%}**"])
    return "## Prompts\n\nOne prompt, read in pieces.\n\n" + table(
        ["model", "on", "weights", "length", "piece", "tok/s", "MFU"], lines, "lllrrrr") if lines else ""


def _answer_table(rows: Sequence[Row]) -> str:
    lines = []
    for one in (one for one in rows if one["what"] == "answer"):
        sizes = read_shape(one)
        lines.append([one["variant"], _gpus(one), sizes["precision"], sizes["batch"], short(int(sizes["prompt"])),
                      sizes["written"], f"{one['value']:,.0f}"])
    return ("## Whole answers\n\nRequests through the engine, prompts and scheduling included: written tokens a second."
            "\n\n" + table(["model", "on", "weights", "requests", "prompt", "written", "tok/s"], lines, "lllrrrr")
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


def _order(one: Row) -> tuple[object, ...]:
    """Of decode rows: by machine, then by model and sizes."""
    point = point_of(one)
    return _gpus(one), one["variant"], point.precision, point.state, point.batch, point.context


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
