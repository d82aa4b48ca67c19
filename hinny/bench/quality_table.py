"""Rows of `hinny bench quality` as a Markdown page: what shorter states and shorter weights cost, model by model."""

from __future__ import annotations

from collections.abc import Sequence

from hinny.bench.generation_rows import hardware_in, read_shape
from hinny.bench.kernel_table import Row

HEAD = """\
# What shorter numbers cost in quality

Written by `hinny bench quality`. Held-out text of each run, decoded token by token with the tokens given, through the
engine's runner; a line compares two decodings of the same tokens. The change of the loss is a mean over windows of text
with its 95 % interval, which one line in twenty misses by chance; greedy: share of tokens whose likeliest successor is
another; logits: the largest difference of any. The models are tiny and were trained for minutes: what rounding costs
them says which way errors go, and is no measure of a model of 8B.
"""

STATES = """\
## States

SSM states in `states`, beside float32 states with the same weights. Convolution states are float32 in both. With
weights that are not float32, arithmetic is bfloat16 and turns the smallest difference of a state into a rounding of an
output: those lines say more of it than of the states.
"""

WEIGHTS = """\
## Weights

Projections in `weights`, all else in bfloat16, beside float32 weights; states float32 in both.
"""


def page(rows: Sequence[Row], weights: Sequence[str], states: Sequence[str]) -> str:
    """The page of all rows; weights, states: what there could be rows of, so that what is missing is said."""
    lines: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for one in (one for one in rows if one["what"] != "quality.trained"):
        lines.setdefault((one["variant"], one["shape"], one["machine"], one["commit"]), {})[one["what"]] = one
    sizes = [(read_shape(one["quality.loss"]), one) for one in lines.values()]
    shorter = [(size, one) for size, one in sizes if size["state"] != "fp32"]
    whole = [(size, one) for size, one in sizes if size["state"] == "fp32" and size["weights"] != "fp32"]
    missing = [f"{name} in {kind}" for name, kinds, found in (
        ("weights", weights, {size["weights"] for size, _ in sizes}),
        ("states", states, {size["state"] for size, _ in sizes})) for kind in kinds if kind not in found]
    if not any(hardware_in(one["machine"]) for one in rows):
        missing.append("anything on a GPU, whose kernels round at other places")
    trained = [f"- {one['variant']}: {one['value']:,.0f} steps" for one in rows if one["what"] == "quality.trained"]
    made = dict.fromkeys((one["machine"], one["commit"], one["command"]) for one in rows)
    return "\n".join([
        HEAD, STATES, *_worst(shorter, "state", "States"), _table(shorter), WEIGHTS,
        *_worst(whole, "weights", "Weights"), _table(whole), "## Not measured\n", *[f"- {one}" for one in missing], "",
        "## Made by\n", *trained, *["- {}, commit {}: `{}`".format(*one) for one in made], ""])


Lines = Sequence[tuple[dict[str, str], dict[str, Row]]]


def _worst(lines: Lines, name: str, called: str) -> list[str]:
    """For each kind the line whose loss changed the most, in a sentence."""
    said = []
    for kind in dict.fromkeys(size[name] for size, _ in lines):
        size, one = max(((size, one) for size, one in lines if size[name] == kind),
                        key=lambda line: abs(line[1]["quality.loss_change"]["value"]))
        said.append(f"{called} in {kind} change the loss by at most {_change(one)} nats/token "
                    f"({one['quality.loss']['variant']}, weights {size['weights']}, windows of {size['length']}), "
                    f"{_within(one)}.")
    return [" ".join(said), ""] if said else []


def _within(one: dict[str, Row]) -> str:
    change = one["quality.loss_change"]
    return "which is within its interval of nothing" if change["low"] <= 0 <= change["high"] else (
        "which is more than chance" if change["value"] > 0 else "which is more than chance, and a gain")


def _change(one: dict[str, Row]) -> str:
    change = one["quality.loss_change"]
    return f"{change['value']:+.5f} ({change['low']:+.5f} … {change['high']:+.5f})"


def _table(lines: Lines) -> str:
    cells = [f"| {one['quality.loss']['variant']} | {size['weights']} | {size['state']} | {size['windows']} x "
             f"{size['length']} | {one['quality.loss']['value']:.4f} | {_change(one)} | "
             f"{one['quality.greedy_changed']['value']:.2%} | {one['quality.logit_change']['value']:.2g} |"
             for size, one in lines]
    return "\n".join(["| model | weights | states | windows x tokens | loss, nats/token | change | greedy | logits |",
                      "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", *cells, ""])
