"""The paper's "up to 8x faster", from decode rows: a hybrid beside a Transformer at the same points of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hinny.bench.generation_rows import DECODE, SKIPPED, Point, point_of
from hinny.bench.kernel_table import Row
from hinny.study.draw import Panel, Series, draw, short
from hinny.study.draw import Point as Dot
from hinny.study.svg import standalone

HYBRID, TRANSFORMER = "8b-hybrid", "8b-transformer"

CLAIMED = 8.0
"""Times faster that the paper predicts the hybrid to be, at most."""

LIKE_THE_RELEASE = "MHA"
"""The Transformer that the paper has: as many key heads as heads."""

MISSING = "not measured"


@dataclass(frozen=True)
class Pair:
    """A hybrid's and a Transformer's decode row at the same batch, context, precision and machine."""

    hybrid: Row
    other: Row
    at: Point
    """Of the Transformer, whose rows have no states."""
    states: str

    @property
    def label(self) -> str:
        """Which Transformer."""
        return _label(self.at)

    @property
    def ratio(self) -> float:
        """Times that the hybrid is faster."""
        return self.hybrid["value"] / self.other["value"]

    @property
    def predicted(self) -> float | None:
        """The same by the prediction."""
        ours, theirs = point_of(self.hybrid).predicted(), self.at.predicted()
        return None if ours is None or theirs is None else ours / theirs

    @property
    def plain(self) -> bool:
        """Whether it is of bfloat16 weights and float32 states."""
        return (self.at.precision, self.states) == ("bf16", "fp32")


@dataclass(frozen=True)
class Contest:
    """All pairs of one kind of Transformer on as many GPUs of a kind, by batch, then context."""

    label: str
    gpus: str
    pairs: list[Pair]
    lacking: frozenset[tuple[int, int]]
    """Batch and context of points that one of the two did not have the memory for."""

    @property
    def picture(self) -> str:
        """The name of its picture's file."""
        return f"generation-{self.label}-{self.gpus.replace(' ', 'x')}.svg".lower()

    @property
    def curves(self) -> dict[int, list[Pair]]:
        """Batch → pairs of at least two contexts, in bfloat16 with float32 states."""
        lines: dict[int, list[Pair]] = {}
        for pair in self.pairs:
            if pair.plain:
                lines.setdefault(pair.at.batch, []).append(pair)
        return {batch: line for batch, line in lines.items() if len(line) > 1}


def contests(rows: Sequence[Row]) -> list[Contest]:
    """Those that there are pairs of; the Transformer of the paper first."""
    hybrids = [(point_of(one), one) for one in rows if one["what"] == DECODE and one["variant"] == HYBRID]
    found: dict[tuple[str, str], dict[tuple[object, ...], Pair]] = {}
    for other in (one for one in rows if one["what"] == DECODE and one["variant"].split()[0] == TRANSFORMER):
        at = point_of(other)
        for point, hybrid in hybrids:
            if at.hardware is not None and _where(point) == _where(at):
                pair = Pair(hybrid, other, at, point.state)
                found.setdefault((_label(at), gpus(at)), {}).setdefault((*_where(at), point.state), pair)
    return [Contest(label, where, sorted(pairs.values(), key=lambda p: (p.at.batch, p.at.context)),
                    _lacking(rows, label, where))
            for (label, where), pairs in sorted(found.items(), key=lambda one: (one[0][0] != LIKE_THE_RELEASE, one[0]))]


def gpus(point: Point) -> str:
    """Of a point on GPUs: how many of which."""
    assert point.hardware is not None
    return f"{point.tensor} {point.hardware.name}"


def section(contest: Contest) -> str:
    """The measured ratios as a table, with those of the prediction and, beside the paper's Transformer, its claim."""
    claim = contest.label == LIKE_THE_RELEASE
    lines = [[f"{pair.at.batch}", short(pair.at.context), pair.states, f"{pair.hybrid['value']:,.0f}",
              f"{pair.other['value']:,.0f}", f"**{pair.ratio:.2f}x**",
              "" if pair.predicted is None else f"{pair.predicted:.2f}x", *([f"up to {CLAIMED:g}x"] if claim else [])]
             for pair in contest.pairs]
    heads = ["batch", "context", "states", "hybrid tok/s", "Transformer tok/s", "measured", "predicted",
             *(["the paper"] if claim else [])]
    shown = [f"![Times that the hybrid is faster, by context]({contest.picture})\n"] if contest.curves else []
    return "\n".join([f"### Beside {contest.label}, on {contest.gpus}\n", *shown, *_grid(contest),
                      table(heads, lines, "rrlrrrrr"[:len(heads)])])


def _grid(contest: Contest) -> list[str]:
    """Batch by context, where there are two of both at least: measured and, in brackets, predicted ratios."""
    pairs = {(pair.at.batch, pair.at.context): pair for pair in contest.pairs if pair.plain}
    batches, contexts = (sorted({place[i] for place in {*pairs} | contest.lacking}) for i in (0, 1))
    if len(batches) < 2 or len(contexts) < 3:
        return []

    def cell(batch: int, context: int) -> str:
        if (pair := pairs.get((batch, context))) is None:
            return "no room" if (batch, context) in contest.lacking else MISSING
        return f"**{pair.ratio:.2f}x**" + ("" if pair.predicted is None else f" ({pair.predicted:.2f}x)")

    lines = [[f"batch {batch}", *(cell(batch, context) for context in contexts)] for batch in batches]
    return ["Times that the hybrid is faster, in brackets as predicted; no room: the memory does not hold one of the "
            "two.\n", table(["", *map(short, contexts)], lines, "l" + "r" * len(contexts))]


def curve(contest: Contest) -> str:
    """The picture: a line a batch, dashed as predicted; beside the paper's Transformer what it claims."""
    series = []
    for colour, (batch, line) in enumerate(sorted(contest.curves.items())):
        dots = [Dot(pair.at.context, pair.ratio, pair.hybrid["low"] / pair.other["high"],
                    pair.hybrid["high"] / pair.other["low"]) for pair in line]
        series.append(Series(f"batch {batch}", dots, colour))
        said = [Dot(pair.at.context, pair.predicted, pair.predicted, pair.predicted) for pair in line
                if pair.predicted is not None]
        if said:
            series.append(Series("", said, colour, dashed=True))
    if contest.label == LIKE_THE_RELEASE:
        ends = [pair.at.context for line in contest.curves.values() for pair in line]
        claimed = [Dot(x, CLAIMED, CLAIMED, CLAIMED) for x in (min(ends), max(ends))]
        series.append(Series(f"paper: up to {CLAIMED:g}x", claimed, len(contest.curves), dashed=True))
    return standalone(draw(Panel("", "context, tokens; dashed: predicted", f"times faster than {contest.label}", series,
                                 log_x=True, format_y=lambda value: f"{value:g}x")))


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], sides: str) -> str:
    """A Markdown table; sides: l or r of each column. Nothing without lines."""
    if not lines:
        return ""
    assert len(heads) == len(sides), (heads, sides)
    rule = [{"l": "---", "r": "---:"}[side] for side in sides]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines)) + "\n"


def _where(point: Point) -> tuple[object, ...]:
    """What two points share that are beside each other."""
    return point.batch, point.context, point.precision, point.tensor, point.hardware


def _label(point: Point) -> str:
    assert point.model.attention is not None
    a = point.model.attention
    return "MHA" if a.n_kv_heads == a.n_heads else f"GQA-{a.n_kv_heads}"


def _lacking(rows: Sequence[Row], label: str, where: str) -> frozenset[tuple[int, int]]:
    found = set()
    for one in (one for one in rows if one["what"] == SKIPPED):
        point = point_of(one)
        ours = one["variant"] == HYBRID or (one["variant"].split()[0] == TRANSFORMER and _label(point) == label)
        if ours and point.hardware is not None and gpus(point) == where:
            found.add((point.batch, point.context))
    return frozenset(found)
