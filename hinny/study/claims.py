"""The paper's 35 claims as a checklist: its text, its numbers at 8B, and the rule that decides it on a study.

A claim without a rule is one that this kind of study does not test; what would test it is said in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hinny.study import longer_rules, rules, speed_rules, sweep_rules, tasks_rules
from hinny.study.collect import Table
from hinny.study.rules import UNCLEAR, Verdict
from hinny.study.tasks import RULER_MEAN

Rule = Callable[[Table], Verdict]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper. `test` is the rule in words, or what would test it where there is no rule.

    longer: for a rule on extensions, what would test it where a study has none; it is not tested there.
    asks: for a rule on tasks that a study may leave out, their figures; where one is absent, `longer` is said as well.
    varied: for a rule on what a study varies, the keys of `sweep_rules.varies`; where it does not, `longer` is said.
    beside: for a rule that says nothing of its own where a study has not exactly one model of these families, they.
    """

    id: str
    text: str
    paper: str
    test: str
    rule: Rule | None = None
    longer: str = ""
    asks: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict."""

    claim: Claim
    verdict: Verdict
    tested: bool = True
    """Whether a rule has read figures of this study; too small to tell is said of what was tested."""


def judge(table: Table) -> list[Judged]:
    """Every claim with the verdict of its rule on the figures of `table`."""
    claims = [c if _can_test(table, c) else replace(c, rule=None, test=c.longer) for c in CLAIMS]
    return [_judged(table, claim) for claim in claims]


def _judged(table: Table, claim: Claim) -> Judged:
    if claim.rule is None:
        return Judged(claim, _untested(table, claim), tested=False)
    verdict = claim.rule(table)
    asked = any(table.find(what) for what in verdict.read) and all(table.of_family(name) for name in claim.beside)
    alike = not claim.varied or bool(sweep_rules.compared(table, *claim.varied))
    return Judged(claim, verdict, tested=asked and alike)


def _can_test(table: Table, claim: Claim) -> bool:
    """Whether the study has what the claim's rule is about."""
    if claim.asks:
        return all(table.find(what) for what in claim.asks)
    if claim.varied:
        return sweep_rules.varies(table, *claim.varied)
    return not claim.longer or bool(table.about.get("extensions"))


def _untested(table: Table, claim: Claim) -> Verdict:
    """Too small to tell, and the figure of this study that comes nearest, if there is one."""
    what, families = NEAREST.get(claim.id, ("", ()))
    found = [table.one(what, table.of_family(family)) for family in families]
    near = [f"{table.label(f.variant)} {rules.spread(f)}" for f in found if f is not None]
    names = {"held_out_loss": "held-out loss, nats/token"}
    if near and len(near) == len(families):
        return Verdict(UNCLEAR, f"Not tested. The nearest figure here, {names[what]}: {', '.join(near)}.", (what,))
    return Verdict(UNCLEAR, "Not tested.")


NEAREST = {"C10": ("held_out_loss", ("transformer", "mamba", "mamba2")),
           "C22": ("held_out_loss", ("transformer", "hybrid")),
           "C23": ("held_out_loss", ("transformer", "mamba2"))}
"""Claims about standard tasks, which models of this size answer by chance → figure and families to show instead."""

_SWEEP = "Needs a sweep of "
_TASKS = "Needs models that answer the standard tasks above chance"
_LONG = "Needs a study that extends the trained models to longer contexts"

_BY = "by more than 3 points, and by more than √(1/2n) for n questions (10 points for 50, 4 for 400)"
_FEW = f", nor on fewer than {tasks_rules.FEW} questions"

_CLEAR = "than 0.01 nats/token and than the seeds of either are apart"

CLAIMS = [
    Claim("C1", "The best share of attention layers is near 8 %.", "130M, 24 layers: loss lowest with 2 of 24",
          "Along one line of variants with one share of MLP layers. Seen if the mean held-out loss is lowest at a "
          "share of 4 to 17 %, whose worst seed is below the best seed with none and those with 25 % or more, by more "
          f"{_CLEAR}; not seen if the worst seed of another share is below its best by that.",
          sweep_rules.best_attention_share,
          longer=_SWEEP + "the share of attention layers, compared by held-out loss.", varied=("attention", "mlp")),
    Claim("C2", "The best share does not move with the model's size.", "also 8 % at 840M",
          "Needs the sweep of C1 at two or three sizes."),
    Claim("C3", "30 to 50 % of the layers can be MLPs at no cost in loss.", "attention 8 %, MLP from 5 to 50 %",
          "At one share of attention layers. Seen if with 30 to 50 % of MLP layers the worst seed is at most 0.01 "
          "nats/token above the best seed with 10 % or less; not seen if a best seed is above the worst by more "
          f"{_CLEAR}.",
          sweep_rules.mlp_share_is_free,
          longer=_SWEEP + "the share of MLP layers at equal parameters and tokens.", varied=("mlp", "attention")),
    Claim("C4", "More MLP layers train faster.", "50 % MLP 20 % faster than 5 %",
          "On an accelerator, the largest share of MLP layers against the smallest. Seen if its slowest timing is "
          "more than 3 % above the other's fastest; not seen if its fastest is as far below the slowest.",
          sweep_rules.mlp_trains_faster,
          longer=_SWEEP + "the share of MLP layers with training speed at equal parameters, on a GPU.",
          varied=("mlp", "attention")),
    Claim("C5", "Even spreading is as good as any placement of attention.", "no significant gain of another placement",
          "Seen if the worst seed of the even placement is at most 0.01 nats/token above the best seed of every other; "
          f"not seen if its best seed is above the worst of one by more {_CLEAR}.",
          sweep_rules.even_spreading_is_as_good,
          longer=_SWEEP + "placements: even, first, middle, last, in blocks; loss and recall.",
          varied=("placement", "layers")),
    Claim("C6", "Grouped-query attention is free in a hybrid.", "perplexity +0.04 % with 8 groups",
          "Seen if the worst seed with fewer KV heads, but two at least, is at most 0.01 nats/token above the best "
          f"with all; not seen if its best seed is above the worst by more {_CLEAR}.",
          sweep_rules.grouped_queries_are_free,
          longer="Needs two hybrids that differ in KV heads alone.", varied=("kv_heads", "pattern", "positions")),
    Claim("C7", "RoPE in the hybrid's attention does not help at the training length.",
          "840M, mean of tasks: 52.19 without, 52.39 with",
          "By held-out loss. Seen if the worst seed without positions is at most 0.01 nats/token above the best with "
          f"rotary ones; not seen if its best seed is above the worst by more {_CLEAR}.",
          sweep_rules.rope_does_not_help,
          longer="Needs two hybrids that differ in positions alone.", varied=("positions", "pattern", "kv_heads")),
    Claim("C8", "RoPE hurts the hybrid after extension.", "16K: 53.43 without; 52.61 and 51.52 with",
          "Seen if at every length that both are extended to, the worst seed of the hybrid without positions (extended "
          "by its length alone) has a loss below the best seed of the best method of the one with rotary positions by "
          f"more {_CLEAR}; not seen if no pair of seeds is 0.01 nats/token apart.",
          longer_rules.rope_hurts_extension, _LONG + ", with and without RoPE."),
    Claim("C9", "Grouping the norm inside Mamba-2 changes nothing.", "no difference in loss",
          "Needs two Mamba-2 models that differ in norm groups alone."),
    Claim("C10", "Pure SSMs match or beat the Transformer on zero-shot tasks.",
          "1.1T tokens, means without MMLU: 67.87 Transformer, 68.07 Mamba, 68.56 Mamba-2", _TASKS + "."),
    Claim("C11", "Mamba and Mamba-2 reach the same quality.", "1.1T tokens, means: 56.71 and 57.28",
          "Seen if mean held-out losses are less than 0.05 nats/token apart and so are each side's seeds; not seen if "
          "the worst seed of one beats the best of the other by more than that.", rules.same_quality),
    Claim("C12", "A Mamba-2 layer trains almost 3 times as fast as a Mamba layer at state size 128.", "about 3×",
          "On an accelerator, at a state of 128 or more in both. Seen if the slowest timing of Mamba-2 is at least "
          "twice the fastest of Mamba; not seen if its fastest is less than twice the slowest.",
          speed_rules.mamba2_trains_faster, beside=("mamba", "mamba2")),
    Claim("C13", "Pure SSMs lag on lettered multiple choice (few-shot MMLU).", "17 points behind at 1.1T tokens",
          "By choice-letter, made-up lookups and sums. Seen if the Transformer's worst seed beats both pure SSMs' best "
          f"{_BY}; not seen if its best seed is at most 3 points above the worst of both. Not decided where none of "
          f"the three answers half in its worst seed{_FEW}.", tasks_rules.pure_ssms_lag_by_letter,
          "Needs a study that asks choice-letter, of models that can answer it.", (tasks_rules.LETTER,)),
    Claim("C14", "That gap shrinks with more tokens.", "1.4 points behind at 3.5T tokens",
          "Needs the task of C13 along training."),
    Claim("C15", "The gap is in the format, not the knowledge: on cloze questions SSMs match or win.",
          "direction only; the table's values are not known to us",
          "Where C13 is seen by the same figures. Seen if on the same questions as cloze the Transformer's best seed "
          "is at most 3 points above the worst of both pure SSMs; not seen if its worst seed beats the best of both "
          f"{_BY}. Not decided where none of the three answers half of the cloze questions in its worst "
          f"seed{_FEW}.", tasks_rules.gap_is_in_the_format,
          "Needs a study that asks choice-letter and choice-cloze, of models that can answer them.",
          (tasks_rules.LETTER, tasks_rules.CLOZE)),
    Claim("C16", "Transformers solve Phonebook up to the training length.", "near 100 % up to 4096 tokens",
          "Seen if the worst seed answers 90 % at every asked length up to the training length, of which one is past "
          "its half; not seen if it does at the shortest but the best seed does not at some longer one.",
          rules.transformer_solves_phonebook),
    Claim("C17", "Pure SSMs fail Phonebook far below the training length.", "beyond about 500 of 4096 tokens",
          "Seen if both pure SSMs, in their best seed, are below half right at an asked length of at most half the "
          "training length, up to which a model with attention holds half right in its worst seed; not seen if both "
          "hold half right, in their worst seed, up to the training length.", rules.pure_ssms_fail_phonebook),
    Claim("C18", "SSM errors are fuzzy: digits of wrong numbers agree above chance.", "above chance",
          "Seen if, for both pure SSMs, the share of right digits in wrong numbers, each digit scored given the true "
          "digits in front of it, exceeds that against another prompt's number by more than 3 points, averaged over "
          "lengths at which two seeds gave wrong numbers, lowest seed against highest; not seen if it is below that "
          "for both, highest against lowest.",
          rules.errors_are_fuzzy),
    Claim("C19", "More training does not close the Phonebook gap.", "still open from 1.1T to 3.5T tokens",
          "Needs Phonebook at several points of a longer training."),
    Claim("C20", "Asking first (reversed Phonebook) changes the picture for SSMs.",
          "sources disagree on the direction", "Seen if, for both pure SSMs, the forms' means over trained lengths are "
          "more than 3 points apart, worst seed against best; not seen if every pair of seeds is closer than that, and "
          "one form is half right.",
          rules.reversing_changes_phonebook),
    Claim("C21", "A hybrid with 8 % attention solves Phonebook up to and slightly beyond the training length.",
          "4K model: to about 5.5K tokens",
          "Seen if the worst seed answers 90 % at every asked length up to the training length, of which one is past "
          "its half, and half at the first one beyond; not seen if it answers 90 % at the shortest and the best seed "
          "fails one of these.",
          rules.hybrid_solves_phonebook),
    Claim("C22", "The hybrid beats the Transformer on all 12 standard tasks.", "mean 55.82 against 53.17",
          _TASKS + "."),
    Claim("C23", "With much data pure Mamba-2 also has the higher mean.", "54.69 against 53.17", _TASKS + "."),
    Claim("C24", "RULER at the training length: hybrid above Transformer, far above Mamba-2.",
          "81.99, 77.62 and 52.14",
          "By the mean over the asked RULER tasks. Seen if the hybrid's worst seed beats the Transformer's best "
          f"{_BY}, and Mamba-2's best by that and by more than 10 points; not seen if its best seed is at most 3 "
          "points above the Transformer's worst, or at most 10 above Mamba-2's. Not decided where none of the three "
          f"reaches a half in its worst seed{_FEW}.", tasks_rules.hybrid_leads_on_ruler,
          "Needs a study that asks RULER's tasks at the training length.", (RULER_MEAN,)),
    Claim("C25", "After extension the hybrid leads on RULER.", "13 points ahead at 16K",
          "By the mean over the asked RULER tasks at the new lengths that both were asked at. Seen if at each of them "
          "the worst seed of the hybrid without positions (extended by its length alone) beats the best of the "
          f"Transformer's best method {_BY}; not seen if at each its best seed is at most 3 points above the worst. "
          f"Not decided where at one of them neither reaches a half in its worst seed{_FEW}.",
          tasks_rules.extended_hybrid_leads_on_ruler, _LONG + " and runs RULER.", (tasks_rules.EXTENDED_MEAN,)),
    Claim("C26", "The hybrid is slightly worse on multi-document questions.", "about 1 point behind",
          "Needs questions over a growing number of irrelevant documents."),
    Claim("C27", "The hybrid is more sensitive to the prompt's wording there.",
          "10.63 to 16.16, against 15.25 to 17.68", "Needs several wordings of the questions of C26."),
    Claim("C28", "Extension needs a short training at a tenth of the learning rate and no change of positions.",
          "50B of 3.5T tokens, to 16K, 32K and 128K",
          "For the hybrid without positions, extended by its length alone. Seen if at every length, in every seed, the "
          "loss at the new length is more than 0.01 nats/token below the base's at its own, and the loss at the old "
          "length rises by less than 0.02; not seen if one of these fails in every seed at every length.",
          longer_rules.short_training_extends, _LONG + "."),
    Claim("C29", "The extended hybrid stays perfect on Phonebook beyond its length.", "128K model beyond 150K tokens",
          "Seen if for every extension of the hybrid without positions (by its length alone) the worst seed answers "
          "90 % at the longest asked length within the new one and at the first beyond; not seen if it does within and "
          "the best seed does not beyond.", longer_rules.recall_past_the_extension,
          _LONG + " and asks Phonebook past them."),
    Claim("C30", "Extended hybrids match or exceed the Transformer on the long tasks on average.",
          "on average, 23 tasks",
          "By recall alone: the mean share right of Phonebook and copying past the old length. Seen if at every new "
          "length the worst seed of the hybrid (extended by its length alone) is at most 3 points below the best seed "
          "of the Transformer's best method; not seen if its best seed is further below the worst.",
          longer_rules.hybrid_keeps_up, _LONG + " and runs the long tasks."),
    Claim("C31", "Packing unrelated documents into extension data hurts the hybrid more.", "named as a likely cause",
          _LONG + ", with documents related and unrelated, apart and not."),
    Claim("C32", "Hybrid and Transformer use the hardware equally well in training.", "29.9 and 30.7 % of the peak",
          "On an accelerator; timings on a CPU never decide. Seen if the ratio of their FLOP/s lies between 0.9 and "
          "1.1 for every pair of timings; not seen if it lies outside for every pair.",
          speed_rules.equal_training_efficiency, beside=("transformer", "hybrid")),
    Claim("C33", "Decoding is predicted to be up to 8 times as fast at long context.", "up to 8×, a prediction",
          "Seen if the largest predicted ratio of the hybrid's to the Transformer's decode speed is at least 8; not "
          "seen if it is below 4. It is a prediction here, too.", speed_rules.predicted_decode),
    Claim("C34", "The hybrid lags the Transformer early in training and passes it later.", "no token count known to us",
          f"Seen if the hybrid's best seed is behind the Transformer's worst by more {_CLEAR} at two neighbouring "
          "points, and its worst ahead of the best by that at the end; not seen if it is ahead by that at every point.",
          rules.crossover),
    Claim("C35", "Four attention layers of 56 carry the ability to recall.", "24 Mamba-2, 4 attention, 28 MLP layers",
          "Needs Phonebook and loss with attention layers switched off one by one."),
]
