"""Rules on speed, which does not depend on the seed: C12 and C32 compare the slowest and fastest of repeated timings of
one model each, on one machine; C33 compares predictions, which have no spread.
"""

from __future__ import annotations

from hinny.study.collect import Figure, Table
from hinny.study.rules import NOT_SEEN, PURE, SEEN, UNCLEAR, Verdict, not_alike

SAME_SIZE = 0.1
"""Share by which two predicted models may differ in parameters to stand beside each other."""


def _timed(table: Table, families: tuple[str, str]) -> tuple[Figure, Figure] | Verdict:
    """The training speed of each family's model; the verdict where they were not measured side by side, or are not
    alike.
    """
    names = [table.of_family(family) for family in families]
    one, other = (table.one("train", name) for name in names)
    if one is None or other is None:
        return Verdict(UNCLEAR, "The training speed of the two was not measured side by side.", ("train",))
    return not_side_by_side([one, other]) or not_alike(table, names, "train") or (one, other)


def not_side_by_side(timings: list[Figure]) -> Verdict | None:
    """The verdict where the timings are of different machines, for a study may have gone on on another one, or of
    different batches.
    """
    if len({figure.machine for figure in timings}) > 1:
        return Verdict(UNCLEAR, "The training speeds were not measured on one machine.", ("train",))
    odd = [key for key in ("batch", "length", "precision", "threads")
           if len({figure.shape.get(key) for figure in timings}) > 1]
    if odd:
        return Verdict(UNCLEAR, f"The training speeds were measured with another {odd[0]} each.", ("train",))
    return None


def mamba2_trains_faster(table: Table) -> Verdict:
    """C12: training speed of whole models, decided only at the paper's state size, never on a CPU."""
    found = _timed(table, PURE)
    if isinstance(found, Verdict):
        return found
    one, two = found
    sizes = [table.about["recipes"][figure.variant]["d_state"] for figure in found]
    text = (f"Whole models on this machine: Mamba-2 {two.value:,.0f} tokens/s, Mamba {one.value:,.0f}, "
            f"{two.value / one.value:.1f}× (states of {sizes[1]} and {sizes[0]}).")
    if "threads" in one.shape or "threads" in two.shape:
        return Verdict(UNCLEAR, f"{text} A CPU says nothing about a GPU's kernels.", ("train",))
    if min(sizes) < 128:
        return Verdict(UNCLEAR, f"{text} The claim is about layers with a state of 128 in both.", ("train",))
    verdict = SEEN if two.low / one.high >= 2 else NOT_SEEN if two.high / one.low < 2 else UNCLEAR
    return Verdict(verdict, text, ("train",))


def equal_training_efficiency(table: Table) -> Verdict:
    """C32: model FLOP/s of hybrid and Transformer within 10 %, never decided on a CPU, whose rows name threads."""
    found = _timed(table, ("transformer", "hybrid"))
    if isinstance(found, Verdict):
        return found
    base, ours = found
    flops = [table.about["recipes"][figure.variant]["flops_per_token"] for figure in found]
    low, mid, high = (a * flops[1] / (b * flops[0]) for a, b in
                      ((ours.low, base.high), (ours.value, base.value), (ours.high, base.low)))
    text = (f"Hybrid {ours.value:,.0f} tokens/s, Transformer {base.value:,.0f}; in FLOP/s the hybrid reaches "
            f"{mid:.2f} of the Transformer.")
    if "threads" in base.shape or "threads" in ours.shape:
        return Verdict(UNCLEAR, f"{text} A CPU and tiny layers say nothing about a GPU's use.", ("train",))
    verdict = SEEN if low > 0.9 and high < 1.1 else NOT_SEEN if high < 0.9 or low > 1.1 else UNCLEAR
    return Verdict(verdict, text, ("train",))


def predicted_pair(table: Table) -> tuple[str, str] | None:
    """The predicted hybrid and the Transformer of its size; None where there is not exactly one of each."""
    pair = [[(name, recipe.get("parameters", 1)) for name, recipe in table.about["predicted"].items()
             if recipe["family"] == family] for family in ("hybrid", "transformer")]
    if any(len(found) != 1 for found in pair):
        return None
    (hybrid, ours), (transformer, theirs) = (found[0] for found in pair)
    return (hybrid, transformer) if max(ours, theirs) <= (1 + SAME_SIZE) * min(ours, theirs) else None


def predicted_decode(table: Table) -> Verdict:
    """C33: the predicted speeds' ratio reaches 8 at some context; like the paper's, it is a prediction.

    Also where the caches exceed one GPU; the sentence gives the largest that fits besides.
    """
    names = predicted_pair(table)
    pairs = [(ours, base) for ours in table.find("predicted_decode", names[0])
             for base in table.find("predicted_decode", names[1],
                                    **{key: ours.shape[key] for key in ("hardware", "batch", "context")})
             ] if names else []
    if not pairs:
        return Verdict(UNCLEAR, "The study predicts not exactly one hybrid beside one Transformer of its size.",
                       ("predicted_decode",))
    ours, base = max(pairs, key=lambda pair: pair[0].value / pair[1].value)
    ratio = ours.value / base.value
    inside = [a.value / b.value for a, b in pairs if "no" not in (a.shape["fits"], b.shape["fits"])]
    heads = [table.about["predicted"][f.variant]["kv_heads"] for f in (base, ours)]
    fitting = f"{max(inside):.1f}×" if inside else "no figure"
    text = (f"Largest predicted ratio {ratio:.1f}× at {ours.number('context'):,} tokens, batch {ours.shape['batch']}, "
            f"{ours.shape['hardware']}, memory limits aside; {fitting} where both fit one GPU. "
            f"KV heads: {heads[0]} in the Transformer, {heads[1]} in the hybrid.")
    verdict = SEEN if ratio >= 8 else NOT_SEEN if ratio < 4 else UNCLEAR
    return Verdict(verdict, text, ("predicted_decode",))
