"""A page whose every model is varied begins with what the variation brings, told by the seeds."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_claims import fig

from hinny.study import sweep_answer
from hinny.study.collect import Figure, Table
from hinny.study.draw import draw
from hinny.study.report import every_plot
from hinny.study.sweep_answer import begins_with_sweeps, headline, overview, sentences, tiles

SHARES = {0.0: 3.60, 0.04: 3.51, 0.08: 3.50, 0.25: 3.55}
"""Share of attention layers → loss; seeds lie 0.006 about it."""
RECALL = {0.0: 0.1, 0.04: 0.4, 0.08: 0.9, 0.25: 0.95}
PLACES = {"even": 3.50, "first": 3.54, "last": 3.508}


def line(plot: str, name: str, x: str, members: dict[str, tuple[Any, float | None]]) -> dict[str, Any]:
    return {"plot": plot, "line": name, "x": x,
            "members": [{"recipe": recipe, "value": value, "x": place} for recipe, (value, place) in members.items()]}


def figures(recipe: str, loss: float, recall: float, half: float = 0.006) -> list[Figure]:
    return [fig("held_out_loss", recipe, loss, half),
            *(fig("phonebook.exact", recipe, recall, 0.01, form="standard", length=n) for n in (64, 256))]


def table(places: dict[str, float] | None = None, recall: dict[float, float] | None = None) -> Table:
    shares = {f"a{x:g}": (x, x) for x in SHARES}
    placed = {"a0.08": ("even", None), "first": ("first", None), "last": ("last", None)}
    found = [f for x, loss in SHARES.items() for f in figures(f"a{x:g}", loss, (recall or RECALL)[x])]
    found += [f for name, loss in (places or PLACES).items() if name != "even" for f in figures(name, loss, 0.9)]
    recipes = {name: {"family": "hybrid", "seq_len": 256, "group": ""} for name in {**shares, **placed}}
    return Table(found, {"recipes": recipes, "predicted": {}, "seeds": [1, 2], "samples": 32, "sweeps": [
        line("Where attention stands", "4 of 48", "value", placed), line("Attention layers", "", "attention", shares)]})


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_headline_tells_the_largest_variation_first_and_with_its_ties() -> None:
    assert plain(headline(table())) == (
        "Attention layers: 4 % and 8 % predict held-out text best, half of the phone numbers are recalled from 8 % on; "
        "where attention stands: even and last.")
    one = table(places={"even": 3.50, "first": 3.54, "last": 3.53})
    assert plain(headline(one)).endswith("; where attention stands: even.")


def test_the_best_is_named_where_many_are_not_told_apart_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_answer, "NAMED", 1)
    assert plain(headline(table())).startswith(
        "Attention layers: 8 % predicts held-out text best (1 of the 3 others not told apart from it), ")


def test_what_seeds_do_not_decide_is_no_clause_and_a_sentence_that_says_so() -> None:
    level = table(places={"even": 3.50, "first": 3.505, "last": 3.495})
    assert plain(headline(level)).endswith("from 8 % on.")
    first, second = map(plain, sentences(level))
    assert first == ("Attention layers: held-out loss is lowest with 8 % (3.500 nats/token, not told apart from 4 %), "
                     "highest with 0 % (3.600). Half of the phone numbers are recalled from 8 % on.")
    assert second == ("Where attention stands: seeds do not tell losses apart (3.495 to 3.505 nats/token; the lowest "
                      "mean with last).")


def test_recall_that_does_not_begin_at_a_share_is_told_as_it_is() -> None:
    def said(*values: float) -> str:
        return plain(sentences(table(recall=dict(zip(SHARES, values, strict=True))))[0]).split("). ")[1]

    assert said(0.1, 0.2, 0.3, 0.4) == "None recalls half of the phone numbers."
    assert said(0.6, 0.6, 0.6, 0.6) == "All recall half of the phone numbers."
    assert said(0.1, 0.9, 0.2, 0.9) == "Half of the phone numbers are recalled with 4 % and 25 %."


def test_tiles_have_the_best_value_with_its_spread_and_the_last() -> None:
    attention, placed = tiles(table())
    assert [plain(text) for text in (attention.title, attention.value, attention.who, attention.spread, attention.tied,
                                     attention.last)] == [
        "Attention layers", "8 %", "3.500 nats/token", "3.494 – 3.506, 2 seeds", "not told apart from 4 %",
        "0 %, 3.600"]
    assert (placed.value, placed.tied, placed.last) == ("even", "not told apart from last", "first, 3.540")


def test_the_first_panels_are_loss_and_recall_of_the_largest_variation_then_the_others_losses() -> None:
    plot = overview(table())
    assert [(panel.title, panel.y.split(",")[0].split(";")[0]) for panel in plot.panels] == [
        ("Attention layers", "held-out loss"), ("Attention layers", "phone numbers right"),
        ("Where attention stands (4 of 48)", "held-out loss")]
    assert [series.dots for series in plot.panels[2].series] == [True]
    assert {figure.what for figure in plot.figures} == {"held_out_loss", "phonebook.exact"}


def sizes(*losses: tuple[float, float]) -> Table:
    """Two lines of two sizes each, with a law for none."""
    lines, found = [], []
    for name, values in zip(("Transformer", "Hybrid"), zip(*losses, strict=True), strict=True):
        members = {f"{name}-{size:g}": (size, size) for size in (8e6, 31e6)}
        lines.append(line("Loss by size", name, "parameters", members))
        found += [f for recipe, loss in zip(members, values, strict=True) for f in figures(recipe, loss, 0.5)]
    recipes = {member["recipe"]: {"family": "hybrid", "seq_len": 256, "group": f"{member['x']:g}"}
               for one in lines for member in one["members"]}
    return Table(found, {"recipes": recipes, "predicted": {}, "seeds": [1, 2], "sweeps": lines})


def test_over_sizes_the_best_line_is_told_at_each_size() -> None:
    assert headline(sizes((3.6, 3.5), (3.3, 3.2))) == (
        "Hybrid predicts held-out text best at every size, 8M to 31M parameters.")
    assert headline(sizes((3.5, 3.6), (3.3, 3.2))) == (
        "Held-out text is predicted best by Transformer at 8M, by Hybrid at 31M parameters.")
    assert headline(sizes((3.5, 3.505), (3.3, 3.2))) == (
        "Held-out text is predicted best by nobody at 8M, by Hybrid at 31M parameters.")
    largest = tiles(sizes((3.6, 3.5), (3.3, 3.2)))
    assert [(tile.title, tile.value, tile.who, tile.colour) for tile in largest] == [
        ("Hybrid", "3.200", "at 31M parameters", 1), ("Transformer", "3.300", "at 31M parameters", 0)]


def test_neighbouring_sizes_with_one_winner_are_told_together() -> None:
    made = sizes((3.5, 3.6), (3.3, 3.2))
    again = {f"{name}-6e+07": (6e7, 6e7) for name in ("Transformer", "Hybrid")}
    lines = [one | {"members": [*one["members"], *more["members"]]} for one, more in zip(
        made.about["sweeps"], (line("", "", "", {name: place}) for name, place in again.items()), strict=True)]
    recipes = made.about["recipes"] | {name: {"family": "hybrid", "seq_len": 256, "group": "6e+07"} for name in again}
    more = [f for name, loss in zip(again, (3.2, 3.1), strict=True) for f in figures(name, loss, 0.5)]
    assert headline(Table([*made.figures, *more], made.about | {"sweeps": lines, "recipes": recipes})) == (
        "Held-out text is predicted best by Transformer at 8M, by Hybrid at 31M and 60M parameters.")


def test_a_study_with_a_model_that_is_not_varied_begins_with_its_models() -> None:
    whole = table()
    assert begins_with_sweeps(whole)
    more = Table([*whole.figures, *figures("apart", 3.4, 0.5)], whole.about | {
        "recipes": whole.about["recipes"] | {"apart": {"family": "transformer", "seq_len": 256, "group": ""}}})
    assert not begins_with_sweeps(more)
    assert every_plot(more)[0].panels[0].title != every_plot(whole)[0].panels[0].title


def test_a_varied_model_keeps_its_name_and_others_their_family() -> None:
    whole = table()
    recipes = whole.about["recipes"] | {"a0": {"family": "mamba2", "seq_len": 256},
                                        "apart": {"family": "transformer", "seq_len": 256}}
    named = Table(whole.figures, whole.about | {"recipes": recipes})
    assert (named.label("a0"), named.label("apart")) == ("a0", "Transformer")


def test_numbers_beside_an_axis_differ() -> None:
    """Three digits made 3.91 twice of 3.905 and 3.91."""
    narrow = table(places={"even": 3.500, "first": 3.504, "last": 3.502})
    text = draw(overview(narrow).panels[2])
    numbers = re.findall(r">(3\.\d+)<", text)
    assert len(numbers) > 3
    assert len(set(numbers)) == len(numbers)
