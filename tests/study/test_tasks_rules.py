"""Rules on RULER and multiple choice, and their plots, on invented figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hinny.study import tasks_rules
from hinny.study.claims import judge
from hinny.study.collect import Figure, Table
from hinny.study.draw import draw
from hinny.study.figures import plots
from hinny.study.longer_figures import extended_plots
from hinny.study.rules import NOT_SEEN, SEEN, UNCLEAR, Verdict
from hinny.study.summary import columns

FAMILIES = {"t": "transformer", "m": "mamba", "m2": "mamba2", "h": "hybrid"}
TRAINED = 512
Rule = Callable[[Table], Verdict]


def table(figures: list[Figure], **about: Any) -> Table:
    recipes = {name: {"family": family, "seq_len": TRAINED, "non_embedding": 1,
                      "positions": {"t": "rope", "h": "none"}.get(name)} for name, family in FAMILIES.items()}
    return Table(figures, {"recipes": recipes, "predicted": {}, "samples": 400} | about)


def fig(what: str, variant: str, value: float, half: float = 0.01, seeds: int = 2, n: int = 400,
        **shape: object) -> Figure:
    return Figure(what, variant, {k: str(v) for k, v in {**shape, "n": n}.items()}, value, value - half, value + half,
                  "share", seeds, "command", "commit", "machine")


def choice(form: str, n: int = 400, seeds: int = 2, half: float = 0.01, **shares: float) -> list[Figure]:
    return [fig(f"choice-{form}.acc", name, share, half, seeds, n, shots=2) for name, share in shares.items()]


def ruler(length: int = TRAINED, n: int = 400, seeds: int = 2, half: float = 0.01, **shares: float) -> list[Figure]:
    return [fig("ruler.mean", name, share, half, seeds, n, length=length, tasks=4) for name, share in shares.items()]


@pytest.mark.parametrize(("t", "m", "m2", "verdict"), [
    (0.9, 0.6, 0.7, SEEN),
    (0.9, 0.9, 0.95, NOT_SEEN), (0.3, 0.9, 0.95, NOT_SEEN),
    # one lags and the other does not; both lag by less than the margin or within their seeds
    (0.9, 0.6, 0.9, UNCLEAR), (0.9, 0.85, 0.85, UNCLEAR),
    # nobody learned it
    (0.45, 0.25, 0.25, UNCLEAR)])
def test_lettered_choice(t: float, m: float, m2: float, verdict: str) -> None:
    assert tasks_rules.pure_ssms_lag_by_letter(table(choice("letter", t=t, m=m, m2=m2))).verdict == verdict


LAG: dict[str, float] = {"t": 0.9, "m": 0.5, "m2": 0.6}
LEVEL: dict[str, float] = {"t": 0.8, "m": 0.8, "m2": 0.85}


@pytest.mark.parametrize(("letter", "cloze", "verdict"), [
    (LAG, LEVEL, SEEN), (LAG, LAG, NOT_SEEN), (LAG, {"t": 0.8, "m": 0.5, "m2": 0.8}, UNCLEAR),
    (LAG, {"t": 0.4, "m": 0.4, "m2": 0.4}, UNCLEAR), (LEVEL, LEVEL, UNCLEAR), (LEVEL, LAG, UNCLEAR)])
def test_the_gap_is_in_the_format(letter: dict[str, float], cloze: dict[str, float], verdict: str) -> None:
    figures = choice("letter", **letter) + choice("cloze", **cloze)
    assert tasks_rules.gap_is_in_the_format(table(figures)).verdict == verdict
    with_text = table([*figures, *choice("text", t=0.77, m=0.77, m2=0.77)])
    assert tasks_rules.gap_is_in_the_format(with_text).verdict == verdict


@pytest.mark.parametrize(("h", "t", "m2", "verdict"), [
    (0.82, 0.74, 0.52, SEEN),
    (0.75, 0.76, 0.50, NOT_SEEN), (0.70, 0.60, 0.65, NOT_SEEN),
    (0.82, 0.78, 0.52, UNCLEAR), (0.82, 0.70, 0.71, UNCLEAR), (0.40, 0.20, 0.10, UNCLEAR)])
def test_the_hybrid_leads_on_ruler_at_the_training_length(h: float, t: float, m2: float, verdict: str) -> None:
    figures = ruler(h=h, t=t, m2=m2)
    assert tasks_rules.hybrid_leads_on_ruler(table(figures)).verdict == verdict
    # what is beyond the training length decides nothing
    beyond = ruler(2 * TRAINED, h=h, t=t, m2=m2)
    assert tasks_rules.hybrid_leads_on_ruler(table(beyond)).verdict == UNCLEAR


def extended(t: float, h: float, length: int = 1024, seeds: int = 2, method: str = "plain") -> list[Figure]:
    shape = {"method": method, "factor": length // TRAINED, "length": length}
    return [fig("extended.ruler.mean", name, share, 0.01, seeds, tasks=4, **shape)
            for name, share in (("t", t), ("h", h))] + [
           fig("extended.window_loss", name, 4.0, seeds=seeds, **shape) for name in ("t", "h")]


def extensions(*figures: Figure) -> Table:
    found = {(f.variant, f.shape["method"], int(f.shape["factor"]), int(f.shape["length"])): None for f in figures}
    return table(list(figures), extensions=[dict(zip(("recipe", "method", "factor", "length"), one, strict=True))
                                            for one in found])


@pytest.mark.parametrize(("figures", "verdict"), [
    (extended(0.6, 0.8), SEEN), (extended(0.6, 0.8) + extended(0.5, 0.7, 2048), SEEN),
    (extended(0.8, 0.8), NOT_SEEN), (extended(0.8, 0.6), NOT_SEEN),
    (extended(0.6, 0.8) + extended(0.8, 0.7, 2048), UNCLEAR), (extended(0.2, 0.4), UNCLEAR),
    (extended(0.75, 0.8), UNCLEAR), (extended(0.6, 0.8, seeds=1), UNCLEAR),
    # the Transformer's best method counts
    (extended(0.6, 0.8) + extended(0.85, 0.1, method="yarn"), NOT_SEEN)])
def test_the_extended_hybrid_leads_on_ruler(figures: list[Figure], verdict: str) -> None:
    found = tasks_rules.extended_hybrid_leads_on_ruler(extensions(*figures))
    assert found.verdict == verdict
    assert "1,024 tokens" in found.sentence


@pytest.mark.parametrize(("rule", "figures"), [
    (tasks_rules.pure_ssms_lag_by_letter, lambda **k: choice("letter", **LAG, **k)),
    (tasks_rules.gap_is_in_the_format, lambda **k: choice("letter", **LAG, **k) + choice("cloze", **LEVEL, **k)),
    (tasks_rules.hybrid_leads_on_ruler, lambda **k: ruler(h=0.9, t=0.6, m2=0.3, **k))])
def test_neither_one_seed_nor_few_questions_nor_a_wide_spread_decide(
        rule: Rule, figures: Callable[..., list[Figure]]) -> None:
    assert rule(table(figures())).verdict == SEEN
    assert "one seed" in rule(table(figures(seeds=1))).sentence
    assert rule(table(figures(seeds=1))).verdict == UNCLEAR
    assert (rule(table(figures(n=16))).verdict, rule(table(figures(half=0.2))).verdict) == (UNCLEAR, UNCLEAR)


def test_fewer_questions_need_a_larger_difference() -> None:
    gap = {"t": 0.9, "m": 0.82, "m2": 0.82}
    few, many = (table(choice("letter", n, **gap)) for n in (50, 400))
    assert tasks_rules.pure_ssms_lag_by_letter(many).verdict == SEEN
    assert tasks_rules.pure_ssms_lag_by_letter(few).verdict == UNCLEAR
    assert tasks_rules.margin(choice("letter", 50, t=0.5)[0]) == pytest.approx(0.1)
    assert tasks_rules.margin(choice("letter", 4000, t=0.5)[0]) == 0.03


@pytest.mark.parametrize(("figures", "claims"), [
    ([], set()), (choice("letter", **LAG), {"C13"}), (choice("letter", **LAG) + choice("cloze", **LAG), {"C13", "C15"}),
    (ruler(h=0.9), {"C24"})])
def test_a_claim_is_tested_where_the_study_has_its_figures(figures: list[Figure], claims: set[str]) -> None:
    tested = {one.claim.id: bool(one.claim.rule) for one in judge(table(figures))}
    assert {name for name in ("C13", "C15", "C24", "C25") if tested[name]} == claims


def test_the_extended_claim_is_tested_where_ruler_was_asked_of_extended_models() -> None:
    judged = {one.claim.id: one for one in judge(extensions(*extended(0.6, 0.8)))}
    assert (bool(judged["C25"].claim.rule), judged["C25"].verdict.verdict) == (True, SEEN)


def pictured() -> Table:
    shares = {"t": (0.9, 0.7, 0.2), "m": (0.5, 0.3, 0.2), "m2": (0.6, 0.4, 0.2), "h": (0.95, 0.8, 0.6)}
    lengths = (256, TRAINED, 1024)
    figures = [f for i, length in enumerate(lengths) for f in ruler(length, **{m: v[i] for m, v in shares.items()})]
    for task in ("ruler-niah-single-1", "ruler-vt", "ruler-fwe"):
        figures += [fig(f"{task}.string_match_all", m, v[i], length=length, shots=0) for m, v in shares.items()
                    for i, length in enumerate(lengths)]
    figures += [fig("induction.exact", m, v[i], length=length) for m, v in shares.items()
                for i, length in enumerate(lengths)]
    for i, form in enumerate(("letter", "text", "cloze")):
        figures += choice(form, half=0.05, **{m: (v[0], 0.8, 0.8)[i] for m, v in shares.items()})
    return table(figures)


def test_ruler_choice_and_synthetic_tasks_are_drawn_from_their_figures() -> None:
    found = {plot.id: plot for plot in plots(pictured())}
    assert list(found) == ["ruler", "ruler_tasks", "choice", "synthetic"]
    assert [panel.title for panel in found["ruler_tasks"].panels] == ["niah-single-1", "vt", "fwe"]
    mean = {series.label: series for series in found["ruler"].panels[0].series}
    assert [(p.x, p.value, p.high) for p in mean["Mamba-2"].points] == [
        (256, 0.6, pytest.approx(0.61)), (512, 0.4, pytest.approx(0.41)), (1024, 0.2, pytest.approx(0.21))]
    assert found["ruler"].panels[0].mark == (TRAINED, "trained length")
    assert "mean over 4 tasks" in found["ruler"].caption
    assert "400 questions a point" in found["ruler_tasks"].caption
    forms = {series.label: [p.value for p in series.points] for series in found["choice"].panels[0].series}
    assert forms == {"Transformer": [0.9, 0.8, 0.8], "Mamba": [0.5, 0.8, 0.8], "Mamba-2": [0.6, 0.8, 0.8],
                     "Mamba-2-Hybrid": [0.95, 0.8, 0.8], "chance": [0.25, 0.25]}
    panel = found["choice"].panels[0]
    assert panel.format_x is not None
    assert [panel.format_x(place) for place in panel.ticks] == ["letter", "text", "cloze"]
    for plot in found.values():
        for panel in plot.panels:
            assert "Mamba-2-Hybrid" in draw(panel), plot.id


def test_a_form_that_was_not_asked_is_not_drawn() -> None:
    (plot,) = plots(table(choice("cloze", **LEVEL)))
    panel = plot.panels[0]
    assert panel.format_x is not None
    assert [panel.format_x(place) for place in panel.ticks] == ["cloze"]
    assert "3" in draw(plot.panels[0])


def test_extended_models_have_a_plot_of_rulers_mean() -> None:
    found = {plot.id: plot for plot in extended_plots(extensions(*extended(0.6, 0.8), *extended(0.5, 0.7, 2048)))}
    assert "extended_ruler" not in found
    before = extensions(*extended(0.6, 0.8)).figures + ruler(h=0.9, t=0.9)
    about = extensions(*extended(0.6, 0.8)).about
    found = {plot.id: plot for plot in extended_plots(Table(before, about))}
    assert [panel.title for panel in found["extended_ruler"].panels] == ["Transformer to 1,024",
                                                                        "Mamba-2-Hybrid to 1,024"]


def test_the_short_table_has_a_line_for_each() -> None:
    lines = {line.title: line for line in columns(pictured())}
    cells = {title: [cell.text.replace("\N{NO-BREAK SPACE}", "") for cell in line.cells]
             for title, line in lines.items()}
    assert cells == {
        "RULER up to 512 tokens": ["80%", "40%", "50%", "88%"], "RULER beyond 512": ["20%", "20%", "20%", "60%"],
        "Choice by letter": ["90%", "50%", "60%", "95%"], "Choice by text": ["80%"] * 4,
        "Cloze questions": ["80%"] * 4}
    assert [cell.best for cell in lines["RULER beyond 512"].cells] == [False, False, False, True]
    assert not any(cell.best for cell in lines["Cloze questions"].cells)
