"""Each rule on extensions, on invented figures: what makes it say seen, not seen, and too small to tell."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hinny.config import load_recipe
from hinny.study import longer_rules
from hinny.study.collect import Figure, Table, describe
from hinny.study.colours import colour
from hinny.study.draw import INK, draw
from hinny.study.longer_figures import changes, extended_plots, sentence
from hinny.study.rules import NOT_SEEN, SEEN, UNCLEAR

EXTENDED = (("30m-transformer", "plain", 4, ()), ("30m-transformer", "yarn", 4, ("rope_scaling",)),
            ("30m-hybrid", "plain", 4, ()), ("30m-hybrid-rope", "plain", 4, ()))


def table(*figures: Figure, extended: tuple[tuple[str, str, int, tuple[str, ...]], ...] = EXTENDED) -> Table:
    """extended: recipe, method, factor and what the method changes besides the length."""
    recipes = {name: describe(load_recipe(name)) for name in ("30m-transformer", "30m-hybrid", "30m-hybrid-rope")}
    extensions = [{"recipe": name, "method": method, "factor": factor, "length": 1024 * factor,
                   "changes": list(changes)} for name, method, factor, changes in extended]
    return Table(list(figures), {"recipes": recipes, "predicted": {}, "extensions": extensions})


def figure(what: str, variant: str, low: float, high: float, seeds: int = 2, **shape: object) -> Figure:
    told = {"method": "plain", "factor": 4, **shape}
    return Figure(f"extended.{what}", variant, {key: str(value) for key, value in told.items()}, (low + high) / 2, low,
                  high, "", seeds, "hinny eval", "c", "m")


def losses(variant: str, low: float, high: float, **more: Any) -> Figure:
    return figure("window_loss", variant, low, high, length=4096, **more)


@pytest.mark.parametrize(("theirs", "seeds", "verdict"), [
    ((3.02, 3.03), 2, SEEN), ((3.005, 3.03), 2, UNCLEAR), ((2.99, 3.005), 2, NOT_SEEN), ((3.02, 3.03), 1, UNCLEAR)])
def test_rope_hurts_the_hybrid_only_if_every_pair_of_seeds_says_so(theirs: Any, seeds: int, verdict: str) -> None:
    found = longer_rules.rope_hurts_extension(table(losses("30m-hybrid", 3.0, 3.005, seeds=seeds),
                                                    losses("30m-hybrid-rope", *theirs, seeds=seeds)))
    assert found.verdict == verdict, found
    assert "at 4x, 4,096 tokens: 3.00" in found.sentence


@pytest.mark.parametrize(("gained", "lost", "seeds", "verdict"), [
    ((0.1, 0.2), (-0.01, 0.01), 2, SEEN), ((0.1, 0.2), (-0.01, 0.03), 2, UNCLEAR), ((0.1, 0.2), (0.03, 0.04), 2,
                                                                                  NOT_SEEN),
    ((-0.1, 0.0), (0.0, 0.0), 2, NOT_SEEN), ((0.1, 0.2), (0.0, 0.0), 1, UNCLEAR)])
def test_a_short_training_extends_if_it_gains_and_does_not_lose(gained: Any, lost: Any, seeds: int,
                                                                verdict: str) -> None:
    found = longer_rules.short_training_extends(table(
        losses("30m-hybrid", 3.0, 3.0), figure("gained", "30m-hybrid", *gained, seeds=seeds),
        figure("lost", "30m-hybrid", *lost, seeds=seeds)))
    assert found.verdict == verdict, found


@pytest.mark.parametrize(("inside", "beyond", "seeds", "verdict"), [
    ((0.95, 1.0), (0.9, 1.0), 2, SEEN), ((0.95, 1.0), (0.2, 0.8), 2, NOT_SEEN), ((0.5, 0.6), (0.2, 0.3), 2, UNCLEAR),
    ((0.95, 1.0), (0.2, 0.95), 2, UNCLEAR), ((1.0, 1.0), (1.0, 1.0), 1, UNCLEAR)])
def test_recall_past_the_extension(inside: Any, beyond: Any, seeds: int, verdict: str) -> None:
    book = [figure("phonebook.exact", "30m-hybrid", *share, seeds=seeds, length=length, form="standard")
            for length, share in ((4096, inside), (8192, beyond), (16384, (0.0, 0.0)))]
    assert longer_rules.recall_past_the_extension(table(losses("30m-hybrid", 3.0, 3.0), *book)).verdict == verdict


@pytest.mark.parametrize(("ours", "theirs", "seeds", "verdict"), [
    ((0.6, 0.7), (0.5, 0.62), 2, SEEN), ((0.4, 0.45), (0.5, 0.6), 2, NOT_SEEN), ((0.4, 0.6), (0.5, 0.6), 2, UNCLEAR),
    ((0.6, 0.7), (0.5, 0.6), 1, UNCLEAR), ((0.0, 0.0), (0.0, 0.0), 2, UNCLEAR),
    # neither has learned it
    ((0.4, 0.49), (0.3, 0.4), 2, UNCLEAR), ((0.04, 0.05), (0.3, 0.4), 2, UNCLEAR)])
def test_the_hybrid_is_compared_with_the_transformers_best_method(ours: Any, theirs: Any, seeds: int,
                                                                  verdict: str) -> None:
    found = longer_rules.hybrid_keeps_up(table(
        losses("30m-hybrid", 3.0, 3.0), figure("long_recall", "30m-hybrid", *ours, seeds=seeds),
        figure("long_recall", "30m-transformer", 0.0, 0.1), figure("long_recall", "30m-transformer", *theirs,
                                                                   seeds=seeds, method="yarn")))
    assert found.verdict == verdict, found
    assert "yarn" in found.sentence or max(theirs) <= 0.1


def test_the_length_alone_is_what_a_method_changes_not_what_it_is_called() -> None:
    gained, lost = (("30m-hybrid", 0.1, 0.11), ("30m-hybrid", 0.0, 0.001))

    def judged(method: str, changes: tuple[str, ...]) -> str:
        figures = [losses("30m-hybrid", 3.0, 3.0, method=method), figure("gained", *gained, method=method),
                   figure("lost", *lost, method=method)]
        return longer_rules.short_training_extends(
            table(*figures, extended=(("30m-hybrid", method, 4, changes),))).verdict

    assert judged("plain", ()) == judged("longer", ()) == SEEN
    assert judged("plain", ("train.segment_len",)) == UNCLEAR


def test_an_extension_that_was_not_asked_past_its_length_decides_nothing() -> None:
    extended = (("30m-hybrid", "plain", 4, ()), ("30m-hybrid", "plain", 8, ()))
    book = [figure("phonebook.exact", "30m-hybrid", 1.0, 1.0, factor=factor, length=length, form="standard")
            for factor, lengths in ((4, (4096, 8192)), (8, (4096, 8192))) for length in lengths]
    made = table(losses("30m-hybrid", 3.0, 3.0), losses("30m-hybrid", 3.0, 3.0, factor=8), *book, extended=extended)
    found = longer_rules.recall_past_the_extension(made)
    assert (found.verdict, "extended to 8,192: not asked on both sides" in found.sentence) == (UNCLEAR, True)


def test_rope_is_given_the_best_of_its_methods() -> None:
    extended = (("30m-hybrid", "plain", 4, ()), ("30m-hybrid-rope", "plain", 4, ()),
                ("30m-hybrid-rope", "base", 4, ("k",)))
    found = longer_rules.rope_hurts_extension(table(
        losses("30m-hybrid", 3.0, 3.001), losses("30m-hybrid-rope", 3.2, 3.21),
        losses("30m-hybrid-rope", 2.9, 2.91, method="base"), extended=extended))
    assert (found.verdict, "with (base, the best of 2)" in found.sentence) == (NOT_SEEN, True)


def test_figures_of_one_length_that_differ_in_more_than_their_method_are_no_figure() -> None:
    twice = [losses("30m-hybrid", 3.0, 3.0, sequences=n) for n in (1, 2)]
    assert longer_rules.rope_hurts_extension(table(*twice, losses("30m-hybrid-rope", 3.2, 3.2))).verdict == UNCLEAR


def test_the_sentence_tells_each_model_at_its_own_longest_extension() -> None:
    extended = (("30m-hybrid", "plain", 4, ()), ("30m-hybrid", "plain", 8, ()), ("30m-transformer", "plain", 4, ()))
    figures = [*(losses(name, 3.0, 3.0, factor=factor) for name, _, factor, _ in extended),
               figure("gained", "30m-hybrid", 0.05, 0.05), figure("gained", "30m-hybrid", 0.1, 0.1, factor=8),
               figure("gained", "30m-transformer", 0.2, 0.2)]
    told = sentence(table(*figures, extended=extended))
    assert "at 8,192 tokens 30m-hybrid +0.100" in told
    assert "at 4,096 tokens Transformer +0.200" in told
    alike = sentence(table(*figures[1:], extended=extended[:2]))
    assert alike == "Extended to 8,192 tokens, gained by the longer context: 30m-hybrid +0.100 nats/token (plain)."


def test_losses_more_than_a_nat_above_the_best_leave_the_frame() -> None:
    figures = [losses("30m-hybrid", 3.0, 3.0), losses("30m-hybrid-rope", 9.0, 9.0),
               *(Figure("window_loss", name, {"length": str(n)}, 3.0, 3.0, 3.0, "", 2, "c", "c", "m")
                 for name in ("30m-hybrid", "30m-hybrid-rope") for n in (1024, 4096))]
    plot = next(one for one in extended_plots(table(*figures)) if one.id == "extended_windows")
    for panel in plot.panels:
        assert panel.limits is not None
        assert panel.limits[1] - panel.limits[0] <= 1.0
        assert panel.limits[0] < 3.0 < panel.limits[1]


def test_the_model_before_is_in_ink_and_a_method_has_one_colour_that_is_no_models() -> None:
    figures = [losses("30m-hybrid", 3.0, 3.0), losses("30m-transformer", 3.1, 3.1),
               losses("30m-transformer", 3.1, 3.1, method="yarn"),
               *(Figure("window_loss", name, {"length": str(n)}, 3.0, 3.0, 3.0, "", 2, "c", "c", "m")
                 for name in ("30m-hybrid", "30m-transformer") for n in (1024, 4096))]
    made = table(*figures, extended=(EXTENDED[1], EXTENDED[0], EXTENDED[2]))
    plot = next(one for one in extended_plots(made) if one.id == "extended_windows")
    drawn = [series for panel in plot.panels for series in panel.series]
    assert {series.label for series in drawn if series.ink and series.dashed} == {"before"}
    after = {(series.label, series.colour) for series in drawn if not series.ink}
    assert sorted(label for label, _ in after) == ["plain", "yarn"]
    assert min(place for _, place in after) > max(colour(made, name) for name in made.about["recipes"])
    first = draw(plot.panels[0])
    assert re.search(rf'stroke: {INK}[^"]*stroke-dasharray', first) or re.search(
        rf'stroke-dasharray[^"]*stroke: {INK}', first)


def test_what_was_gained_and_lost_has_proper_signs() -> None:
    made = table(losses("30m-hybrid", 3.0, 3.0), figure("gained", "30m-hybrid", -0.03, -0.01),
                 figure("long_recall", "30m-hybrid", 0.5, 0.5))
    (told,) = [change for change in changes(made) if change.recipe == "30m-hybrid"]
    assert told.gained == "\N{MINUS SIGN}0.020 (\N{MINUS SIGN}0.030 to \N{MINUS SIGN}0.010)"
    assert told.long_recall == "50\N{NO-BREAK SPACE}%"
