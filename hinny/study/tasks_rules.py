"""Rules on RULER and on multiple choice: each decides one of the paper's claims on what a study's models were asked.

As in hinny.study.rules a difference counts when the worst seed of one side beats the best seed of the other by a
margin, and one seed decides nothing; nor does a task that no model has learned, that is answered half by none, nor
one of few questions, of which a half may be right by luck. Seeds answer the same questions, so their range does not
tell how far other questions would move a share: the margin is at least one standard error of the difference of two
shares of so many questions.
"""

from __future__ import annotations

from hinny.study.collect import FAMILIES, Figure, Table
from hinny.study.longer_rules import plain, recipe_of
from hinny.study.rules import FAILED, NOT_SEEN, PURE, SEEN, SHARE_MARGIN, UNCLEAR, Verdict, not_alike, percent
from hinny.study.tasks import RULER_MEAN

LETTER, TEXT, CLOZE = (f"choice-{form}.acc" for form in ("letter", "text", "cloze"))
EXTENDED_MEAN = f"extended.{RULER_MEAN}"
FAR = 0.10
"""Share by which one must be "far" above another."""
FEW = 32
"""Questions below which nothing is decided; a half of so many is three standard errors above one in four."""


def margin(*figures: Figure) -> float:
    """What a difference between the figures must exceed: 3 points, or sqrt(1 / 2n) for n questions if that is more.

    That is the standard error of the difference of two shares near one half, where it is largest.
    """
    return max(SHARE_MARGIN, (0.5 / min(map(_asked, figures))) ** 0.5)


def above(high: Figure, low: Figure, least: float = SHARE_MARGIN) -> str:
    """Seen: `high` is above `low` by more than the margin, and `least`, in every pair of seeds; not seen: by no more
    than `least` in every pair.
    """
    if high.low - low.high > max(margin(high, low), least):
        return SEEN
    return NOT_SEEN if high.high - low.low <= least else UNCLEAR


def _undecided(table: Table, families: tuple[str, ...], what: str, **shape: object) -> Verdict | None:
    """The verdict where a family is not in the study exactly once, its figure is absent, or a second seed is."""
    for family in families:
        name = table.of_family(family)
        if name is None:
            return Verdict(UNCLEAR, f"The study has not exactly one {FAMILIES[family]}.")
        figure = table.one(what, name, **shape)
        if figure is None:
            where = "".join(f" at {key} {value}" for key, value in shape.items())
            return Verdict(UNCLEAR, f"The {FAMILIES[family]} has no figure {what}{where}.", (what,))
        if figure.seeds < 2:
            return Verdict(UNCLEAR, f"The {FAMILIES[family]} has one seed, so its spread is unknown.", (what,))
        if _asked(figure) < FEW:
            return Verdict(UNCLEAR, f"{_asked(figure)} questions are too few; {FEW} or more decide.", (what,))
    return not_alike(table, [table.of_family(family) for family in families], what)


def _asked(figure: Figure) -> int:
    """How many questions it is the share of."""
    return int(figure.shape["n"])


def _of(table: Table, families: tuple[str, ...], what: str, **shape: object) -> list[Figure]:
    found = [table.one(what, table.of_family(family), **shape) for family in families]
    return [figure for figure in found if figure is not None]


def _unlearned(figures: list[Figure], task: str) -> Verdict | None:
    """The verdict where none of the figures reaches a half in its worst seed."""
    if (best := max(figure.low for figure in figures)) >= FAILED:
        return None
    return Verdict(UNCLEAR, f"No model learned {task} here: the best answers {percent(best)} in its worse seed, less "
                            "than half.", (figures[0].what,))


def _told(figure: Figure) -> str:
    low, high = percent(figure.low), percent(figure.high)
    return percent(figure.value) if low == high else f"{percent(figure.value)} ({low} to {high})"


def _list(families: tuple[str, ...], figures: list[Figure]) -> str:
    return ", ".join(f"{FAMILIES[family]} {_told(figure)}" for family, figure in zip(families, figures, strict=True))


BY_CHOICE = ("transformer", *PURE)


def pure_ssms_lag_by_letter(table: Table) -> Verdict:
    """C13: the Transformer above both pure SSMs where the letter of the right choice is asked."""
    if undecided := _undecided(table, BY_CHOICE, LETTER):
        return undecided
    figures = _of(table, BY_CHOICE, LETTER)
    if undecided := _unlearned(figures, "to choose by letter"):
        return undecided
    states = {above(figures[0], pure) for pure in figures[1:]}
    verdict = states.pop() if len(states) == 1 else UNCLEAR
    return Verdict(verdict, f"Right by letter, chance 25 %: {_list(BY_CHOICE, figures)}.", (LETTER,))


def gap_is_in_the_format(table: Table) -> Verdict:
    """C15: behind the Transformer by letter, level with it or ahead on the same questions as cloze."""
    undecided = _undecided(table, BY_CHOICE, LETTER) or _undecided(table, BY_CHOICE, CLOZE)
    if undecided:
        return undecided
    letter, cloze = _of(table, BY_CHOICE, LETTER), _of(table, BY_CHOICE, CLOZE)
    if undecided := _unlearned(letter, "to choose by letter") or _unlearned(cloze, "the cloze questions"):
        return undecided
    text = _of(table, BY_CHOICE, TEXT)
    shown = [("by letter", letter), *([("by text", text)] if len(text) == len(BY_CHOICE) else []), ("cloze", cloze)]
    said = f"Right {'; '.join(f'{form}: {_list(BY_CHOICE, figures)}' for form, figures in shown)}."
    if any(above(letter[0], pure) != SEEN for pure in letter[1:]):
        return Verdict(UNCLEAR, f"{said} By letter there is no clear gap that a format could explain.", (LETTER, CLOZE))
    states = {above(cloze[0], pure) for pure in cloze[1:]}
    verdict = {frozenset({NOT_SEEN}): SEEN, frozenset({SEEN}): NOT_SEEN}.get(frozenset(states), UNCLEAR)
    return Verdict(verdict, said, (LETTER, *([TEXT] if text else []), CLOZE))


BY_LENGTH = ("hybrid", "transformer", "mamba2")


def hybrid_leads_on_ruler(table: Table) -> Verdict:
    """C24: at the training length the hybrid above the Transformer and far above Mamba-2."""
    length = min(recipe["seq_len"] for recipe in table.about["recipes"].values())
    if undecided := _undecided(table, BY_LENGTH, RULER_MEAN, length=length):
        return undecided
    figures = _of(table, BY_LENGTH, RULER_MEAN, length=length)
    if undecided := _unlearned(figures, f"RULER's tasks at {length:,} tokens"):
        return undecided
    hybrid, transformer, mamba2 = figures
    states = [above(hybrid, transformer), above(hybrid, mamba2, FAR)]
    verdict = NOT_SEEN if NOT_SEEN in states else SEEN if states == [SEEN, SEEN] else UNCLEAR
    return Verdict(verdict, f"Mean over {hybrid.shape['tasks']} RULER tasks at {length:,} tokens: "
                            f"{_list(BY_LENGTH, figures)}.", (RULER_MEAN,))


def extended_hybrid_leads_on_ruler(table: Table) -> Verdict:
    """C25: at the lengths that they were extended to, the hybrid above the Transformer's best method."""
    ours, theirs = recipe_of(table, "hybrid", "none"), recipe_of(table, "transformer")
    if ours is None or theirs is None:
        return Verdict(UNCLEAR, "The study has not one Transformer and one hybrid without positions.")
    if unlike := not_alike(table, [ours, theirs], EXTENDED_MEAN):
        return unlike
    parts, states = [], set()
    method, at = plain(table, ours)
    for factor, length in at:
        mine = table.one(EXTENDED_MEAN, ours, method=method, factor=factor, length=length)
        others = table.find(EXTENDED_MEAN, theirs, factor=factor, length=length)
        if mine is None or not others:
            continue
        best = max(others, key=lambda figure: figure.value)
        learned = max(mine.low, best.low) >= FAILED
        parts.append(f"{factor}x, {length:,} tokens: {_told(mine)} beside {_told(best)} (Transformer, "
                     f"{best.shape['method']}){'' if learned else ', half by neither'}")
        decides = learned and min(mine.seeds, best.seeds) > 1 and min(map(_asked, (mine, best))) >= FEW
        states.add(above(mine, best) if decides else UNCLEAR)
    if not parts:
        return Verdict(UNCLEAR, "The study does not ask RULER of both at one length that both are extended to.",
                       (EXTENDED_MEAN,))
    verdict = states.pop() if len(states) == 1 else UNCLEAR
    return Verdict(verdict, f"Mean over RULER's tasks, {'; '.join(parts)}.", (EXTENDED_MEAN,))
