"""Rules that decide the paper's claims on a study's figures: each returns seen, not seen or too small to tell.

A difference counts when the worst seed of one side beats the best seed of the other by a margin; equality when the
means are closer than a margin and each side's seeds are, too. A rule on losses or recall never decides on one seed,
nor on a recall task that no model with attention has learned, nor on models that differ in size or in the tokens that
they saw. Rules on speed are in hinny.study.speed_rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hinny.study.alike import unlike
from hinny.study.collect import FAMILIES, Figure, Table

SEEN, NOT_SEEN, UNCLEAR = "seen", "not seen", "too small to tell"
LOSS_MARGIN = 0.01
"""nats/token: 1 % of perplexity."""
SAME_LOSS = 0.05
"""nats/token within which two losses count as the same quality."""
SHARE_MARGIN = 0.03
"""Share of digits or answers that a difference must exceed."""
SOLVED, FAILED = 0.9, 0.5
PURE = ("mamba", "mamba2")


@dataclass(frozen=True)
class Verdict:
    """What a rule found: the verdict, a sentence with the figures, and the names of the figures it read."""

    verdict: str
    sentence: str
    read: tuple[str, ...] = ()


def percent(value: float) -> str:
    return f"{round(100 * value)}\N{NO-BREAK SPACE}%"


def clearly_above(worse: Figure, better: Figure) -> bool:
    """Whether one loss's lowest seed is above the other's highest by LOSS_MARGIN, and by more than the seeds of either
    are apart: of two seeds that are far apart the next one may be anywhere.
    """
    ranges = worse.high - worse.low, better.high - better.low
    return worse.low - better.high > max(LOSS_MARGIN, *ranges)


def spread(figure: Figure, digits: int = 3) -> str:
    """The mean with its seeds' range: "4.213 (4.201 to 4.225)"."""
    if figure.low == figure.high:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def _missing(table: Table, families: tuple[str, ...], what: str) -> Verdict | None:
    """The verdict where a family is not in the study exactly once, or `what` lacks a second seed."""
    for family in families:
        name = table.of_family(family)
        if name is None:
            return Verdict(UNCLEAR, f"The study has not exactly one {FAMILIES[family]}.")
        if not (found := table.find(what, name)):
            return Verdict(UNCLEAR, f"The {FAMILIES[family]} has no figure {what}.")
        if min(f.seeds for f in found) < 2:
            return Verdict(UNCLEAR, f"The {FAMILIES[family]} has one seed, so its spread is unknown.", (what,))
    return not_alike(table, [table.of_family(family) for family in families], what)


def not_alike(table: Table, names: list[str | None], what: str) -> Verdict | None:
    """The verdict where the models are not of one size, or did not see the same tokens."""
    why = unlike(table.about, names)
    return Verdict(UNCLEAR, f"The models cannot be compared: {why}.", (what,)) if why else None


def _one(table: Table, what: str, family: str) -> Figure:
    found = table.one(what, table.of_family(family))
    assert found is not None, (what, family)
    return found


def same_quality(table: Table) -> Verdict:
    """C11: equal held-out loss of Mamba and Mamba-2."""
    if missing := _missing(table, PURE, "held_out_loss"):
        return missing
    one, two = (_one(table, "held_out_loss", family) for family in PURE)
    gap, wide = abs(one.value - two.value), max(f.high - f.low for f in (one, two))
    text = f"Held-out loss {spread(one)} for Mamba, {spread(two)} for Mamba-2: {gap:.3f} nats/token apart."
    apart = max(two.low - one.high, one.low - two.high)
    verdict = SEEN if gap < SAME_LOSS and wide < SAME_LOSS else NOT_SEEN if apart > SAME_LOSS else UNCLEAR
    return Verdict(verdict, text, ("held_out_loss",))


def _book(table: Table, family: str, form: str = "standard", what: str = "phonebook.exact") -> list[Figure]:
    name = table.of_family(family)
    return table.curve(what, name, "length", form=form) if name else []


def _trained(table: Table) -> int:
    """The training length, tokens; the same for every recipe unless the study lets it differ."""
    return min(recipe["seq_len"] for recipe in table.about["recipes"].values())


def _unlearned(table: Table, form: str = "standard") -> Verdict | None:
    """The verdict where no model with attention answers half the questions, in every seed, at any trained length."""
    books = [f for family in ("transformer", "hybrid") for f in _book(table, family, form)]
    best = max((f.low for f in books if f.number("length") <= _trained(table)), default=0.0)
    if best >= FAILED:
        return None
    return Verdict(UNCLEAR, f"No model with attention learned the {form} Phonebook here: the best answers "
                            f"{percent(best)} in its worse seed, less than half.", ("phonebook.exact",))


def _list(figures: list[Figure]) -> str:
    return ", ".join(f"{percent(f.value)} at {f.number('length')}" for f in figures)


def transformer_solves_phonebook(table: Table) -> Verdict:
    """C16: near-perfect at every length up to the training length."""
    if missing := _missing(table, ("transformer",), "phonebook.exact") or _unlearned(table):
        return missing
    book = [f for f in _book(table, "transformer") if f.number("length") <= _trained(table)]
    if not _reaches(table, book):
        return Verdict(UNCLEAR, "Phonebook was not asked within the longer half of the training length.",
                       ("phonebook.exact",))
    text = f"The Transformer answers {_list(book)} tokens (training length {_trained(table)})."
    if all(f.low >= SOLVED for f in book):
        verdict = SEEN
    else:
        verdict = NOT_SEEN if book[0].low >= SOLVED and any(f.high < SOLVED for f in book) else UNCLEAR
    return Verdict(verdict, text, ("phonebook.exact",))


def _reaches(table: Table, book: list[Figure]) -> bool:
    """Whether figures within the training length go past half of it, so that they say something about "up to"."""
    return bool(book) and book[-1].number("length") > _trained(table) / 2


def _reach(book: list[Figure], best: bool) -> int:
    """The longest length up to which at least half the answers are right, in the best or the worst seed; 0 if none."""
    reach = 0
    for figure in book:
        if (figure.high if best else figure.low) < FAILED:
            break
        reach = figure.number("length")
    return reach


def pure_ssms_fail_phonebook(table: Table) -> Verdict:
    """C17: fewer than half the answers right at half the training length or before, where attention still reaches."""
    if missing := _missing(table, PURE, "phonebook.exact") or _unlearned(table):
        return missing
    trained = _trained(table)
    attention = max(_reach(_book(table, family), best=False) for family in ("transformer", "hybrid"))
    books = {family: _book(table, family) for family in PURE}
    best = {family: _reach(book, best=True) for family, book in books.items()}
    reaches = [f"{FAMILIES[family]} up to {best[family]} tokens, {percent(best[family] / trained)} of the training "
               "length" if best[family] else f"{FAMILIES[family]} at no asked length" for family in PURE]
    text = f"Half the answers are right: {'; '.join(reaches)}; the better model with attention up to {attention}."
    lost = [min((f.number("length") for f in book if f.high < FAILED), default=trained) for book in books.values()]
    if max(lost) <= min(trained / 2, attention):
        verdict = SEEN
    else:
        verdict = NOT_SEEN if all(_reach(book, best=False) >= trained for book in books.values()) else UNCLEAR
    return Verdict(verdict, text, ("phonebook.exact",))


def errors_are_fuzzy(table: Table) -> Verdict:
    """C18: digits of wrong numbers agree with the right number more often than with another prompt's."""
    what = "phonebook.wrong_digits"
    if missing := _missing(table, PURE, "phonebook.chance_digits") or _unlearned(table):
        return missing
    lows, highs, texts = [], [], []
    for family in PURE:
        chance = {f.shape["length"]: f for f in _book(table, family, what="phonebook.chance_digits")}
        # where a seed gave no wrong number its spread is not known
        wrong = [f for f in _book(table, family, what=what) if f.seeds > 1 and f.shape["length"] in chance]
        if not wrong:
            return Verdict(UNCLEAR, f"{FAMILIES[family]} has no length at which two seeds gave wrong numbers, with a "
                                    "chance level to compare with.", (what,))
        lows.append(sum(f.low - chance[f.shape["length"]].high for f in wrong) / len(wrong))
        highs.append(sum(f.high - chance[f.shape["length"]].low for f in wrong) / len(wrong))
        mean, base = (sum(f.value for f in part) / len(wrong)
                      for part in (wrong, [chance[f.shape["length"]] for f in wrong]))
        texts.append(f"{percent(mean)} against {percent(base)} by chance for {FAMILIES[family]}")
    verdict = SEEN if min(lows) > SHARE_MARGIN else NOT_SEEN if max(highs) < SHARE_MARGIN else UNCLEAR
    text = f"Right digits within wrong numbers, each given the true digits in front of it: {'; '.join(texts)}."
    return Verdict(verdict, text, (what, "phonebook.chance_digits"))


def reversing_changes_phonebook(table: Table) -> Verdict:
    """C20: for pure SSMs, the two forms differ, on average over the trained lengths."""
    missing = _missing(table, PURE, "phonebook.exact") or _unlearned(table) or _unlearned(table, "reversed")
    if missing:
        return missing
    clear, same, texts = [], [], []
    for family in PURE:
        forms = [{f.number("length"): f for f in _book(table, family, form)} for form in ("standard", "reversed")]
        lengths = [n for n in forms[0] if n in forms[1] and n <= _trained(table)]
        if not lengths:
            return Verdict(UNCLEAR, "The forms share no length within the training length.", ("phonebook.exact",))
        low, mid, high = ([sum(getattr(form[n], side) for n in lengths) / len(lengths) for form in forms]
                          for side in ("low", "value", "high"))
        clear.append(max(low[1] - high[0], low[0] - high[1]) > SHARE_MARGIN)
        # what answers neither form cannot tell them apart
        same.append(max(high[1] - low[0], high[0] - low[1]) < SHARE_MARGIN and max(low) >= FAILED)
        texts.append(f"{percent(mid[0])} standard, {percent(mid[1])} reversed for {FAMILIES[family]}")
    verdict = SEEN if all(clear) else NOT_SEEN if all(same) else UNCLEAR
    return Verdict(verdict, f"Mean over trained lengths: {'; '.join(texts)}.", ("phonebook.exact",))


def hybrid_solves_phonebook(table: Table) -> Verdict:
    """C21: near-perfect up to the training length, and more than half right at the first length beyond."""
    if missing := _missing(table, ("hybrid",), "phonebook.exact") or _unlearned(table):
        return missing
    book, trained = _book(table, "hybrid"), _trained(table)
    inside = [f for f in book if f.number("length") <= trained]
    beyond = [f for f in book if f.number("length") > trained][:1]
    if not _reaches(table, inside) or not beyond:
        return Verdict(UNCLEAR, "Phonebook was not asked in the longer half of the training length and beyond it.",
                       ("phonebook.exact",))
    text = f"The hybrid answers {_list(inside + beyond)} tokens (training length {trained})."
    if all(f.low >= SOLVED for f in inside) and beyond[0].low >= FAILED:
        verdict = SEEN
    else:
        fails = any(f.high < SOLVED for f in inside) or beyond[0].high < FAILED
        verdict = NOT_SEEN if inside[0].low >= SOLVED and fails else UNCLEAR
    return Verdict(verdict, text, ("phonebook.exact",))


def crossover(table: Table) -> Verdict:
    """C34: the Transformer ahead at two neighbouring points of training, the hybrid ahead at its end."""
    if missing := _missing(table, ("transformer", "hybrid"), "held_out_curve"):
        return missing
    curves = [{f.number("tokens"): f for f in table.find("held_out_curve", table.of_family(family))}
              for family in ("transformer", "hybrid")]
    points = [(n, curves[0][n], curves[1][n]) for n in sorted(curves[0]) if n in curves[1]]
    if len(points) < 3:
        return Verdict(UNCLEAR, "Held-out loss was taken at fewer than three common points.", ("held_out_curve",))
    end = min(table.about["recipes"][f.variant].get("tokens", points[-1][0]) for f in points[-1][1:])
    if points[-1][0] < 0.99 * end:
        return Verdict(UNCLEAR, f"Held-out loss was last taken of both at {points[-1][0]:,} of {end:,} tokens.",
                       ("held_out_curve",))
    lags = [clearly_above(ours, base) for _, base, ours in points]
    # early in training seeds differ most, and one point of many is soon apart by chance
    behind = any(map(all, pairwise(lags)))
    _, base, ours = points[-1]
    ahead = clearly_above(base, ours)
    text = (f"At the end: hybrid {spread(ours)}, Transformer {spread(base)}; the hybrid lags clearly at "
            f"{sum(lags)} of {len(points)} points.")
    never = all(clearly_above(base, ours) for _, base, ours in points)
    verdict = SEEN if ahead and behind else NOT_SEEN if never else UNCLEAR
    return Verdict(verdict, text, ("held_out_curve",))
