"""Claims are counted by whether the study tests them, and lead to the figure that decided."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_claims import fig
from test_sweep_answer import figures, line

from hinny.study.claim_figures import CHANGES, MEASURES, shown_by
from hinny.study.claims import CLAIMS, Claim, Judged, judge
from hinny.study.collect import Table, read_table
from hinny.study.figures import Plot
from hinny.study.report import every_plot, report
from hinny.study.rules import NOT_SEEN, SEEN, UNCLEAR, Verdict
from hinny.study.summary import answer, columns, counted


@pytest.fixture(scope="module")
def text(study_folder: Path) -> str:
    return report(study_folder).read_text()


def varied() -> Table:
    """Attention of 0, 8 and 25 % on the second plot; on the first two of one share."""
    shares = {"a0": 0.0, "a8": 0.08, "a25": 0.25, "b8": 0.08}
    recipes = {name: {"family": "hybrid", "seq_len": 256, "group": "", "tokens": 100, "non_embedding": 1000,
                      "shares": {"attention": share, "mlp": 0.5}, "pattern": "M*-" if share else "MM-", "kv_heads": 2,
                      "positions": "none", "even": True} for name, share in shares.items()}
    lines = [line("Another", "", "value", {"a8": (0, 0.0), "b8": (1, 1.0)}),
             line("Attention layers", "", "attention", {
                 name: (share, share) for name, share in shares.items() if name[0] == "a"})]
    losses = {"a0": 3.6, "a8": 3.5, "a25": 3.55, "b8": 3.51}
    found = [f for name, loss in losses.items() for f in figures(name, loss, 0.9)]
    return Table(found, {"recipes": recipes, "predicted": {}, "seeds": [1, 2], "samples": 32, "sweeps": lines})


def test_the_claim_on_shares_leads_to_their_plot() -> None:
    table = varied()
    best = next(one for one in judge(table) if one.claim.id == "C1")
    assert best.tested
    assert shown_by(table, best, every_plot(table), columns(table)) == ("sweep1", "Attention layers")


def test_figures_that_are_in_a_table_alone_lead_to_it(study_folder: Path, text: str) -> None:
    assert text
    table = read_table(study_folder)
    plots, lines = every_plot(table), columns(table)

    def where(*read: str, tested: bool = True) -> tuple[str, str] | None:
        one = Judged(Claim("C0", "", "", ""), Verdict(SEEN, "", read), tested)
        return shown_by(table, one, plots, lines)

    assert where("held_out_loss") == MEASURES
    assert where("phonebook.exact") == ("phonebook", "Phonebook: exact recall by length")
    assert where("held_out_curve") == ("learning", "Learning curves")
    assert where("phonebook.exact", tested=False) is None
    assert where("no.such") is None
    # the plots of extensions show what was before them beside it
    before = Plot("extended_phonebook", "Extension", "", [], table.find("phonebook.exact"))
    plots.insert(0, before)
    assert where("phonebook.exact") == ("phonebook", "Phonebook: exact recall by length")
    extended = Table([*table.figures, fig("extended.gained", "tiny-hybrid", 0.1, 0.01)], table.about)
    one = Judged(Claim("C0", "", "", ""), Verdict(SEEN, "", ("extended.gained",)))
    assert shown_by(extended, one, plots, lines) == CHANGES


def test_every_link_of_the_page_leads_to_one_place(text: str) -> None:
    links = re.findall(r'<a href="#([^"]+)"', text)
    assert len(links) > 5
    for anchor in {*links, "claims", *(claim.id for claim in CLAIMS)}:
        assert text.count(f'id="{anchor}"') == 1


def test_what_is_not_tested_is_counted_apart_from_what_is_too_small(study_folder: Path, text: str) -> None:
    table = read_table(study_folder)
    judged = judge(table)
    apart = [one for one in judged if not one.tested]
    assert apart
    assert all(one.verdict.verdict == UNCLEAR for one in apart)
    tally = re.findall(r'<li><b class="[^"]+">(\d+)</b>([^<]+)</li>', text)
    count = {word: int(number) for number, word in tally}
    assert count["not tested here"] == len(apart)
    assert sum(count.values()) == len(CLAIMS)
    assert text.count('<td class="verdict unclear">not tested</td>') == len(apart)
    (told,) = [sentence for sentence in answer(table, judged) if "claims" in sentence]
    assert told.startswith(f"Of the paper's 35 claims {35 - len(apart)} are tested here: {count[SEEN]} seen, "
                           f"{count[NOT_SEEN]} not seen, and of {count[UNCLEAR]} ")
    assert answer(table, apart)[-1] == f"None of the paper's {len(apart)} claims is tested here."
    markdown = (study_folder / "report.md").read_text()
    assert markdown.count("| not tested |") == len(apart)
    assert markdown.index("claims, checked") < markdown.index("## Figures")


def test_a_claim_on_two_families_is_not_tested_where_one_is_not_there() -> None:
    table = varied()
    timed = Table([*table.figures, fig("train", "a8", 900.0, 10.0)], table.about)
    assert {one.claim.id: one.tested for one in judge(timed) if one.claim.id in ("C12", "C32")} == {
        "C12": False, "C32": False}


def test_sizes_have_few_digits() -> None:
    assert [counted(n) for n in (950, 48_000, 45_308_848, 8_000_000_000)] == ["950", "48.0k", "45.3M", "8.0B"]
