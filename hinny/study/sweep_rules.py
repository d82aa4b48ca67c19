"""Rules for the paper's claims on the layer mix, from studies that vary it; the lines of a [[vary]] plot are compared.

Margins and the treatment of seeds are those of hinny.study.rules: never on one seed; a difference counts when the worst
seed of one side beats the best of the other by more than 0.01 nats/token and than the seeds of either are apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hinny.study.alike import unlike
from hinny.study.collect import Figure, Table
from hinny.study.rules import LOSS_MARGIN, NOT_SEEN, SEEN, UNCLEAR, Verdict, clearly_above, percent, spread
from hinny.study.speed_rules import not_side_by_side

NEAR = (0.04, 0.17)
"""Shares of attention layers that are near 8 %: half of it to twice it."""
MANY_ATTENTION = 0.25
MLP_FEW, MLP_MANY = 0.1, (0.3, 0.5)
LOSS = "held_out_loss"
SPEED_MARGIN = 1.03
"""Timings of one process spread less than those of two do."""
SLACK = 0.005
"""How far a share may be from the one that is asked for: shares are whole numbers of layers."""
MIX = {"model.pattern", "model.n_layers", "model.attention_ratio", "model.mlp_ratio", "model.mlp.d_ff"}
"""Keys that say which layers there are, and the width by which models are made equal in size."""
OWN = {"attention": MIX, "mlp": MIX, "placement": MIX, "kv_heads": {"model.attention.n_kv_heads", "model.mlp.d_ff"},
       "positions": {"model.attention.positions", "model.attention.rope_fraction", "model.attention.rope_base",
                     "model.mlp.d_ff"}}
"""What is varied → the keys in which models may differ for it."""
Models = list[tuple[dict[str, Any], Figure]]
"""What is told of each model of a line, and its held-out loss."""


@dataclass(frozen=True)
class _Line:
    """Models of a line of a plot, and in what else they differ, as part of a sentence; "" where in nothing."""

    models: Models
    besides: str


def varies(table: Table, *keys: str) -> bool:
    """Whether some line of the study has models that differ in what `keys` name, the first of them."""
    return _line(table, *keys) is not None


def compared(table: Table, *keys: str) -> set[str]:
    """The models of the line that `varies` finds, by name; none if they differ in more."""
    line = _line(table, *keys)
    return {figure.variant for _, figure in line.models} if line and not line.besides else set()


def _line(table: Table, *keys: str) -> _Line | None:
    """The first line whose models differ in the first key alone; or in more, but agree in the other keys."""
    found = []
    for line in table.about.get("sweeps", []):
        models = [(table.about["recipes"][member["recipe"]], figure) for member in line["members"]
                  if (figure := table.one(LOSS, member["recipe"])) is not None]
        sets = [{_value(about, key) for about, _ in models} for key in keys]
        if len(sets[0]) > 1 and all(len(values) == 1 for values in sets[1:]):
            found.append(_Line(models, _besides(table, line, keys[0])))
    return min(found, key=lambda one: bool(one.besides), default=None)


def _besides(table: Table, line: dict[str, Any], key: str) -> str:
    if more := [name for name in line.get("differ", []) if name not in OWN[key]]:
        return f"they differ in {' and '.join(more[:2])}, too"
    return unlike(table.about, [member["recipe"] for member in line["members"]])


def _value(about: dict[str, Any], key: str) -> Any:
    """What is told of a model: a share to a tenth of a percent, where attention stands, the numbers of layers of each
    kind, or a key.
    """
    if key in ("attention", "mlp"):
        return round(about["shares"][key], 3)
    pattern = about["pattern"].replace("|", "")
    if key == "placement":
        return tuple(place for place, symbol in enumerate(pattern) if symbol == "*")
    if key == "layers":
        return tuple(sorted((symbol, pattern.count(symbol)) for symbol in set(pattern)))
    return about[key]


def _judged(table: Table, keys: tuple[str, ...],
            decide: Callable[[Models], tuple[str, str]]) -> Verdict:
    line = _line(table, *keys)
    if line is None:
        return Verdict(UNCLEAR, "The study varies nothing of the kind.")
    if line.besides:
        return Verdict(UNCLEAR, f"The models of the line cannot be compared: {line.besides}.", (LOSS,))
    if min(figure.seeds for _, figure in line.models) < 2:
        return Verdict(UNCLEAR, "The study has one seed, so the spread is unknown.", (LOSS,))
    verdict, text = decide(line.models)
    return Verdict(verdict, text, (LOSS,))


def _by_share(line: Models, kind: str) -> dict[float, Figure]:
    """Share of layers → the model's loss; of two with one share that of the more even pattern."""
    order = sorted(line, key=lambda one: bool(one[0].get("even")))
    return {about["shares"][kind]: figure for about, figure in order}


def best_attention_share(table: Table) -> Verdict:
    """C1: the loss is lowest near 8 % of attention layers, and clearly lower than with none and with a quarter."""
    def decide(line: Models) -> tuple[str, str]:
        shares = _by_share(line, "attention")
        near = {s: f for s, f in shares.items() if NEAR[0] - SLACK <= s <= NEAR[1] + SLACK}
        others = {s: f for s, f in shares.items() if s not in near}
        none, many = shares.get(0.0), [f for s, f in shares.items() if s >= MANY_ATTENTION - SLACK]
        told = "; ".join(f"{percent(share)} {spread(shares[share])}" for share in sorted(shares))
        if not near or none is None or not many:
            return UNCLEAR, f"Held-out loss by share of attention layers: {told}. The line lacks 0, 4 to 17 or 25 %."
        best = min(near.values(), key=lambda f: f.value)
        lowest = min(shares.values(), key=lambda f: f.value)
        text = f"Held-out loss by share of attention layers: {told}."
        if lowest is best and all(clearly_above(f, best) for f in (none, *many)):
            return SEEN, text
        beaten = any(clearly_above(best, f) for f in others.values())
        return (NOT_SEEN if beaten else UNCLEAR), text
    return _judged(table, ("attention", "mlp"), decide)


def mlp_share_is_free(table: Table) -> Verdict:
    """C3: with 30 to 50 % of MLP layers the loss is no higher than with hardly any."""
    def decide(line: Models) -> tuple[str, str]:
        shares = _by_share(line, "mlp")
        few = [f for s, f in shares.items() if s <= MLP_FEW]
        many = [f for s, f in shares.items() if MLP_MANY[0] - 2 * SLACK <= s <= MLP_MANY[1] + SLACK]
        told = "; ".join(f"{percent(share)} {spread(shares[share])}" for share in sorted(shares))
        text = f"Held-out loss by share of MLP layers: {told}."
        if not few or not many:
            return UNCLEAR, f"{text} The line lacks one of 10 % or less, and 30 to 50 %."
        return _free(many, few), text
    return _judged(table, ("mlp", "attention"), decide)


def _free(ours: list[Figure], theirs: list[Figure]) -> str:
    """Seen if our worst seed is within the margin of their best, for every pair; not seen if one of ours is clearly
    worse."""
    if all(one.high - other.low <= LOSS_MARGIN for one in ours for other in theirs):
        return SEEN
    return NOT_SEEN if any(clearly_above(one, other) for one in ours for other in theirs) else UNCLEAR


def mlp_trains_faster(table: Table) -> Verdict:
    """C4: tokens a second with the most MLP layers against the fewest, on an accelerator."""
    line = _line(table, "mlp", "attention")
    if line is None:
        return Verdict(UNCLEAR, "The study varies nothing of the kind.")
    if line.besides:
        return Verdict(UNCLEAR, f"The models of the line cannot be compared: {line.besides}.", ("train",))
    speeds = {about["shares"]["mlp"]: found for about, figure in line.models
              if (found := table.one("train", figure.variant)) is not None}
    if len(speeds) < 2:
        return Verdict(UNCLEAR, "The training speed of the variants was not measured side by side.", ("train",))
    few, many = speeds[min(speeds)], speeds[max(speeds)]
    if elsewhere := not_side_by_side([few, many]):
        return elsewhere
    text = (f"{percent(max(speeds))} of MLP layers: {many.value:,.0f} tokens/s; {percent(min(speeds))}: "
            f"{few.value:,.0f}, {many.value / few.value:.2f}×.")
    if "threads" in few.shape or "threads" in many.shape:
        return Verdict(UNCLEAR, f"{text} A CPU and tiny layers say nothing about a GPU's use.", ("train",))
    faster, slower = many.low > SPEED_MARGIN * few.high, SPEED_MARGIN * many.high < few.low
    verdict = SEEN if faster else NOT_SEEN if slower else UNCLEAR
    return Verdict(verdict, text, ("train",))


def even_spreading_is_as_good(table: Table) -> Verdict:
    """C5: no other placement of the same layers has a clearly lower loss than the even one."""
    def decide(line: Models) -> tuple[str, str]:
        even = [f for about, f in line if about.get("even")]
        others = [f for about, f in line if not about.get("even")]
        told = "; ".join(f"{figure.variant} {spread(figure)}" for _, figure in line)
        if not even or not others:
            return UNCLEAR, f"Held-out loss: {told}. The line lacks the even placement, or another one."
        return _free(even, others), f"Held-out loss by placement: {told}."
    return _judged(table, ("placement", "layers"), decide)


def grouped_queries_are_free(table: Table) -> Verdict:
    """C6: in a hybrid, fewer KV heads than heads, but two at least, cost nothing."""
    def decide(line: Models) -> tuple[str, str]:
        full = [f for about, f in line if about["kv_heads"] == about["heads"]]
        grouped = [f for about, f in line if 1 < about["kv_heads"] < about["heads"]]
        told = "; ".join(f"{about['kv_heads']} KV heads of {about['heads']} {spread(f)}" for about, f in line)
        if not full or not grouped or any(about["family"] != "hybrid" for about, _ in line):
            return UNCLEAR, f"Held-out loss: {told}. The line lacks a hybrid with all KV heads, or one with 2 or more."
        return _free(grouped, full), f"Held-out loss: {told}."
    return _judged(table, ("kv_heads", "pattern", "positions"), decide)


def rope_does_not_help(table: Table) -> Verdict:
    """C7: in a hybrid, rotary positions do not lower the loss at the training length."""
    def decide(line: Models) -> tuple[str, str]:
        none, rope = ([f for about, f in line if about["positions"] == kind] for kind in ("none", "rope"))
        told = "; ".join(f"{figure.variant} {spread(figure)}" for _, figure in line)
        if not none or not rope or any(about["family"] != "hybrid" for about, _ in line):
            return UNCLEAR, f"Held-out loss: {told}. The line lacks a hybrid without positions, or one with."
        return _free(none, rope), f"Held-out loss: {told}."
    return _judged(table, ("positions", "pattern", "kv_heads"), decide)
