"""RULER's scores: the original's on published cases, and never lowered by more text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hinny.evals.ruler import TASKS, scores
from hinny.evals.task import Written
from hinny.infer.reading.requests import Generated

ALL, PART = (next(task for task in TASKS if task.metrics == (metric,))
             for metric in ("string_match_all", "string_match_part"))


def _generated(text: str) -> Generated:
    return Generated(tokens=(1,), text=text, ended="length")


def _sample(*references: str) -> Written:
    return Written("x", "prompt", references, 10)


def test_questions_alone_are_scored_by_any_reference() -> None:
    assert [task.name for task in TASKS if task.metrics == ("string_match_part",)] == [
        "ruler-qa-squad", "ruler-qa-hotpot"]


def test_one_of_several_spellings_is_a_right_answer() -> None:
    """The case in which a port of the benchmark gives 2/3."""
    sample = _sample("Denver Broncos", "Broncos", "The Denver Broncos")
    assert PART.score(sample, _generated("Denver Broncos")) == {"string_match_part": 1.0}
    assert ALL.score(sample, _generated("Denver Broncos")) == {"string_match_all": 2 / 3}


@pytest.mark.parametrize(("text", "references", "share"), [
    (" 1234567 and 7654321.", ("1234567", "7654321"), 1.0),
    ("1234567", ("1234567", "7654321", "1111111", "2222222"), 0.25),
    ("the BLUE\tcar", ("blue",), 1.0),
    ("a\x00b", ("a\nb",), 1.0),
    ("a\tb", ("a\tb",), 0.0),
    ("\n\x01 a \x02", ("\n",), 0.0),
    ("", ("a",), 0.0),
    ("cart", ("art",), 1.0),
])
def test_references_are_looked_for_in_the_plain_text(text: str, references: tuple[str, ...], share: float) -> None:
    assert ALL.score(_sample(*references), _generated(text)) == {"string_match_all": share}
    assert PART.score(_sample(*references), _generated(text)) == {"string_match_part": float(share > 0)}


def _original(text: str, references: tuple[str, ...]) -> tuple[float, float]:
    """The two scores of one answer as the benchmark's description has them, in percent."""
    plain = "".join("\n" if ord(c) < 32 else c for c in text.strip()).strip()
    found = [1.0 if reference.lower() in plain.lower() else 0.0 for reference in references]
    return sum(found) / len(found) * 100, max(found) * 100


texts = st.text(st.sampled_from("abAB \n\t\x00ςσΣİé1"), max_size=12)
some_references = st.lists(st.text(st.sampled_from("abAB \nςσΣİ1"), min_size=1, max_size=3), min_size=1, max_size=3)


@given(texts, texts, some_references)
def test_what_is_settled_stays_as_it_is(text: str, more: str, references: list[str]) -> None:
    sample = _sample(*references)
    for task, expected in zip((ALL, PART), _original(text, tuple(references)), strict=True):
        [score] = task.score(sample, _generated(text)).values()
        assert score == pytest.approx(expected / 100)
        if task.settled(sample, text):
            assert task.score(sample, _generated(text + more)) == task.score(sample, _generated(text)) != {}
            assert score == 1


def test_an_answer_is_settled_as_soon_as_it_is_there() -> None:
    sample = _sample("12", "34")
    text = "12, 34, 56"
    assert [ALL.settled(sample, text[:n]) for n in (2, 4, 5, 6, 10)] == [False, False, False, True, True]
    assert [PART.settled(sample, text[:n]) for n in (1, 2, 10)] == [False, True, True]


def test_a_final_sigma_is_never_settled() -> None:
    """It is written otherwise once a letter follows, so that a text may lose what it had."""
    assert scores.string_match_part("ΑΣ", ["ΑΣ"]) == 1
    assert scores.string_match_part("ΑΣΑ", ["ΑΣ"]) == 0
    assert not ALL.settled(_sample("ΑΣ"), "ΑΣ")
    assert not PART.settled(_sample("ΑΣ"), "ΑΣ")
