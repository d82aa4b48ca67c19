"""What generation was asked to reach, and what was measured of it: the first table of docs/results/generation.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hinny.bench.generation_claim import CLAIMED, HYBRID, LIKE_THE_RELEASE, MISSING, contests, table
from hinny.bench.generation_fit import errors_of
from hinny.bench.generation_rows import DECODE, hardware_in, point_of, read_shape
from hinny.bench.kernel_table import Row
from hinny.study.draw import short

BATCHES = (1, 32)
"""Batches that decoding is asked about."""

CONTEXTS = (1024, 4096, 16384, 32768, 131072)
CURVE_BATCHES = (1, 8, 32, 64)
"""The points of the curve beside GQA-8."""

CLAIM_CONTEXT = 15360
"""The longest context of the claim that leaves the Transformer room on two H200."""

PREFILL = 32768

FAMILY = ("8b-hybrid", "8b-mamba2", "8b-transformer")

SMALL = tuple(f"{size}-{kind}" for size in ("tiny", "130m") for kind in ("hybrid", "mamba2", "mamba", "transformer"))
"""Models that a CPU is asked about."""

Goal = tuple[str, str, str, str, Callable[[Sequence[Row]], str]]
"""What, on which machine, at least, aimed at, and what the rows say of it."""


def goals(rows: Sequence[Row]) -> str:
    """The table; a figure without rows is not measured, and says so."""
    lines = [[what, machine, least, aim, said(rows)] for what, machine, least, aim, said in _goals()]
    return "## What was asked\n\n" + table(["what", "on", "at least", "aim", "measured"], lines, "llrrl")


def _goals() -> list[Goal]:
    return [
        (f"8B hybrid over 8B Transformer, {LIKE_THE_RELEASE}, batch 32, context {short(CLAIM_CONTEXT)}: predicted by "
         f"the paper, up to {CLAIMED:g}x", "2 H200", "6x", "10x", _claim),
        ("the same beside GQA-8: contexts 1K … 128K, batches 1 … 64", "1 H200", "", "", _beside_gqa),
        *((f"decode, share of the floor: {name}", "1 H100", "75%", "88%", _floor_of(name)) for name in FAMILY),
        ("8B hybrid, decode over transformers' generate()", "1 H100", "3x", "8x", _over_peer),
        (f"8B hybrid, MFU of a prompt of {short(PREFILL)} tokens", "1 H100", "45%", "55%", _prefill),
        ("prediction, every point of a GPU", "all", "15%", "7%", _prediction),
        ("small models, decode over transformers' generate(), batch 1", "CPU", "2x", "4x", _on_cpu)]


def _claim(rows: Sequence[Row]) -> str:
    found = [pair for contest in contests(rows) if (contest.label, contest.gpus) == (LIKE_THE_RELEASE, "2 H200")
             for pair in contest.pairs if pair.plain and (pair.at.batch, pair.at.context) == (32, CLAIM_CONTEXT)]
    return f"**{found[0].ratio:.2f}x**" if found else MISSING


def _beside_gqa(rows: Sequence[Row]) -> str:
    asked = {(batch, context) for batch in CURVE_BATCHES for context in CONTEXTS}
    contest = next((one for one in contests(rows) if (one.label, one.gpus) == ("GQA-8", "1 H200")), None)
    if contest is None:
        return MISSING
    found = {(pair.at.batch, pair.at.context): pair.ratio for pair in contest.pairs
             if pair.plain and (pair.at.batch, pair.at.context) in asked}
    if not found:
        return MISSING
    without = len(asked & contest.lacking - {*found})
    missing = len(asked) - len(found) - without
    return (f"**{min(found.values()):.2f}x … {max(found.values()):.2f}x** at {len(found)} of {len(asked)} points"
            + (f"; {without} have no room" if without else "") + (f"; {missing} {MISSING}" if missing else ""))


def _floor_of(name: str) -> Callable[[Sequence[Row]], str]:
    def said(rows: Sequence[Row]) -> str:
        parts = []
        for batch in BATCHES:
            shares = {point_of(one).context: one["value"] / one["bound"] for one in rows
                      if one["what"] == DECODE and one["variant"] == name and _on_h100(one, batch)}
            parts.append(f"batch {batch}: " + (", ".join(f"**{shares[context]:.0%}** at {short(context)}"
                                                         for context in sorted(shares)) or MISSING))
        return "; ".join(parts)

    return said


def _on_h100(one: Row, batch: int) -> bool:
    """Whether it is a decode row of one H100 in bfloat16 with float32 states."""
    point = point_of(one)
    return point.hardware is not None and point.hardware.name == "H100" and (
        point.batch, point.tensor, point.precision, point.state) == (batch, 1, "bf16", "fp32")


def _over_peer(rows: Sequence[Row]) -> str:
    parts = []
    for batch in BATCHES:
        # of all ways that the peer was timed in, the one that it was fastest in
        found = [one for one in rows if one["what"] == DECODE and one["variant"] == HYBRID and one["peer"]
                 and _on_h100(one, batch)]
        worst = min(found, key=lambda one: one["ratio"], default=None)
        parts.append(f"batch {batch}: "
                     + (MISSING if worst is None else f"**{worst['ratio']:.2f}x** ({worst['peer']})"))
    return "; ".join(parts)


def _prefill(rows: Sequence[Row]) -> str:
    for one in rows:
        sizes, hardware = read_shape(one), hardware_in(one["machine"])
        if one["what"] == "prefill.mfu" and one["variant"] == HYBRID and hardware is not None \
                and (hardware.name, sizes["gpus"], sizes["precision"], int(sizes["length"])) \
                == ("H100", "1", "bf16", PREFILL):
            return f"**{one['value']:.1%}**"
    return MISSING


def _prediction(rows: Sequence[Row]) -> str:
    found = [error for errors in errors_of(rows) for error, _ in errors.points]
    if not found:
        return MISSING
    near = sum(abs(error) <= 0.15 for error in found)
    alone = [error for errors in errors_of([one for one in rows if "tensor=" not in one.get("shape", "")])
             for error, _ in errors.points]
    return (f"off by **{max(map(abs, found)):.1%}** at most, on one GPU {max(map(abs, alone), default=0):.1%}; {near} "
            f"of {len(found)} points within 15%, {sum(abs(error) <= 0.07 for error in found)} within 7%")


def _on_cpu(rows: Sequence[Row]) -> str:
    ratios: dict[str, float] = {}
    for one in rows:
        name = one["variant"].split()[0]
        if one["what"] == DECODE and one["peer"] and hardware_in(one["machine"]) is None and name in SMALL \
                and point_of(one).batch == 1:
            ratios[name] = min(one["ratio"], ratios.get(name, one["ratio"]))
    return ", ".join(f"{name} " + (f"**{ratios[name]:.2f}x**" if name in ratios else MISSING) for name in SMALL)
