"""Rules on extensions: each decides one of the paper's claims on what extended models of a study do.

As in hinny.study.rules a difference counts when the worst seed of one side beats the best seed of the other by a
margin, and one seed decides nothing.
"""

from __future__ import annotations

from hinny.study.collect import Figure, Table
from hinny.study.rules import LOSS_MARGIN, NOT_SEEN, SEEN, SHARE_MARGIN, SOLVED, UNCLEAR, Verdict, percent, spread

PLAIN = "plain"
"""The method that changes the length alone."""
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


def rope_hurts_extension(table: Table) -> Verdict:
    """C8: after extension the hybrid without positions has the lower loss, whatever is done with the other's RoPE."""
    bare, rope = recipe_of(table, "hybrid", "none"), recipe_of(table, "hybrid", "rope")
    if bare is None or rope is None:
        return Verdict(UNCLEAR, "The study has not one hybrid without positions and one with rotary positions.")
    ours, theirs = methods(table, bare).get(PLAIN, []), methods(table, rope)
    parts, states, read = [], [], ("extended.window_loss",)
    for factor, length in ours:
        mine = _loss(table, bare, PLAIN, factor, length)
        others = {name: _loss(table, rope, name, factor, length)
                  for name, at in theirs.items() if (factor, length) in at}
        if not others:
            continue
        best = min(others, key=lambda name: others[name].value)
        parts.append(f"{factor}x, {length:,} tokens: {spread(mine)} without, {spread(others[best])} with ({best}, the "
                     f"best of {len(others)})")
        states.append(_gap(mine, others[best], LOSS_MARGIN))
        if min(mine.seeds, others[best].seeds) < 2:
            states.append(UNCLEAR)
    if not parts:
        return Verdict(UNCLEAR, "The study does not extend both hybrids to one length.")
    return Verdict(_all(states), f"Loss in nats/token at {'; '.join(parts)}.", read)


def _gap(low: Figure, high: Figure, margin: float) -> str:
    """Whether `low` is below `high` by more than the margin in every pair of seeds (seen), in none (not seen)."""
    if high.low - low.high > margin:
        return SEEN
    return NOT_SEEN if high.high - low.low <= margin else UNCLEAR


def _all(states: list[str]) -> str:
    """Seen, or not, if all of them are."""
    (one, *others) = dict.fromkeys(states)
    return UNCLEAR if others else one


def _loss(table: Table, recipe: str, method: str, factor: int, length: int) -> Figure:
    found = table.find("extended.window_loss", recipe, method=method, factor=factor, length=length)
    assert len(found) == 1, (recipe, method, factor, length)
    return found[0]


def short_training_extends(table: Table) -> Verdict:
    """C28: the hybrid uses the longer context after a short training, and loses nothing at the old length."""
    name = recipe_of(table, "hybrid", "none")
    at = methods(table, name).get(PLAIN, []) if name else []
    if name is None or not at:
        return Verdict(UNCLEAR, "The study extends no hybrid without positions by its length alone.")
    parts, states = [], []
    for factor, _ in at:
        gained, lost = (table.one(f"extended.{what}", name, method=PLAIN, factor=factor) for what in ("gained", "lost"))
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
    at = methods(table, name).get(PLAIN, []) if name else []
    parts, states, read = [], [], ("extended.phonebook.exact",)
    for factor, length in at:
        assert name is not None
        book = table.curve("extended.phonebook.exact", name, "length", method=PLAIN, factor=factor, form="standard")
        inside = [f for f in book if f.number("length") <= length]
        beyond = [f for f in book if f.number("length") > length]
        if not inside or not beyond:
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
    parts, states, read = [], [], ("extended.long_recall",)
    for factor, _ in methods(table, ours).get(PLAIN, []):
        mine = table.one("extended.long_recall", ours, method=PLAIN, factor=factor)
        others = table.find("extended.long_recall", theirs, factor=factor)
        if mine is None or not others:
            continue
        best = max(others, key=lambda figure: figure.value)
        parts.append(f"{factor}x: {spread(mine)} beside {spread(best)} (Transformer, {best.shape['method']})")
        states.append(SEEN if mine.low >= best.high - SHARE_MARGIN else
                      NOT_SEEN if mine.high < best.low - SHARE_MARGIN else UNCLEAR)
        if min(mine.seeds, best.seeds) < 2 or max(mine.value, best.value) < SHARE_MARGIN:
            states.append(UNCLEAR)
    if not parts:
        return Verdict(UNCLEAR, "The study does not extend both to one length.", read)
    return Verdict(_all(states), "Mean share right of Phonebook and copying at lengths past the old one, "
                   f"{'; '.join(parts)}.", read)
