"""Layer patterns: one symbol a layer, in Megatron's notation, plus ours. No torch.

    M Mamba-2    1 Mamba-1    * attention    - MLP    | cut between pipeline stages

A pattern is a string such as `M-M*-`. A Transformer of n blocks is `*-` repeated n times. Cuts say where a pipeline
(parallel.pipeline above 1) divides the layers; they change nothing that is computed, so without one they may stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from hinny.errors import ConfigError

SYMBOLS = {"M": "Mamba-2", "1": "Mamba-1", "*": "attention", "-": "MLP"}
CUT = "|"
CARRYING = "M1"
"""Kinds of layer with a state that does not grow: what a segment can give the next (train.segment_len)."""


def parse(pattern: str) -> str:
    """The layers of `pattern` without its cuts. Raises ConfigError with a caret under the first bad symbol."""
    known = ", ".join(f"{symbol} ({name})" for symbol, name in SYMBOLS.items())
    for position, symbol in enumerate(pattern):
        if symbol not in SYMBOLS and symbol != CUT:
            raise ConfigError(f"model.pattern: '{symbol}' at position {position} is not a layer.\n"
                              f"  {pattern}\n  {' ' * position}^\n"
                              f"  Known layers: {known}; {CUT} cuts pipeline stages.")
    layers = pattern.replace(CUT, "")
    if not layers:
        raise ConfigError(f"model.pattern is {pattern!r}: a model needs at least one layer. Known layers: {known}.")
    return layers


def stages(pattern: str) -> list[str]:
    """The pieces between cuts: the layers of each pipeline stage."""
    parse(pattern)
    return pattern.split(CUT)


def cut_evenly(layers: str, sizes: Sequence[int], count: int) -> str:
    """`layers`, without cuts, cut into `count` stages: each cut where the `sizes` before it are nearest to their share.

    Every stage gets a layer; `count` must be at most the number of layers.
    """
    ends = [0, *accumulate(sizes)]
    cuts = [0]
    for stage in range(1, count):
        places = range(cuts[-1] + 1, len(layers) - (count - stage) + 1)
        share = ends[-1] * stage / count
        cuts.append(min(places, key=lambda place: abs(ends[place] - share)))
    return CUT.join(layers[start:end] for start, end in zip(cuts, [*cuts[1:], len(layers)], strict=True))


def allocate(n_layers: int, attention_ratio: float, mlp_ratio: float) -> str:
    """The paper's Algorithm 1 (Appendix A): attention spread evenly, then MLPs spread over what is left.

    The stack starts with a Mamba stretch and ends with an MLP if there are any. Rounding can make the counts
    delivered differ from the shares asked for, by one, on short stacks; `describe` prints both.
    """
    for name, ratio in (("attention_ratio", attention_ratio), ("mlp_ratio", mlp_ratio)):
        if not 0 <= ratio <= 1:
            raise ConfigError(f"model.{name} is {ratio}; it must lie between 0 and 1.")
    if n_layers <= 0:
        raise ConfigError(f"model.n_layers is {n_layers}; it must be positive.")
    if attention_ratio + mlp_ratio > 1:
        raise ConfigError(f"model.attention_ratio ({attention_ratio}) + model.mlp_ratio ({mlp_ratio}) is more than 1; "
                          "lower one of them.")
    n_attention = round(n_layers * attention_ratio)
    layers = _spread(["M"] * n_layers, "*", n_attention, (n_layers - n_attention) / (n_attention + 1))
    if n_mlp := round(n_layers * mlp_ratio):
        layers = _spread(layers, "-", n_mlp, (n_layers - n_attention - n_mlp) / n_mlp)
    return "".join(layers)


def _spread(layers: list[str], symbol: str, count: int, run: float) -> list[str]:
    """`layers` with an M replaced by `symbol` after every `run` Ms; attention is spread also when none is asked for."""
    if count == 0:
        return layers
    credit, out = run, []
    for layer in layers:
        if layer != "M":
            out.append(layer)
        elif credit < 0.5:
            out.append(symbol)
            credit += run
        else:
            out.append(layer)
            credit -= 1
    return out


def resolve(n_layers: int, attention_ratio: float, mlp_ratio: float, override: str | None) -> str:
    """The pattern by Megatron's rules: the override if there is one, else the allocation by ratios.

    An override must have n_layers layers and, if a ratio is above 0, as many of each kind as the ratios allocate.
    """
    allocated = allocate(n_layers, attention_ratio, mlp_ratio)
    if override is None:
        return allocated
    given = parse(override)
    if len(given) != n_layers:
        raise ConfigError("The hybrid override pattern is the wrong length: "
                          f"got {len(given)}, expected {n_layers}. Change model.pattern or model.n_layers.")
    if (attention_ratio > 0 or mlp_ratio > 0) and counts(given) != counts(allocated):
        raise ConfigError(
            "The number of each type of layer in the override pattern must match the number in the overridden pattern."
            f"\n  override:   {override}\n  overridden: {allocated}\n"
            "Change model.pattern, or remove model.attention_ratio and model.mlp_ratio.")
    return override


def counts(pattern: str) -> dict[str, int]:
    """Symbol → number of layers, for every known symbol."""
    found = Counter(parse(pattern))
    return {symbol: found[symbol] for symbol in SYMBOLS}


def describe(n_layers: int, attention_ratio: float, mlp_ratio: float, override: str | None = None) -> list[str]:
    """Megatron's log of an allocation, line by line; nothing for a stack of Mamba layers alone."""
    pattern = resolve(n_layers, attention_ratio, mlp_ratio, override)
    lines = []
    if override is not None:
        allocated = allocate(n_layers, attention_ratio, mlp_ratio)
        lines.append("Using hybrid override pattern")
        if parse(override) == allocated:
            lines.append("The override pattern matches the overridden pattern")
        else:
            lines += ["Warning: overriding pattern A with pattern B", f"A: {allocated}", f"B: {override}"]
    if attention_ratio > 0 or mlp_ratio > 0 or override is not None:
        found = counts(pattern)
        lines += ["Hybrid allocation (M is mamba, * is attention, - is mlp):", pattern]
        for symbol, name, target in (("*", "attention", attention_ratio), ("-", "mlp", mlp_ratio)):
            lines += [f"{found[symbol]} {name} layers in {n_layers} total layers.",
                      f"Target {name} ratio: {target:.2f}. Actual {name} ratio: {found[symbol] / n_layers:.2f}."]
    return lines


def draw(pattern: str, width: int = 60) -> list[str]:
    """The layers in rows of `width`, each under a ruler that numbers every tenth from 0."""
    layers, lines = parse(pattern), []
    for start in range(0, len(layers), width):
        row = layers[start:start + width]
        lines += ["".join(f"{i:<10}" for i in range(start, start + len(row), 10)).rstrip(), row]
    return lines
