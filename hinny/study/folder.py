"""The folder of a study: taken for one study, whose runs are never mixed with another's."""

from __future__ import annotations

import json
from typing import Any

import tomli_w

from hinny.config import Recipe, read_toml
from hinny.errors import ConfigError, RunError
from hinny.run import write_atomically
from hinny.study.config import StudyConfig
from hinny.study.longer import flatten
from hinny.study.plan import Layout
from hinny.study.tasks import asked_anew

NO_MATTER = ("jobs", "description", "prepare.workers")
"""Keys that no figure depends on."""
MAY_GROW = ("seeds", "extend", "vary")
"""Lists to which a later start in the same folder may add: what is there keeps its place and its figures."""
SHOWN = ("plot", "line", "x", "also")
"""Keys of [[vary]] that say where its models stand on the page, and change none of them."""


def claim_folder(config: StudyConfig, recipes: dict[str, Recipe], layout: Layout) -> None:
    """Write the resolved study and recipes, or check them against those of an earlier start in the same folder.

    The resolved study names its recipes by their names, as the files in recipes/ are, not by where they came from.
    Raises ConfigError that names what changed: runs of another study or recipe are never mixed with new ones.
    Raises RunError where the folder cannot be read or written.
    """
    try:
        _claim(config, recipes, layout)
    except OSError as fault:
        raise RunError(f"{layout.root} cannot be used as a study's folder: {fault.strerror}. "
                       "Choose another with --out.") from None


def _claim(config: StudyConfig, recipes: dict[str, Recipe], layout: Layout) -> None:
    wanted = {layout.resolved: _plain(config.model_dump() | {"recipes": list(recipes)[:len(config.recipes)]})}
    wanted |= {layout.recipe(name): _plain(recipe.model_dump()) for name, recipe in recipes.items()}
    for path, table in wanted.items():
        if path.is_file() and (changed := _changes(_grown(read_toml(path), table), table)):
            raise ConfigError(f"{path} is of an earlier start and differs: {'; '.join(changed)}. "
                              "Its runs cannot be reused: choose another folder with --out, or undo the change.")
    if strangers := [p.stem for p in layout.recipe("x").parent.glob("*.toml") if p.stem not in recipes]:
        raise ConfigError(f"{layout.root} holds runs of {strangers[0]}, which this study does not name; "
                          "choose another folder with --out.")
    for path, table in wanted.items():
        write_atomically(path, tomli_w.dumps(table))


def _grown(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the lists of `new` where those only have more in them, and with the tasks that may change."""
    more = {key: new[key] for key in MAY_GROW
            if key in new and all(_made(item) in map(_made, new[key]) for item in old.get(key, []))}
    if "seeds" in more and new["seeds"][:len(old["seeds"])] != old["seeds"]:
        # timings are those of the first
        del more["seeds"]
    if "extend" in more and not old.get("extend"):
        more |= {key: new[key] for key in ("extension",) if key in new}
    if "eval" in old and "eval" in new:
        more["eval"] = asked_anew(old["eval"], new["eval"])
    return {**old, **more}


def _made(item: Any) -> Any:
    """An item of such a list without what only the page reads."""
    return {key: value for key, value in item.items() if key not in SHOWN} if isinstance(item, dict) else item


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """The table as TOML keeps it: without None."""
    plain: dict[str, Any] = json.loads(json.dumps(_without_none(table)))
    return plain


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(child) for key, child in value.items() if child is not None}
    if isinstance(value, list):
        return [_without_none(child) for child in value]
    return value


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    keys = [key for key in dict.fromkeys([*before, *after])
            if key not in NO_MATTER and before.get(key) != after.get(key)]
    return [f"{key} was {before.get(key, 'not set')!r} and is now {after.get(key, 'not set')!r}" for key in keys]
