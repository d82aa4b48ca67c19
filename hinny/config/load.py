"""From a TOML file or a shipped name to a checked section, with errors that name key, value and fix."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import ValidationError

from hinny.config.section import Section
from hinny.config.sections import Recipe
from hinny.errors import ConfigError

S = TypeVar("S", bound=Section)

PACKAGE = Path(__file__).parent.parent
"""Recipes and studies lie inside the package in a wheel, and beside it in a checkout."""


def validate(section: type[S], data: Mapping[str, Any], source: str) -> S:
    """`data` as a checked `section`; a ConfigError names `source`, the key, the value and what is allowed."""
    try:
        return section.model_validate(data)
    except ValidationError as failure:
        lines = [_explain(section, error) for error in failure.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None
    except ConfigError as failure:
        raise ConfigError(f"{source}: {failure}") from None


def _explain(section: type[Section], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        known = known_keys(section)
        near = difflib.get_close_matches(where, known, n=1, cutoff=0.6)
        tail = f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(_siblings(where, known))}."
        return f"unknown key {where}. {tail}"
    if error["type"] == "missing":
        return f"{where} is missing; it has no default."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {error['input']!r}: {message[0].lower()}{message[1:]}."


def known_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key that `section` and its nested sections know."""
    keys = []
    for name, field in section.model_fields.items():
        nested = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, Section)]
        key = prefix + (field.alias or name)
        keys.append(key)
        for child in nested:
            keys += known_keys(child, f"{key}.")
    return keys


def _types(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _siblings(where: str, known: Iterable[str]) -> list[str]:
    parent = where.rpartition(".")[0]
    return [key for key in known if key.rpartition(".")[0] == parent]


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in file `source`, or the shipped one of that name, changed by `key=value` overrides.

    A value is read as TOML (`train.steps=10`, `data.path="d"`), and as plain text where it is not TOML. `key=null`
    takes a key out (`model.attention.rope_base=null`).
    Raises ConfigError for a file that is absent or unreadable and for anything that does not validate.
    """
    path = find("recipes", source)
    data = {"name": path.stem, **read_toml(path)}
    for item in overrides:
        apply_override(data, item)
    return validate(Recipe, data, path.name)


def find(kind: Literal["recipes", "studies"], source: str | Path) -> Path:
    """The file that `source` names: a path, or the name of a shipped recipe or study, with its folder if it is in one
    (long/8b-hybrid-16k)."""
    path = Path(source)
    if path.suffix == ".toml" and _is_file(path):
        return path
    for folder in (PACKAGE / kind, PACKAGE.parent / kind):
        if _is_file(shipped := folder / f"{str(source).removesuffix('.toml')}.toml"):
            return shipped
    if _is_file(path):
        raise ConfigError(f"{path}: not a TOML file by its name; rename it to {path.stem}.toml.")
    names = shipped_names(kind)
    asked = str(source).removesuffix(".toml")
    near = difflib.get_close_matches(asked, names, n=1, cutoff=0.8) or difflib.get_close_matches(path.stem, names, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Shipped: {', '.join(names)}."
    raise ConfigError(f"no file and no shipped {kind} is called {str(source)!r}. {hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}.") from None


def shipped_names(kind: Literal["recipes", "studies"]) -> list[str]:
    """Names of the recipes or studies that come with hinny, those in folders with them."""
    for folder in (PACKAGE / kind, PACKAGE.parent / kind):
        if folder.is_dir():
            return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.toml"))
    return []


def read_toml(path: Path) -> dict[str, Any]:
    """The table in `path`, or a ConfigError that names the file and the fault."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: not a TOML file: {fault}.") from None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}.") from None


def apply_override(data: dict[str, Any], item: str) -> None:
    """Set one `key=value` in `data`, in place; `key=null` removes the key."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {item!r} is not of the form key=value, for instance train.steps=100.")
    *parents, last = (part.strip() for part in key.split("."))
    if not all((*parents, last)):
        raise ConfigError(f"override {item!r}: an empty name between dots; write it as train.steps=100.")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {item!r}: {parent} is a value, not a section.")
    if text.strip() != "null":
        data[last] = _toml_value(text)
    elif data.pop(last, None) is None:
        raise ConfigError(f"override {item!r}: there is no {key.strip()} to take out.")


def _toml_value(text: str) -> Any:
    """`text` as a TOML value, or as it stands where it is not one."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def to_toml(section: Section) -> str:
    """The section as TOML that `validate` reads back to an equal object."""
    return tomli_w.dumps(section.model_dump(exclude_none=True))
