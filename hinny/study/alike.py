"""What models of a study differ in besides what is asked about, so that no rule compares what is not alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hinny.config import Recipe
from hinny.study.longer import flatten
from hinny.study.vary import VaryConfig, variants

NAMES = {"name", "description"}
"""Keys of a recipe that change no model."""
NO_MATTER = {"train.micro_batch_size", "train.save_every", "train.keep_every", "train.log_every"}
"""Keys on which no figure of quality depends, besides all of [parallel]."""


def groups(entries: list[VaryConfig], names: Iterable[str]) -> dict[str, str]:
    """Model → the group within which it is matched; recipes that are no variants are in the one without a name."""
    return dict.fromkeys(names, "") | {one.name: one.group for one in variants(entries)}


def differing(recipes: list[Recipe], fitted: Iterable[str]) -> list[str]:
    """Keys in which the recipes differ, but for those that are fitted, which make the models equal in size.

    A section that one of them lacks, since it has no such layers, is compared among the others.
    """
    flat = [flatten(recipe.model_dump(exclude=NAMES)) for recipe in recipes]
    keys = dict.fromkeys(key for table in flat for key in table
                         if key not in {*fitted} | NO_MATTER and not key.startswith("parallel"))
    return [key for key in keys if len({repr(table[key]) for table in flat if key in table}) > 1]


def unlike(about: dict[str, Any], names: Iterable[str | None]) -> str:
    """In what the models differ that no comparison of architectures may, as part of a sentence; "" where in nothing."""
    found = [(name, about["recipes"][name]) for name in names if name is not None]
    if len({recipe.get("group", "") for _, recipe in found}) > 1:
        return "they are not matched in size with each other"
    for key, words in (("tokens", "were trained on different numbers of tokens"),
                       ("seq_len", "were trained on sequences of different lengths")):
        if len({recipe.get(key) for _, recipe in found}) > 1:
            return f"they {words}"
    odd = [key for key, values in about.get("differences", {}).items() if key.startswith("data.")
           and len({repr(values.get(name)) for name, _ in found}) > 1]
    return f"they differ in {odd[0]}" if odd else ""
