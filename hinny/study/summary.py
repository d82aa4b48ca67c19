"""The answer in short: the table of one line a measure, and sentences made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hinny.study.claims import Judged
from hinny.study.collect import Figure, Table
from hinny.study.figures import predicted_size, ratio_sentence
from hinny.study.longer_figures import sentence
from hinny.study.rules import FAILED, NOT_SEEN, SEEN, UNCLEAR, percent
from hinny.study.tasks_figures import ruler_means

SEEDS, TIMINGS, COUNTED = "seeds", "repeated timings", "counted"
"""What a measure's range is of."""
LISTED = 6
"""Models up to which a sentence names each."""


@dataclass(frozen=True)
class Cell:
    """One model's figure: its mean, the range of its seeds or timings, whether nothing is clearly better."""

    text: str
    range: str = ""
    best: bool = False


@dataclass(frozen=True)
class Score:
    """A mean over figures of one model, with the means of their lows and highs."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """How a line of the table is made: which figures, how printed, which way is better, and what its range is of."""

    key: str
    title: str
    unit: str
    lower: bool
    form: Callable[[float], str]
    pick: Callable[[Table, str], list[Figure]]
    spread: str = SEEDS
    short: str = ""
    """The title at the head of a column among many; empty: the title itself."""

    @property
    def head(self) -> str:
        return self.short or self.title

    @property
    def note(self) -> str:
        """The unit and which way is better, in few characters."""
        return f"{self.unit} {'↓' if self.lower else '↑'}".strip()


@dataclass(frozen=True)
class Line:
    """One measure of all models: as printed, as scores of those that have it, and its figures."""

    title: str
    unit: str
    hint: str
    cells: list[Cell]
    figures: list[Figure]
    measure: Measure
    scores: dict[str, Score]


def mean(figures: list[Figure]) -> Score:
    """One score of several figures, for instance of all lengths."""
    return Score(*(sum(getattr(f, side) for f in figures) / len(figures) for side in ("value", "low", "high")))


def trained_length(table: Table) -> int:
    return min(recipe["seq_len"] for recipe in table.about["recipes"].values())


def book(table: Table, name: str, beyond: bool, form: str = "standard") -> list[Figure]:
    """Exact Phonebook within the training length, or beyond it."""
    figures = table.curve("phonebook.exact", name, "length", form=form)
    return [f for f in figures if (f.number("length") > trained_length(table)) == beyond]


def _last(what: str) -> Callable[[Table, str], list[Figure]]:
    return lambda table, name: table.curve(what, name, "context")[-1:]


def _measures(table: Table) -> list[Measure]:
    contexts = [f.number("context") for f in table.find("decode")]
    longest, trained = (f"{max(contexts):,}" if contexts else ""), f"{trained_length(table):,}"
    return [
        Measure("text", "Held-out loss", "nats/token", True, "{:.3f}".format, lambda t, n: t.find("held_out_loss", n)),
        Measure("bits", "Bits per byte", "", True, "{:.3f}".format, lambda t, n: t.find("bits_per_byte", n)),
        Measure("recall", f"Phonebook up to {trained} tokens", "exact", False, percent,
                lambda t, n: book(t, n, beyond=False),
                short=f"Phonebook to {trained}"),
        Measure("beyond", f"Phonebook beyond {trained}", "exact", False, percent, lambda t, n: book(t, n, beyond=True)),
        Measure("pairs", "Multi-query recall", "right", False, percent, lambda t, n: t.find("mqar.accuracy", n)),
        Measure("copying", "Copying", "right", False, percent, lambda t, n: t.find("copy.accuracy", n)),
        Measure("ruler", f"RULER up to {trained} tokens", "mean of tasks", False, percent,
                lambda t, n: ruler_means(t, n, beyond=False), short=f"RULER to {trained}"),
        Measure("ruler beyond", f"RULER beyond {trained}", "mean of tasks", False, percent,
                lambda t, n: ruler_means(t, n, beyond=True)),
        Measure("letter", "Choice by letter", "right", False, percent, lambda t, n: t.find("choice-letter.acc", n)),
        Measure("choice", "Choice by text", "right", False, percent, lambda t, n: t.find("choice-text.acc", n)),
        Measure("cloze", "Cloze questions", "right", False, percent, lambda t, n: t.find("choice-cloze.acc", n)),
        Measure("training", "Training speed", "tokens/s", False, "{:,.0f}".format, lambda t, n: t.find("train", n),
                TIMINGS),
        Measure("mfu", "Share of the GPU's peak in training", "MFU", False, percent,
                lambda t, n: t.find("train.mfu", n), TIMINGS, short="Of the GPU's peak"),
        Measure("decode", f"Decode after {longest} tokens", "tokens/s", False, "{:,.0f}".format, _last("decode"),
                TIMINGS, short=f"Decode after {longest}"),
        Measure("memory", f"State and cache at {longest}", "bytes", True, in_bytes, _last("state_bytes"), COUNTED,
                short=f"State at {longest}"),
    ]


def counted(number: int) -> str:
    """A number of parameters in few characters: "45.3M"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def in_bytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def columns(table: Table) -> list[Line]:
    """The short table: a line for each measure that at least one model has."""
    names = list(table.about["recipes"])
    picked = [(measure, {name: measure.pick(table, name) for name in names}) for measure in _measures(table)]
    return [_line(measure, found) for measure, found in picked if any(found.values())]


def _line(measure: Measure, found: dict[str, list[Figure]]) -> Line:
    scores = {name: mean(figures) for name, figures in found.items() if figures}
    figures = [f for part in found.values() for f in part]
    best = leaders(scores, measure.lower) if comparable(figures) else []
    cells = []
    for name in found:
        if name not in scores:
            cells.append(Cell("–"))
            continue
        score = scores[name]
        text, low, high = (measure.form(v) for v in (score.value, score.low, score.high))
        cells.append(Cell(text, f"{low} – {high}" if low != high else "", name in best))
    return Line(measure.title, measure.unit, "lower is better" if measure.lower else "higher is better", cells, figures,
                measure, scores)


def comparable(figures: list[Figure]) -> bool:
    """Whether the figures are no timings of several machines: a study may have gone on on another one."""
    return len({f.machine for f in figures if f.what in ("train", "decode", "prefill")}) < 2


def leaders(scores: dict[str, Score], lower: bool) -> list[str]:
    """The best by its mean, and those whose range meets its range; nobody where that is everybody."""
    if not scores:
        return []
    top = (min if lower else max)(scores, key=lambda name: scores[name].value)
    same = [name for name, s in scores.items() if name == top or (
        s.low <= scores[top].high if lower else s.high >= scores[top].low)]
    return same if len(same) < len(scores) else []


def answer(table: Table, judged: list[Judged]) -> list[str]:
    """The report's first sentences, all from figures."""
    parts = [_text(table), _groups(table), _recall(table), _generation(table), ratio_sentence(table), sentence(table),
             _verdicts(judged)]
    if parts[4]:
        at = f"At {size}, decode" if (size := predicted_size(table)) else "Decode"
        parts[4] = f"{at} speed predicted from bytes and FLOPs, {parts[4][0].lower()}{parts[4][1:]}"
    return [part for part in parts if part]


def _scores(table: Table, what: Callable[[str], list[Figure]]) -> dict[str, Score]:
    return {name: mean(found) for name in table.about["recipes"] if (found := what(name))}


def said(table: Table, names: list[str]) -> str:
    """The recipes' names as a part of a sentence."""
    labels = [table.label(name) for name in names]
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _text(table: Table) -> str:
    scores = _scores(table, lambda name: table.find("held_out_loss", name))
    if len(scores) < 2:
        return ""
    order = sorted(scores, key=lambda name: scores[name].value)
    best = leaders(scores, lower=True)
    if not best:
        return "On held-out text the models cannot be told apart: the ranges of their seeds overlap."
    worst = order[-1]
    lead = f"{said(table, best)} predict{'s' if len(best) == 1 else ''} held-out text best"
    gap = scores[worst].value - scores[order[0]].value
    return (f"{lead}: {scores[order[0]].value:.3f} nats/token, {gap:.3f} less than {table.label(worst)}, the last of "
            f"{len(order)}{'' if len(best) == 1 else '; their seeds do not tell them apart'}.")


def _groups(table: Table) -> str:
    """Where the models are not all of one size, that the best of all may be the largest."""
    groups = {recipe.get("group", "") for recipe in table.about["recipes"].values()}
    return (f"These are {len(groups)} groups of models, each matched in itself alone: between groups sizes differ, so "
            "the best of all may be no more than the largest.") if len(groups) > 1 else ""


def _recall(table: Table) -> str:
    scores = _scores(table, lambda name: book(table, name, beyond=False))
    if not scores:
        return ""
    order = sorted(scores, key=lambda name: -scores[name].value)
    named = order if len(order) <= LISTED else [*order[:3], order[-1]]
    listed = ", ".join(f"{table.label(name)} {percent(scores[name].value)}" for name in named)
    listed += f" (the best three of {len(order)}, and the last)" if named != order else ""
    if scores[order[0]].value < FAILED:
        return f"No model recalls half of the phone numbers at this size: {listed} exactly right."
    return f"Phone numbers recalled exactly from prompts up to the training length: {listed}."


def _generation(table: Table) -> str:
    speed = _scores(table, lambda name: _last("decode")(table, name))
    size = _scores(table, lambda name: _last("state_bytes")(table, name))
    contexts = [f.number("context") for f in table.find("decode")]
    if len(speed) < 2 or set(size) != set(speed) or not comparable(table.find("decode")):
        return ""
    fast, slow = max(speed, key=lambda n: speed[n].value), min(speed, key=lambda n: speed[n].value)
    small, large = min(size, key=lambda n: size[n].value), max(size, key=lambda n: size[n].value)
    times = speed[fast].value / speed[slow].value
    carried = (f"{table.label(small)} carries {in_bytes(size[small].value)} a sequence against "
               f"{in_bytes(size[large].value)} of {table.label(large)}")
    if f"{times:.1f}" == "1.0":
        return f"After {max(contexts):,} tokens all decode at the same speed on this machine; {carried}."
    return (f"After {max(contexts):,} tokens {table.label(fast)} decodes {times:.1f} times "
            f"as fast as {table.label(slow)} on this machine, and {carried}.")


def _verdicts(judged: list[Judged]) -> str:
    tested = [j for j in judged if j.tested]
    if not tested:
        return f"None of the paper's {len(judged)} claims is tested here."
    count = {verdict: sum(j.verdict.verdict == verdict for j in tested) for verdict in (SEEN, NOT_SEEN, UNCLEAR)}
    return (f"Of the paper's {len(judged)} claims {len(tested)} {'is' if len(tested) == 1 else 'are'} tested here: "
            f"{count[SEEN]} seen, {count[NOT_SEEN]} not seen, and of {count[UNCLEAR]} this study is too small to tell.")
