"""What makes a comparison fair: equal parameters, equal arithmetic or equal state, and recipes fitted to be so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from pydantic import Field

from hinny import counts
from hinny.config import Recipe, Section
from hinny.errors import ConfigError

Measure = Literal["parameters", "flops", "state"]
UNITS = {"parameters": "non-embedding parameters", "flops": "training FLOPs a token", "state": "bytes of state"}
MOST_INVALID = 64
"""Values in a row that a fitted key may not have, such as a number of KV heads that does not divide the heads."""


class FitConfig(Section):
    """An integer key of a recipe that the study itself chooses, so that the recipe matches the first one."""

    key: Annotated[str, Field(pattern=r"^model\.")]
    """For instance model.mlp.d_ff."""
    step: Annotated[int, Field(gt=0)] = 1
    """The key is a multiple of it."""


class FittedConfig(FitConfig):
    """A key that is fitted in some recipes of the study."""

    recipes: Annotated[list[str], Field(min_length=1)]


def measured(recipe: Recipe, by: Measure, context: int | None) -> int:
    """What of a recipe is to be equal. context: tokens in front, for the state and cache that a sequence carries."""
    if by == "parameters":
        return counts.parameters(recipe.model).non_embedding
    if by == "flops":
        return counts.training_flops(recipe.model, recipe.train.pass_len)
    assert context is not None
    return counts.state_bytes(recipe.model) + context * counts.kv_bytes_per_token(recipe.model)


def fitted(name: str, make: Callable[[list[str]], Recipe], fit: FitConfig, target: int, by: Measure,
           context: int | None) -> list[str]:
    """The override `key=value` of the recipe that `make` gives with overrides, which brings it nearest to `target`.

    Raises ConfigError where the key has no value that is a multiple of the step.
    """
    def at(multiple: int) -> tuple[int, int | None]:
        """The first valid multiple from this one on, and the measure there; None where there is none near."""
        fault: ConfigError | None = None
        for found in range(multiple, multiple + MOST_INVALID):
            try:
                return found, measured(make([f"{fit.key}={found * fit.step}"]), by, context)
            except ConfigError as error:
                fault = fault or error
        if multiple == 1:
            raise ConfigError(f"{name}: {fit.key} cannot be fitted in multiples of {fit.step}: {fault}")
        return multiple, None

    # measures grow with a key: double until the target is passed, then halve what is left
    low, least = at(1)
    high, most = at(2 * low)
    if least == most:
        raise ConfigError(f"{name}: {fit.key} cannot be fitted: it does not change the {UNITS[by]}, which match_by = "
                          f"{by!r} makes equal.")
    while most is not None and most < target:
        (low, least), (high, most) = (high, most), at(2 * high)
    known = {low: least, high: most}
    while high - low > 1:
        middle, found = at((low + high) // 2)
        if middle >= high or found is None:
            # nothing valid from the middle up to there
            high = (low + high) // 2
        elif found < target:
            low = middle
        else:
            high = middle
        known[middle] = found
    best = min((abs(value - target), multiple) for multiple, value in known.items() if value is not None)[1]
    return [f"{fit.key}={best * fit.step}"]


def check_matched(recipes: dict[str, Recipe], by: Measure, context: int | None, tolerance: float) -> None:
    """Raises ConfigError unless the recipes are equal within the tolerance."""
    sizes = {name: measured(recipe, by, context) for name, recipe in recipes.items()}
    least, most = _of(sizes, min), _of(sizes, max)
    if sizes[least] == 0:
        raise ConfigError(f"{least} carries no state at all, and match_by is {by!r}: it cannot be matched.")
    if (gap := sizes[most] / sizes[least] - 1) > tolerance:
        raise ConfigError(f"{most} has {sizes[most]:,} {UNITS[by]} and {least} {sizes[least]:,}, {gap:.1%} apart; "
                          f"match_tolerance allows {tolerance:.1%}. Change a width or the number of layers in one "
                          "recipe (`hinny show RECIPE` counts), let [[fit]] choose a key, or raise match_tolerance.")


def _of(sizes: dict[str, int], choose: Callable[..., str]) -> str:
    names: Iterable[str] = sizes
    return choose(names, key=lambda name: sizes[name])
