"""Rules on extensions: each decides one of the paper's claims on what extended models of a study do.

As in hinny.study.rules a difference counts when the worst seed of one side beats the best seed of the other by a
margin, and one seed decides nothing.
"""

from __future__ import annotations

from hinny.study.collect import Figure, Table
from hinny.study.rules import (
    FAILED,
    LOSS_MARGIN,
    NOT_SEEN,
    SEEN,
    SHARE_MARGIN,
    SOLVED,
    UNCLEAR,
    Verdict,
    clearly_above,
    not_alike,
    percent,
    spread,
)

LOST = 0.02
"""nats/token that the loss at the base's length may rise by: 2 % of perplexity."""


def recipe_of(table: Table, family: str, positions: str | None = None) -> str | None:
    """The study's recipe of that family, with those positions of attention if given, if there is exactly one."""
    names = [name for name, recipe in table.about["recipes"].items()
             if recipe["family"] == family and positions in (None, recipe.get("positions"))]
    return names[0] if len(names) == 1 else None


def methods(table: Table, recipe: str) -> dict[str, list[tuple[int, int]]]:
    """Method → (factor, length) of each extension of the recipe that has figures."""
    found: dict[str, list[tuple[int, int]]] = {}
    for one in table.about.get("extensions", []):
        if one["recipe"] == recipe and table.find("extended.window_loss", recipe, method=one["method"],
                                                   factor=one["factor"]):
            found.setdefault(one["method"], []).append((one["factor"], one["length"]))
    return found


def plain(table: Table, recipe: str | None) -> tuple[str, list[tuple[int, int]]]:
    """The method that changes the recipe's length alone, and (factor, length) of its extensions; none where there is no
    such method, or more than one.

    What a study itself sets for every extension (length, batch, steps, rate, warm-up) is not the method's.
    """
    if recipe is None:
        return "", []
    found = methods(table, recipe)
    names = {one["method"] for one in table.about.get("extensions", []) if one["method"] in found
             and one["recipe"] == recipe and not one.get("changes", [] if one["method"] == "plain" else [""])}
    if len(names) != 1:
        return "", []
    (name,) = names
    return name, found[name]


def rope_hurts_extension(table: Table) -> Verdict:
    """C8: after extension the hybrid without positions has the lower loss, whatever is done with the other's RoPE."""
    bare, rope = recipe_of(table, "hybrid", "none"), recipe_of(table, "hybrid", "rope")
    if bare is None or rope is None:
        return Verdict(UNCLEAR, "The study has not one hybrid without positions and one with rotary positions.")
    if unlike := not_alike(table, [bare, rope], "extended.window_loss"):
        return unlike
    (name, ours), theirs = plain(table, bare), methods(table, rope)
    parts, states, read = [], [], ("extended.window_loss",)
    for factor, length in ours:
        mine = _loss(table, bare, name, factor, length)
        others = {method: loss for method, at in theirs.items() if (factor, length) in at
                  and (loss := _loss(table, rope, method, factor, length)) is not None}
        if mine is None or not others:
            continue
        best = min(others, key=lambda method: others[method].value)
        parts.append(f"{factor}x, {length:,} tokens: {spread(mine)} without, {spread(others[best])} with ({best}, the "
                     f"best of {len(others)})")
        states.append(_gap(mine, others[best]))
        if min(mine.seeds, others[best].seeds) < 2:
            states.append(UNCLEAR)
    if not parts:
        return Verdict(UNCLEAR, "The study does not extend both hybrids to one length.")
    return Verdict(_all(states), f"Loss in nats/token at {'; '.join(parts)}.", read)


def _gap(low: Figure, high: Figure) -> str:
    """Whether `low` is clearly below `high` (seen), or by more than the margin in no pair of seeds (not seen)."""
    if clearly_above(high, low):
        return SEEN
    return NOT_SEEN if high.high - low.low <= LOSS_MARGIN else UNCLEAR


def _all(states: list[str]) -> str:
    """Seen, or not, if all of them are."""
    (one, *others) = dict.fromkeys(states)
    return UNCLEAR if others else one


def _loss(table: Table, recipe: str, method: str, factor: int, length: int) -> Figure | None:
    """The loss in windows of that length; None where there is not exactly one figure."""
    return table.one("extended.window_loss", recipe, method=method, factor=factor, length=length)


def short_training_extends(table: Table) -> Verdict:
    """C28: the hybrid uses the longer context after a short training, and loses nothing at the old length."""
    name = recipe_of(table, "hybrid", "none")
    method, at = plain(table, name)
    if name is None or not at:
        return Verdict(UNCLEAR, "The study extends no hybrid without positions by its length alone.")
    parts, states = [], []
    for factor, _ in at:
        gained, lost = (table.one(f"extended.{what}", name, method=method, factor=factor)
                        for what in ("gained", "lost"))
        if gained is None or lost is None:
            return Verdict(UNCLEAR, "The base was not asked at its own length.")
        parts.append(f"{factor}x: {spread(gained)} gained, {spread(lost)} lost")
        states.append(SEEN if gained.low > LOSS_MARGIN and lost.high < LOST else
                      NOT_SEEN if gained.high <= LOSS_MARGIN or lost.low >= LOST else UNCLEAR)
        if min(gained.seeds, lost.seeds) < 2:
            states.append(UNCLEAR)
    return Verdict(_all(states), "Loss in nats/token, gained by the longer context and lost at the old length: "
                   f"{'; '.join(parts)}.", ("extended.gained", "extended.lost"))


def recall_past_the_extension(table: Table) -> Verdict:
    """C29: Phonebook stays solved at a length past the one that the hybrid was extended to."""
    name = recipe_of(table, "hybrid", "none")
    method, at = plain(table, name)
    parts, states, read = [], [], ("extended.phonebook.exact",)
    for factor, length in at:
        assert name is not None
        book = table.curve("extended.phonebook.exact", name, "length", method=method, factor=factor, form="standard")
        inside = [f for f in book if f.number("length") <= length]
        beyond = [f for f in book if f.number("length") > length]
        if not inside or not beyond:
            parts.append(f"extended to {length:,}: not asked on both sides of it")
            states.append(UNCLEAR)
            continue
        asked = beyond[0]
        parts.append(f"extended to {length:,}: {percent(inside[-1].value)} there, {percent(asked.value)} at "
                     f"{asked.number('length'):,}")
        if min(inside[-1].low, asked.low) >= SOLVED and asked.seeds > 1:
            states.append(SEEN)
        else:
            solved = inside[-1].low >= SOLVED and asked.seeds > 1
            states.append(NOT_SEEN if solved and asked.high < SOLVED else UNCLEAR)
    if not parts:
        return Verdict(UNCLEAR, "The study asks no extended hybrid for phone numbers past its length.", read)
    return Verdict(_all(states), f"Phonebook, hybrid without positions, {'; '.join(parts)} tokens.", read)


def hybrid_keeps_up(table: Table) -> Verdict:
    """C30: recall at the new lengths, hybrid beside the Transformer's best method."""
    ours, theirs = recipe_of(table, "hybrid", "none"), recipe_of(table, "transformer")
    if ours is None or theirs is None:
        return Verdict(UNCLEAR, "The study has not one Transformer and one hybrid without positions.")
    if unlike := not_alike(table, [ours, theirs], "extended.long_recall"):
        return unlike
    parts, states, read = [], [], ("extended.long_recall",)
    method, at = plain(table, ours)
    for factor, _ in at:
        mine = table.one("extended.long_recall", ours, method=method, factor=factor)
        others = table.find("extended.long_recall", theirs, factor=factor)
        if mine is None or not others:
            continue
        best = max(others, key=lambda figure: figure.value)
        parts.append(f"{factor}x: {spread(mine)} beside {spread(best)} (Transformer, {best.shape['method']})")
        states.append(SEEN if mine.low >= best.high - SHARE_MARGIN else
                      NOT_SEEN if mine.high < best.low - SHARE_MARGIN else UNCLEAR)
        # a task that neither has learned decides nothing
        if min(mine.seeds, best.seeds) < 2 or max(mine.low, best.low) < FAILED:
            states.append(UNCLEAR)
    if not parts:
        return Verdict(UNCLEAR, "The study does not extend both to one length.", read)
    return Verdict(_all(states), "Mean share right of Phonebook and copying at lengths past the old one, "
                   f"{'; '.join(parts)}.", read)
