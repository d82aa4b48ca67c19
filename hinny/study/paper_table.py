"""The paper's own numbers on its 8B models beside what this study's rows predict for the same shapes.

Of "An Empirical Study of Mamba-based Language Models" (arXiv 2406.07887) the abstract was read, the released training
scripts and checkpoints, and numbers that others quote from it; each number says which. Here "not published" means that
none of these prints one.
"""

from __future__ import annotations

from dataclasses import dataclass

from hinny.study.collect import FAMILIES, Figure, Table
from hinny.study.draw import short
from hinny.study.summary import in_bytes

NONE = "not published"
ABSTRACT = "abstract"
QUOTED = "quoted by others; its section was not read"
MEMORY = "remembered from its table of models, not checked"
SIZES = {"transformer": (8.53e9, "8.53 billion", MEMORY), "mamba": (8.15e9, "8.15 billion", MEMORY),
         "mamba2": (8.24e9, "8.24 billion", MEMORY), "hybrid": (8.66e9, "8.66 billion", QUOTED)}
"""Family → the paper's parameters, as printed, and where."""
SAME = 0.01
"""Share by which a predicted model's parameters may differ from the paper's to count as its model."""
CLAIM = 8.0
"""The paper's "up to 8x"."""


@dataclass(frozen=True)
class Entry:
    """One line: what is compared, the rows' figure with a remark, the paper's, and where the paper says it."""

    what: str
    here: str
    remark: str
    paper: str
    where: str


@dataclass(frozen=True)
class PaperTable:
    """The lines, and the figures that they were made from."""

    entries: list[Entry]
    figures: list[Figure]


def paper_table(table: Table) -> PaperTable | None:
    """The table, where the study predicts the paper's Transformer and its hybrid; else None."""
    ours = {family: name for name, recipe in table.about["predicted"].items() for family in [recipe["family"]]
            if family in SIZES and abs(recipe["parameters"] / SIZES[family][0] - 1) < SAME}
    if not {"transformer", "hybrid"} <= set(ours):
        return None
    entries = [_parameters(table, family, ours[family]) for family in SIZES if family in ours]
    entries += [*_decode(table, ours), *_caches(table, ours), *_states(table, ours), *_training(table, ours)]
    figures = [f for what in ("predicted_decode", "predicted_sequence") for f in table.find(what)
               if f.variant in ours.values()]
    return PaperTable(entries, figures)


def _parameters(table: Table, family: str, name: str) -> Entry:
    count = table.about["predicted"][name]["parameters"]
    _, printed, where = SIZES[family]
    return Entry(f"Parameters, {FAMILIES[family]}", f"{count:,}", "counted from the recipe", printed, where)


def ratios(table: Table, ours: dict[str, str]) -> list[tuple[int, float, bool]]:
    """Context, how many times faster the hybrid decodes than the Transformer, whether both fit: on the first GPU."""
    found = []
    for figure in table.curve("predicted_decode", ours["hybrid"], "context"):
        if figure.shape["hardware"] != table.find("predicted_decode")[0].shape["hardware"]:
            continue
        base = table.find("predicted_decode", ours["transformer"],
                          **{key: figure.shape[key] for key in ("hardware", "batch", "context")})
        found += [(figure.number("context"), figure.value / base[0].value,
                   "no" not in (figure.shape.get("fits"), base[0].shape.get("fits")))] if base else []
    return found


def _decode(table: Table, ours: dict[str, str]) -> list[Entry]:
    found = ratios(table, ours)
    if not found:
        return []
    shape = table.find("predicted_decode")[0].shape
    context, most, fits = max(found, key=lambda one: one[1])
    inside = [one for one in found if one[2]]
    remark = f"at {short(context)} tokens, {'' if fits else 'were there the memory: the Transformer does not fit; '}"
    remark += (f"largest where both fit: {max(inside, key=lambda one: one[1])[1]:.1f}× at "
               f"{short(max(inside, key=lambda one: one[1])[0])}; " if inside and not fits else "")
    return [Entry(f"Decode speed, hybrid over Transformer, batch {shape['batch']} on one {shape['hardware']}",
                  f"up to {most:.1f}×", f"{remark}{_passes(found)}", f"up to {CLAIM:.0f}×, a prediction, too",
                  ABSTRACT)]


def _passes(found: list[tuple[int, float, bool]]) -> str:
    """Between which contexts the ratio passes the paper's."""
    below = [context for context, ratio, _ in found if ratio < CLAIM]
    above = [context for context, ratio, _ in found if ratio >= CLAIM]
    if not above:
        return f"it stays below {CLAIM:.0f}×"
    if not below:
        return f"above {CLAIM:.0f}× at every context"
    return f"it passes {CLAIM:.0f}× between {short(max(below))} and {short(min(above))} tokens"


def line(table: Table, name: str) -> tuple[float, float] | None:
    """Bytes that each token adds to one sequence, and those that it holds without any; None without two figures."""
    curve = table.curve("predicted_sequence", name, "context")
    if len(curve) < 2:
        return None
    first, last = curve[0], curve[-1]
    slope = (last.value - first.value) / (last.number("context") - first.number("context"))
    return slope, first.value - slope * first.number("context")


def _caches(table: Table, ours: dict[str, str]) -> list[Entry]:
    base, hybrid = line(table, ours["transformer"]), line(table, ours["hybrid"])
    if not base or not hybrid or not hybrid[0]:
        return []
    ratio = base[0] / hybrid[0]
    about = [table.about["predicted"][ours[family]] for family in ("transformer", "hybrid")]
    layers = [recipe["pattern"].count("*") for recipe in about]
    heads = [recipe["kv_heads"] for recipe in about]
    entries = [Entry("Keys and values of a token", f"{in_bytes(base[0])} Transformer, {in_bytes(hybrid[0])} hybrid",
                     f"{layers[0]} attention layers of {heads[0]} key/value heads in the Transformer, {layers[1]} of "
                     f"{heads[1]} in the hybrid", NONE, "–")]
    grouped = ratio * heads[1] / heads[0]
    told = f"the ratio of speeds tends to that of the caches: {ratio:.0f}× with this Transformer"
    if heads[0] != heads[1]:
        told += (f", {grouped:.0f}× with one of {heads[1]} key/value heads, as the hybrid has" + (
            f"; “up to {CLAIM:.0f}×” at every length needs the latter" if round(grouped) == CLAIM else ""))
    return [*entries, Entry("Baseline of that claim", f"{heads[0]} key/value heads, as released", told, NONE,
                            "the abstract names none")]


def _states(table: Table, ours: dict[str, str]) -> list[Entry]:
    parts = [(FAMILIES[family], found[1]) for family in ("mamba", "mamba2", "hybrid")
             if family in ours and (found := line(table, ours[family]))]
    if not parts:
        return []
    return [Entry("States of a sequence, at any length", ", ".join(f"{in_bytes(v)} {label}" for label, v in parts),
                  "float32 states", NONE, "–")]


def _training(table: Table, ours: dict[str, str]) -> list[Entry]:
    flops = {family: table.about["predicted"][ours[family]].get("flops_per_token") for family in
             ("transformer", "hybrid")}
    remark = ""
    if all(flops.values()):
        remark = (f"a token costs {flops['hybrid'] / 1e9:.1f} GFLOP in the hybrid, {flops['transformer'] / 1e9:.1f} in "
                  "the Transformer, counted")
    return [Entry("Share of the GPU's peak in training (MFU)", "not predicted", remark,
                  "29.9 % hybrid, 30.7 % Transformer", QUOTED)]
