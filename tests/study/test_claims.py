"""Each rule on invented figures: what makes it say seen, not seen, and too small to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hinny.study import rules, speed_rules
from hinny.study.claims import judge
from hinny.study.collect import Figure, Table, collect, read_table
from hinny.study.figures import ratio_sentence
from hinny.study.rules import NOT_SEEN, SEEN, UNCLEAR

FAMILIES = {"t": "transformer", "m": "mamba", "m2": "mamba2", "h": "hybrid"}
LENGTHS = (64, 128, 256, 320)
TRAINED = 256


def table(*figures: Figure, **about: Any) -> Table:
    recipes = {name: {"family": family, "seq_len": TRAINED, "d_state": 128, "flops_per_token": 100}
               for name, family in FAMILIES.items()}
    return Table(list(figures), {"recipes": recipes, "predicted": {}} | about)


def fig(what: str, variant: str, value: float, half: float = 0.0, seeds: int = 2, **shape: object) -> Figure:
    return Figure(what, variant, {k: str(v) for k, v in shape.items()}, value, value - half, value + half, "unit",
                  seeds, "command", "commit", "machine")


def book(what: str = "exact", half: float = 0.01, seeds: int = 2, form: str = "standard", **by_model: tuple[float, ...],
         ) -> list[Figure]:
    return [fig(f"phonebook.{what}", name, value, half, seeds, form=form, length=length)
            for name, values in by_model.items() for length, value in zip(LENGTHS, values, strict=True)]


def losses(**by_model: tuple[float, float]) -> list[Figure]:
    return [fig("held_out_loss", name, value, half) for name, (value, half) in by_model.items()]


GOOD, SHORT, POOR = (0.99, 0.98, 0.97, 0.8), (0.97, 0.6, 0.1, 0.0), (0.2, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("mamba", "mamba2", "verdict"), [
    ((4.0, 0.01), (4.02, 0.01), SEEN), ((4.0, 0.01), (4.2, 0.01), NOT_SEEN), ((4.0, 0.01), (4.07, 0.02), UNCLEAR),
    ((4.0, 0.2), (4.0, 0.01), UNCLEAR)])
def test_same_quality_is_decided_by_the_gap_and_the_spread(mamba: Any, mamba2: Any, verdict: str) -> None:
    assert rules.same_quality(table(*losses(m=mamba, m2=mamba2))).verdict == verdict


@pytest.mark.parametrize(("transformer", "verdict"), [(GOOD, SEEN), (SHORT, NOT_SEEN), ((0.8, 0.7, 0.6, 0.1), UNCLEAR),
                                                      (POOR, UNCLEAR)])
def test_a_transformer_solves_phonebook_if_the_worst_seed_does_at_every_length(transformer: Any, verdict: str) -> None:
    assert rules.transformer_solves_phonebook(table(*book(t=transformer))).verdict == verdict


@pytest.mark.parametrize(("pure", "verdict"), [(POOR, SEEN), (GOOD, NOT_SEEN), ((0.9, 0.4, 0.4, 0.0), SEEN),
                                               ((0.9, 0.9, 0.4, 0.0), UNCLEAR), ((0.9, 0.9, 0.5, 0.0), UNCLEAR)])
def test_pure_ssms_fail_if_half_is_lost_by_half_the_training_length(pure: Any, verdict: str) -> None:
    found = rules.pure_ssms_fail_phonebook(table(*book(t=GOOD, m=pure, m2=pure)))
    assert found.verdict == verdict
    assert f"up to {rules._reach(book(t=GOOD), best=False)}." in found.sentence


@pytest.mark.parametrize(("rule", "asked"), [
    (rules.transformer_solves_phonebook, (64, 128)), (rules.hybrid_solves_phonebook, (64, 320)),
    (rules.pure_ssms_fail_phonebook, (256, 320))])
def test_what_was_not_asked_at_the_lengths_of_a_claim_is_not_decided(
        rule: Callable[[Table], rules.Verdict], asked: tuple[int, ...]) -> None:
    figures = book(t=GOOD, h=GOOD, m=POOR, m2=POOR)
    assert rule(table(*figures)).verdict == SEEN
    assert rule(table(*(f for f in figures if f.number("length") in asked))).verdict == UNCLEAR


def test_a_seed_without_wrong_numbers_at_a_length_leaves_the_other_lengths() -> None:
    wrong, chance = dict.fromkeys(("m", "m2"), (0.3,) * 4), dict.fromkeys(("m", "m2"), (0.1,) * 4)
    figures = [*book(t=GOOD), *book("chance_digits", **chance), *book("wrong_digits", **wrong)]
    figures = [replace(f, seeds=1, value=0.0) if "wrong" in f.what and f.number("length") == 64 else f for f in figures]
    found = rules.errors_are_fuzzy(table(*figures))
    assert (found.verdict, "30\N{NO-BREAK SPACE}% against" in found.sentence) == (SEEN, True)


def test_a_training_that_has_not_ended_decides_no_crossover() -> None:
    figures = [fig("held_out_curve", name, value, 0.01, tokens=tokens)
               for name, curve in (("t", (6.0, 5.0, 4.0)), ("h", (6.2, 5.1, 3.9)))
               for tokens, value in zip((1, 2, 3), curve, strict=True)]
    for tokens, verdict in ((3, SEEN), (6, UNCLEAR)):
        made = table(*figures)
        for recipe in made.about["recipes"].values():
            recipe["tokens"] = tokens
        assert rules.crossover(made).verdict == verdict


@pytest.mark.parametrize(("right", "verdict"), [(0.3, SEEN), (0.11, NOT_SEEN), (0.135, UNCLEAR)])
def test_errors_are_fuzzy_if_digits_beat_chance_by_a_margin(right: float, verdict: str) -> None:
    four = (right,) * 4
    chance = (0.1,) * 4
    figures = [*book(t=GOOD), *book("wrong_digits", m=four, m2=four), *book("chance_digits", m=chance, m2=chance)]
    found = rules.errors_are_fuzzy(table(*figures))
    assert found.verdict == verdict
    assert "given the true digits in front of it" in found.sentence


@pytest.mark.parametrize(("turned", "verdict"), [(GOOD, SEEN), ((0.25, 0.05, 0.02, 0.0), UNCLEAR)])
def test_reversing_matters_if_the_forms_differ_for_both(turned: Any, verdict: str) -> None:
    figures = [*book(half=0.005, t=GOOD, m=POOR, m2=POOR),
               *book(half=0.005, form="reversed", t=GOOD, m=turned, m2=turned)]
    assert rules.reversing_changes_phonebook(table(*figures)).verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.8, NOT_SEEN), (0.3, UNCLEAR), (0.0, UNCLEAR)])
def test_forms_that_are_both_answered_badly_are_not_called_alike(share: float, verdict: str) -> None:
    same = (share,) * 4
    figures = [f for form in ("standard", "reversed") for f in book(half=0.005, form=form, t=GOOD, m=same, m2=same)]
    assert rules.reversing_changes_phonebook(table(*figures)).verdict == verdict


@pytest.mark.parametrize(("hybrid", "verdict"), [
    (GOOD, SEEN), (SHORT, NOT_SEEN), ((0.99, 0.98, 0.97, 0.1), NOT_SEEN), ((0.99, 0.98, 0.97, 0.5), UNCLEAR),
    (POOR, UNCLEAR)])
def test_a_hybrid_solves_phonebook_if_it_holds_beyond_the_training_length(hybrid: Any, verdict: str) -> None:
    assert rules.hybrid_solves_phonebook(table(*book(h=hybrid))).verdict == verdict


@pytest.mark.parametrize(("fast", "half", "verdict"), [(300, 10, SEEN), (150, 10, NOT_SEEN), (200, 20, UNCLEAR)])
def test_training_speed_is_decided_by_the_slowest_and_fastest_timings(fast: float, half: float, verdict: str) -> None:
    figures = table(fig("train", "m", 100, 1, 1), fig("train", "m2", fast, half, 1))
    assert speed_rules.mamba2_trains_faster(figures).verdict == verdict


@pytest.mark.parametrize(("rule", "names"), [(speed_rules.mamba2_trains_faster, ("m", "m2")),
                                             (speed_rules.equal_training_efficiency, ("t", "h"))])
def test_timings_of_two_machines_or_of_unlike_models_or_of_a_cpu_decide_nothing(
        rule: Callable[[Table], rules.Verdict], names: tuple[str, str]) -> None:
    def judged(machine: str = "machine", group: str = "", tokens: int = 100, **shape: object) -> rules.Verdict:
        other = fig("train", names[1], 300, 1, 1, **shape)
        made = table(fig("train", names[0], 100, 1, 1, **shape), replace(other, machine=machine))
        made.about["recipes"][names[0]] |= {"tokens": 100, "group": ""}
        made.about["recipes"][names[1]] |= {"tokens": tokens, "group": group}
        return rule(made)

    assert judged().verdict != UNCLEAR
    assert (judged(machine="another").verdict, judged(group="large").verdict) == (UNCLEAR, UNCLEAR)
    assert "one machine" in judged(machine="another").sentence
    assert judged(threads=2).verdict == UNCLEAR
    unlike = table(fig("train", names[0], 100, 1, 1, batch=8), fig("train", names[1], 300, 1, 1, batch=4))
    assert "another batch each" in rule(unlike).sentence


def test_training_speed_at_small_states_decides_nothing() -> None:
    figures = table(fig("train", "m", 100, 1, 1), fig("train", "m2", 300, 1, 1))
    figures.about["recipes"]["m"]["d_state"] = 16
    found = speed_rules.mamba2_trains_faster(figures)
    assert (found.verdict, "3.0×" in found.sentence) == (UNCLEAR, True)


@pytest.mark.parametrize(("speed", "half", "shape", "verdict"), [
    (99, 1, {}, SEEN), (60, 1, {}, NOT_SEEN), (90, 5, {}, UNCLEAR), (99, 1, {"threads": 2}, UNCLEAR),
    (60, 1, {"threads": 2}, UNCLEAR)])
def test_efficiency_is_equal_within_a_tenth_and_never_decided_on_a_cpu(
        speed: float, half: float, shape: Any, verdict: str) -> None:
    figures = table(fig("train", "t", 100, 1, 1, **shape), fig("train", "h", speed, half, 1, **shape))
    assert speed_rules.equal_training_efficiency(figures).verdict == verdict


@pytest.mark.parametrize(("hybrid", "verdict"), [
    ((6.2, 5.1, 3.9), SEEN), ((5.8, 4.9, 3.9), NOT_SEEN), ((6.2, 5.1, 4.1), UNCLEAR), ((6.0, 5.0, 3.9), UNCLEAR),
    # one point of many may lag by chance
    ((6.2, 5.0, 3.9), UNCLEAR)])
def test_a_crossover_needs_a_clear_lag_and_a_clear_lead(hybrid: Any, verdict: str) -> None:
    figures = [fig("held_out_curve", name, value, 0.01, tokens=tokens)
               for name, curve in (("t", (6.0, 5.0, 4.0)), ("h", hybrid))
               for tokens, value in zip((1, 2, 3), curve, strict=True)]
    assert rules.crossover(table(*figures)).verdict == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(8.5, SEEN), (3.0, NOT_SEEN), (6.0, UNCLEAR)])
def test_the_predicted_ratio_is_the_largest_of_all_contexts(ratio: float, verdict: str) -> None:
    predicted = {"8t": {"family": "transformer", "kv_heads": 32}, "8h": {"family": "hybrid", "kv_heads": 8}}
    figures = [fig("predicted_decode", name, value, hardware="H100", batch=32, context=context, fits=fits)
               for context, speed, fits in ((1024, 1.2, "yes"), (65536, ratio, "no"))
               for name, value in (("8t", 1.0), ("8h", speed))]
    found = speed_rules.predicted_decode(table(*figures, predicted=predicted))
    assert found.verdict == verdict
    assert "1.2× where both fit one GPU" in found.sentence


@pytest.mark.parametrize("predicted", [
    {"8t": ("transformer", 8e9), "1h": ("hybrid", 1e9)},
    {"8t": ("transformer", 8e9), "8h": ("hybrid", 8e9), "8h-rope": ("hybrid", 8e9)}])
def test_predictions_of_another_size_or_of_several_hybrids_decide_nothing(
        predicted: dict[str, tuple[str, float]]) -> None:
    about = {name: {"family": family, "parameters": size, "kv_heads": 8} for name, (family, size) in predicted.items()}
    figures = [fig("predicted_decode", name, 1.0 if name == "8t" else 20.0, hardware="H100", batch=32, context=1024,
                   fits="yes") for name in predicted]
    found = speed_rules.predicted_decode(table(*figures, predicted=about))
    assert (found.verdict, ratio_sentence(table(*figures, predicted=about))) == (UNCLEAR, "")


@pytest.mark.parametrize(("unlike", "words"), [
    ({"group": "large"}, "not matched in size"), ({"tokens": 7}, "different numbers of tokens"),
    ({"seq_len": 512}, "sequences of different lengths")])
def test_families_of_two_sizes_or_on_unequal_tokens_are_not_compared(unlike: dict[str, Any], words: str) -> None:
    def judged(**more: Any) -> rules.Verdict:
        made = table(*losses(m=(4.0, 0.01), m2=(4.2, 0.01)))
        made.about["recipes"]["m2"] |= more
        return rules.same_quality(made)

    assert judged().verdict == NOT_SEEN
    assert (judged(**unlike).verdict, words in judged(**unlike).sentence) == (UNCLEAR, True)


def test_families_that_practised_unlike_data_are_not_compared_but_a_rate_of_its_own_is_no_bar() -> None:
    figures = losses(m=(4.0, 0.01), m2=(4.2, 0.01))
    for key, verdict in (("data.synthetic.share", UNCLEAR), ("optim.lr", NOT_SEEN)):
        assert rules.same_quality(table(*figures, differences={key: {"m": 1, "m2": 2}})).verdict == verdict
    # what differs is another model
    other = table(*figures, differences={"data.synthetic.share": {"m": 1, "m2": 1, "t": 2}})
    assert rules.same_quality(other).verdict == NOT_SEEN


PHONEBOOK_RULES = [rules.transformer_solves_phonebook, rules.pure_ssms_fail_phonebook, rules.errors_are_fuzzy,
                   rules.reversing_changes_phonebook, rules.hybrid_solves_phonebook]


@pytest.mark.parametrize("rule", PHONEBOOK_RULES)
def test_nothing_is_decided_on_a_phonebook_that_nobody_learned(rule: Callable[[Table], rules.Verdict]) -> None:
    low = dict.fromkeys(FAMILIES, POOR)
    figures = [*book(**low), *book(form="reversed", **low), *book("wrong_digits", **low), *book("chance_digits", **low)]
    found = rule(table(*figures))
    assert found.verdict == UNCLEAR
    assert "No model with attention learned" in found.sentence


@pytest.mark.parametrize("rule", [rules.transformer_solves_phonebook, rules.pure_ssms_fail_phonebook,
                                  rules.hybrid_solves_phonebook, rules.reversing_changes_phonebook,
                                  rules.errors_are_fuzzy, rules.same_quality, rules.crossover])
def test_one_seed_of_losses_or_recall_decides_nothing(rule: Callable[[Table], rules.Verdict]) -> None:
    verdicts = {}
    for seeds in (1, 2):
        by_model = {"t": GOOD, "m": POOR, "m2": POOR, "h": GOOD}
        figures = book(half=0.0, seeds=seeds, **by_model)
        figures += book(half=0.0, seeds=seeds, form="reversed", t=GOOD, m=GOOD, m2=GOOD)
        figures += book("wrong_digits", 0.0, seeds, **dict.fromkeys(("m", "m2"), (0.5,) * 4))
        figures += book("chance_digits", 0.0, seeds, **dict.fromkeys(("m", "m2"), (0.1,) * 4))
        figures += [fig("held_out_loss", name, 4.0, 0.0, seeds) for name in FAMILIES]
        figures += [fig("held_out_curve", name, value, 0.0, seeds, tokens=tokens)
                    for name, curve in (("t", (6.0, 5.0, 4.0)), ("h", (6.2, 5.1, 3.9)))
                    for tokens, value in zip((1, 2, 3), curve, strict=True)]
        verdicts[seeds] = rule(table(*figures)).verdict
    assert verdicts[1] == UNCLEAR
    assert verdicts[2] != UNCLEAR


def test_every_rule_survives_a_study_without_figures() -> None:
    judged = judge(table())
    assert [j.claim.id for j in judged] == [f"C{i}" for i in range(1, 36)]
    assert {j.verdict.verdict for j in judged} == {UNCLEAR}
    assert all(j.verdict.sentence for j in judged)


def test_a_study_without_the_family_says_so() -> None:
    found = rules.same_quality(Table([], {"recipes": {}, "predicted": {}}))
    assert (found.verdict, found.sentence) == (UNCLEAR, "The study has not exactly one Mamba.")


def test_untested_claims_are_never_decided_and_name_their_test(study_folder: Path) -> None:
    collect(study_folder)
    judged = judge(read_table(study_folder))
    for one in judged:
        assert one.claim.rule or one.verdict.verdict == UNCLEAR
        assert one.claim.rule or one.claim.test.startswith("Needs")
    assert len([one for one in judged if one.claim.rule]) == 10
    near = next(j for j in judged if j.claim.id == "C22")
    assert "3.820" in near.verdict.sentence
    assert {j.claim.id: j.verdict.verdict for j in judged if j.claim.rule} == {
        "C11": SEEN, "C12": UNCLEAR, "C16": SEEN, "C17": SEEN, "C18": SEEN, "C20": UNCLEAR, "C21": SEEN,
        "C32": UNCLEAR, "C33": SEEN, "C34": SEEN}
