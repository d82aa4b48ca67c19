"""Variants of recipes in a study: what is changed, in which steps, and on which plot they stand side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hinny.config import Section
from hinny.errors import ConfigError
from hinny.study.longer import flatten
from hinny.study.match import FitConfig

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Value = int | float | str
Axis = Literal["value", "attention", "mlp", "parameters", "flops"]
"""What a variant's place on its plot is: its own value, the share of attention or MLP layers of its pattern, its
non-embedding parameters, or the FLOPs of its training."""


class VaryConfig(Section):
    """One recipe changed in one or several ways; each is a model of the study, named NAME-VALUE, or NAME alone."""

    name: Name
    recipe: str
    """Name of a shipped recipe, or path of a recipe file."""
    values: Annotated[list[Value], Field(min_length=1)] | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys that differ from the recipe; "{value}" in a text is replaced, and "null" takes a key out."""
    each: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted keys that differ from value to value: one for each."""
    fit: FitConfig | None = None
    """The key by which its models are fitted to the first of their group; that one stays as it is."""
    group: str = ""
    """Models of one group are matched with each other, by the first of it; "{value}" is replaced."""
    plot: str | None = None
    """Title of the plot on which its variants stand; without it they are models among the others."""
    line: str | None = None
    """Name of their line there; those of one line are compared with each other."""
    x: Axis = "value"
    also: dict[str, Value] = Field(default_factory=dict)
    """Models of the study that stand on the line too, in front of its own: name → the value that they are there."""

    @model_validator(mode="after")
    def _check(self) -> VaryConfig:
        for value in self.values or ():
            if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", value):
                raise ValueError(f"values has {value!r}: a value that is text is part of a folder's name, so it has "
                                 "letters, digits, _, ., + and - alone. Set what it stands for with each.")
        for key in (*flatten(self.overrides), *self.each):
            if key in ("name", "train.seed", "data.path"):
                raise ValueError(f"overrides and each may not set {key}: the study sets it.")
        if both := [key for key in self.each if key in flatten(self.overrides)]:
            raise ValueError(f"overrides and each both set {both[0]}; remove one.")
        if self.each and self.values is None:
            raise ValueError("each has no effect without values; give them, or use overrides.")
        wrong = [key for key, items in self.each.items() if len(items) != len(self.values or ())]
        if wrong:
            raise ValueError(f"each.{wrong[0]} has {len(self.each[wrong[0]])} items for {len(self.values or ())} "
                             "values; give one for each.")
        for key, given in (("line", self.line is not None), ("x", self.x != "value"), ("also", bool(self.also))):
            if given and self.plot is None:
                raise ValueError(f"{key} has no effect without plot; name the plot, or remove it.")
        return self


@dataclass(frozen=True)
class Variant:
    """One model that a study makes of a recipe."""

    vary: VaryConfig
    value: Value | None
    overrides: tuple[str, ...]
    """`key=value` beyond those of the study, what is fitted not included."""

    @property
    def name(self) -> str:
        """Of its recipe, and of its runs."""
        return self.vary.name if self.value is None else f"{self.vary.name}-{self.value}"

    @property
    def group(self) -> str:
        """Those it is matched with."""
        return self.vary.group.replace("{value}", str(self.value))


def variants(entries: list[VaryConfig]) -> list[Variant]:
    """All variants of a study, in its order. Raises ConfigError for two of one name."""
    found = [Variant(entry, value, tuple(_overrides(entry, place, value)))
             for entry in entries for place, value in enumerate([None] if entry.values is None else entry.values)]
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two variants are called {twice}; give one [[vary]] another name, or each value once.")
    return found


def _overrides(entry: VaryConfig, place: int, value: Value | None) -> Iterator[str]:
    for key, item in flatten(entry.overrides).items():
        filled = isinstance(item, str) and "{value}" in item
        yield f"{key}={item.replace('{value}', str(value)) if filled else _text(item)}"
    for key, items in entry.each.items():
        yield f"{key}={_text(items[place])}"


def _text(value: Any) -> str:
    """A value as the command line takes it; a text in quotes, since a pattern may look like a number."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if value == "null" else json.dumps(value, ensure_ascii=False)
