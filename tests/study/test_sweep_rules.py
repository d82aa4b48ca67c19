"""Each rule on the layer mix, on invented figures: what makes it say seen, not seen, and too small to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_claims import fig

from hinny.pattern import allocate, counts
from hinny.study import sweep_rules
from hinny.study.claims import judge
from hinny.study.collect import Figure, Table
from hinny.study.rules import NOT_SEEN, SEEN, UNCLEAR, Verdict


def model(pattern: str, kv_heads: int = 2, positions: str = "none", even: bool = True) -> dict[str, Any]:
    n = len(pattern)
    return {"family": "hybrid", "pattern": pattern, "heads": 6, "kv_heads": kv_heads, "positions": positions,
            "even": even, "shares": {"attention": counts(pattern)["*"] / n, "mlp": counts(pattern)["-"] / n},
            "seq_len": 256, "d_state": 128, "flops_per_token": 100}


def table(models: dict[str, dict[str, Any]], losses: dict[str, tuple[float, float]], *more: Figure,
          seeds: int = 2) -> Table:
    """One line of these models, with the mean of their losses and half the range of the seeds."""
    figures = [fig("held_out_loss", name, value, half, seeds) for name, (value, half) in losses.items()]
    members = [{"recipe": name, "value": name, "x": None} for name in models]
    return Table([*figures, *more], {"recipes": models, "predicted": {}, "sweeps": [
        {"plot": "p", "line": "l", "x": "value", "members": members}]})


SHARES = {0.0: "a0", 0.04: "a4", 0.08: "a8", 0.25: "a25", 0.5: "a50"}
ATTENTION = {name: model(allocate(48, share, 0.5)) for share, name in SHARES.items()}


@pytest.mark.parametrize(("losses", "verdict"), [
    ((3.2, 3.1, 3.05, 3.1, 3.2), SEEN),
    ((3.2, 3.05, 3.1, 3.1, 3.2), SEEN),
    ((3.2, 3.1, 3.05, 3.055, 3.2), UNCLEAR),   # a quarter is as good
    ((3.06, 3.1, 3.05, 3.1, 3.2), UNCLEAR),    # none is as good
    ((3.2, 3.1, 3.05, 3.0, 3.1), NOT_SEEN),    # a quarter is better
    ((3.2, 3.1, 3.05, 3.04, 3.1), UNCLEAR)])   # perhaps
def test_the_best_share_must_be_near_8_percent_and_clearly_better(losses: tuple[float, ...], verdict: str) -> None:
    found = sweep_rules.best_attention_share(table(ATTENTION, {
        name: (loss, 0.004) for name, loss in zip(ATTENTION, losses, strict=True)}))
    assert found.verdict == verdict, found.sentence
    assert "8\N{NO-BREAK SPACE}% 3." in found.sentence


def test_a_wide_spread_of_seeds_or_one_seed_decides_nothing() -> None:
    losses = dict(zip(ATTENTION, ((3.2, 0.08), (3.1, 0.08), (3.05, 0.08), (3.1, 0.08), (3.2, 0.08)), strict=True))
    assert sweep_rules.best_attention_share(table(ATTENTION, losses)).verdict == UNCLEAR
    sure = {name: (value, 0.0) for name, (value, _) in losses.items()}
    assert sweep_rules.best_attention_share(table(ATTENTION, sure)).verdict == SEEN
    found = sweep_rules.best_attention_share(table(ATTENTION, sure, seeds=1))
    assert (found.verdict, "one seed" in found.sentence) == (UNCLEAR, True)


def test_a_line_without_the_ends_decides_nothing() -> None:
    some = {name: ATTENTION[name] for name in ("a4", "a8", "a25")}
    found = sweep_rules.best_attention_share(table(some, {"a4": (3.1, 0), "a8": (3.0, 0), "a25": (3.1, 0)}))
    assert (found.verdict, "lacks" in found.sentence) == (UNCLEAR, True)


MLP = {name: model(allocate(48, 0.08, share)) for share, name in ((0.0, "m0"), (0.3, "m30"), (0.5, "m50"))}
PLACED = {"even": model(allocate(48, 0.08, 0.5)),
          "first": model("****" + allocate(48, 0.08, 0.5).replace("*", ""), even=False),
          "last": model(allocate(48, 0.08, 0.5).replace("*", "") + "****", even=False)}
HEADS = {"gqa": model("M*-M*-", kv_heads=2), "mha": model("M*-M*-", kv_heads=6)}
ROPE = {"none": model("M*-M*-"), "rope": model("M*-M*-", positions="rope")}


@pytest.mark.parametrize(("rule", "models", "losses", "verdict"), [
    (sweep_rules.mlp_share_is_free, MLP, (3.0, 2.98, 3.005), SEEN),
    (sweep_rules.mlp_share_is_free, MLP, (3.0, 2.98, 3.05), NOT_SEEN),
    (sweep_rules.mlp_share_is_free, MLP, (3.0, 3.0, 3.012), UNCLEAR),
    (sweep_rules.even_spreading_is_as_good, PLACED, (3.0, 3.1, 3.2), SEEN),
    (sweep_rules.even_spreading_is_as_good, PLACED, (3.0, 2.95, 3.2), NOT_SEEN),
    (sweep_rules.even_spreading_is_as_good, PLACED, (3.0, 2.988, 3.2), UNCLEAR),
    (sweep_rules.grouped_queries_are_free, HEADS, (3.0, 3.0), SEEN),
    (sweep_rules.grouped_queries_are_free, HEADS, (3.05, 3.0), NOT_SEEN),
    (sweep_rules.grouped_queries_are_free, HEADS, (3.012, 3.0), UNCLEAR),
    (sweep_rules.rope_does_not_help, ROPE, (3.0, 3.0), SEEN),
    (sweep_rules.rope_does_not_help, ROPE, (3.05, 3.0), NOT_SEEN),
    (sweep_rules.rope_does_not_help, ROPE, (3.012, 3.0), UNCLEAR)])
def test_what_is_free_costs_at_most_a_hundredth_in_the_worst_seed(
        rule: Callable[[Table], Verdict], models: dict[str, Any], losses: tuple[float, ...], verdict: str) -> None:
    found = rule(table(models, {name: (loss, 0.002) for name, loss in zip(models, losses, strict=True)}))
    assert found.verdict == verdict, found.sentence


def test_one_key_value_head_is_not_what_the_claim_is_about() -> None:
    models = {"mqa": model("M*-M*-", kv_heads=1), **HEADS}
    losses = {"mqa": (3.2, 0.002), "gqa": (3.0, 0.002), "mha": (3.0, 0.002)}
    assert sweep_rules.grouped_queries_are_free(table(models, losses)).verdict == SEEN
    del models["gqa"]
    assert sweep_rules.grouped_queries_are_free(table(models, losses)).verdict == UNCLEAR


@pytest.mark.parametrize(("half", "verdict"), [(0.002, NOT_SEEN), (0.012, NOT_SEEN), (0.02, UNCLEAR)])
def test_a_gap_smaller_than_the_seeds_of_one_side_are_apart_decides_nothing(half: float, verdict: str) -> None:
    """0.05 between the means: with seeds 0.04 apart a gap of 0.028 is left, which a third seed may close."""
    losses = {"none": (3.05, half), "rope": (3.0, 0.002)}
    assert sweep_rules.rope_does_not_help(table(ROPE, losses)).verdict == verdict


def test_a_line_that_varies_more_than_one_thing_decides_nothing() -> None:
    def judged(**about: Any) -> Verdict:
        made = table(ROPE, {"none": (3.0, 0.002), "rope": (3.0, 0.002)})
        made.about["sweeps"][0] |= about
        return sweep_rules.rope_does_not_help(made)

    own = ["model.attention.positions", "model.attention.rope_base", "model.mlp.d_ff"]
    assert judged(differ=own).verdict == SEEN
    found = judged(differ=[*own, "optim.lr"])
    assert (found.verdict, "they differ in optim.lr, too" in found.sentence) == (UNCLEAR, True)
    for differ, tested in ((own, True), ([*own, "optim.lr"], False)):
        made = table(ROPE, {"none": (3.0, 0.002), "rope": (3.0, 0.002)})
        made.about["sweeps"][0]["differ"] = differ
        (c7,) = (one for one in judge(made) if one.claim.id == "C7")
        assert c7.tested == tested
    unmatched = table({**ROPE, "rope": {**ROPE["rope"], "group": "large"}}, {"none": (3.0, 0.0), "rope": (3.0, 0.0)})
    assert "not matched" in sweep_rules.rope_does_not_help(unmatched).sentence
    # another line that varies it alone is the one to judge
    both = table(ROPE, {"none": (3.0, 0.002), "rope": (3.0, 0.002)})
    both.about["sweeps"].insert(0, {**both.about["sweeps"][0], "differ": ["model.d_model"]})
    assert sweep_rules.rope_does_not_help(both).verdict == SEEN


def test_another_placement_of_mlps_alone_says_nothing_of_attention() -> None:
    even = PLACED["even"]["pattern"]
    other = model(even[0] + even[2] + even[1] + even[3:], even=False)
    models = {"even": PLACED["even"], "mlps": other}
    judged = {one.claim.id: one for one in judge(table(models, dict.fromkeys(models, (3.0, 0.0))))}
    assert (judged["C5"].claim.rule, judged["C5"].verdict.verdict) == (None, UNCLEAR)


def test_of_two_models_with_one_share_the_even_one_counts() -> None:
    models = {**ATTENTION, "first": {**ATTENTION["a8"], "even": False}}
    losses = dict(zip(models, ((3.2, 0.0), (3.1, 0.0), (3.05, 0.0), (3.1, 0.0), (3.2, 0.0), (3.9, 0.0)), strict=True))
    assert sweep_rules.best_attention_share(table(models, losses)).verdict == SEEN


def test_more_mlp_trains_faster_only_on_an_accelerator() -> None:
    def speeds(few: float, many: float, **shape: object) -> Verdict:
        return sweep_rules.mlp_trains_faster(table(MLP, dict.fromkeys(MLP, (3.0, 0.0)), *(
            fig("train", name, value, 10, 1, **shape) for name, value in (("m0", few), ("m50", many)))))

    assert [speeds(*pair).verdict for pair in ((1000, 1200), (1200, 1000), (1000, 1030))] == [
        SEEN, NOT_SEEN, UNCLEAR]
    assert speeds(1000, 1200, threads=2).verdict == UNCLEAR
    figures = [fig("train", "m0", 1000, 10, 1), replace(fig("train", "m50", 1200, 10, 1), machine="another")]
    elsewhere = sweep_rules.mlp_trains_faster(table(MLP, dict.fromkeys(MLP, (3.0, 0.0)), *figures))
    assert (elsewhere.verdict, "one machine" in elsewhere.sentence) == (UNCLEAR, True)


@pytest.mark.parametrize(("models", "claims"), [
    (ATTENTION, {"C1"}), (MLP, {"C3", "C4"}), (PLACED, {"C5"}), (HEADS, {"C6"}), (ROPE, {"C7"})])
def test_a_claim_is_tested_where_the_study_varies_what_it_is_about(models: dict[str, Any], claims: set[str]) -> None:
    judged = judge(table(models, dict.fromkeys(models, (3.0, 0.0))))
    assert {one.claim.id for one in judged if one.claim.rule} & {"C1", "C3", "C4", "C5", "C6", "C7"} == claims
